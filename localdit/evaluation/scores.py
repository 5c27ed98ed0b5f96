"""Scores of generated pictures against real ones, each with its interval and all that it takes to repeat it."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from localdit.evaluation.distances import (
    NEIGHBOURS,
    cmmd,
    cubic_kernel,
    frechet_distance,
    gaussian_kernel,
    inception_score,
    kernel_distance,
    mmd,
    neighbourhoods,
    unit_length,
)
from localdit.evaluation.features import Features
from localdit.evaluation.records import make_record

logger = logging.getLogger(__name__)

METRICS = ("fid", "kid", "cmmd", "precision", "recall", "density", "coverage", "inception_score")
TWO_SIDED = 1.96  # standard deviations
MOST_RESAMPLES = 10_000


def score_features(
    real: Features | None,
    generated: Features,
    metrics: Sequence[str] | None = None,
    generation: dict[str, Any] | None = None,
    resamples: int = 50,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Compare generated pictures with real ones.

    The 95% interval is that of a normal distribution: 1.96 standard deviations of scores of pictures drawn anew with
    replacement, about the score. (Percentiles would not hold FID, which fewer distinct pictures raise.)

    Args:
        real: None leaves the inception score alone.
        metrics: among `METRICS`; None for all that fit.
        generation: how the pictures came about, for the record.
        resamples: for the intervals; 0 for none.
        force: compute FID from fewer pictures than features, too.

    Returns:
        For each metric "metric", "value", "interval", "versions", "extractor", "real", "generated", "generation".

    Raises:
        ValueError: where two extractors were used, a metric does not fit, or there are too few pictures.
    """
    check_resamples(resamples)
    if unknown := sorted(set(metrics or ()) - set(METRICS)):
        raise ValueError(f"metrics={unknown} are not known; choose among {', '.join(METRICS)}.")
    check_comparable(real, generated)
    wanted = fitting(real, generated, force) if metrics is None else list(metrics)
    if metrics is not None:
        check_wanted(wanted, real, generated, force)
    common = {
        "extractor": generated.extractor,
        "real": real.pictures if real is not None else None,
        "generated": generated.pictures,
        "generation": generation,
        "resamples": resamples,
    }
    records = []
    for names, compute in computations(real, generated, resamples):
        if asked := [name for name in names if name in wanted]:
            results = compute()
            records += [make_record(name, results[name][0], interval(*results[name]), **common) for name in asked]
    return records


def interval(value: float, resampled: np.ndarray) -> list[float] | None:
    """The 95% interval of a value, None where nothing was resampled."""
    if not len(resampled):
        return None
    half = TWO_SIDED * float(np.std(resampled, ddof=1))
    return [value - half, value + half]


Results = dict[str, tuple[float, np.ndarray]]


def computations(
    real: Features | None, generated: Features, resamples: int
) -> list[tuple[tuple[str, ...], Callable[[], Results]]]:
    """Names of metrics, and what computes their values with those of resampled pictures [R]."""
    found: list[tuple[tuple[str, ...], Callable[[], Results]]] = []
    if real is not None:
        pair = real.values, generated.values
        found += [
            (("fid",), lambda: {"fid": (frechet_distance(*pair), resampled_frechet(*pair, resamples))}),
            (("kid",), lambda: {"kid": (kernel_distance(*pair), resampled_mmd(*pair, cubic_kernel, True, resamples))}),
            (("cmmd",), lambda: {"cmmd": (cmmd(*pair), resampled_cmmd(*pair, resamples))}),
            (("precision", "recall", "density", "coverage"), lambda: resampled_neighbourhoods(*pair, resamples)),
        ]
    if generated.logits is not None:
        logits = generated.logits
        found.append((("inception_score",), lambda: resampled_inception(logits, resamples)))
    return found


def counts(count: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of so many pictures is drawn, [R, N]."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)


def repeated(rows: np.ndarray, times: np.ndarray) -> np.ndarray:
    return np.repeat(rows, times.astype(int), axis=0)


def resampled_frechet(real: np.ndarray, generated: np.ndarray, resamples: int) -> np.ndarray:
    times = zip(counts(len(real), resamples, 0), counts(len(generated), resamples, 1), strict=True)
    return np.array([frechet_distance(repeated(real, mine), repeated(generated, theirs)) for mine, theirs in times])


def resampled_mmd(
    real: np.ndarray, generated: np.ndarray, kernel: Callable, unbiased: bool, resamples: int
) -> np.ndarray:
    if not resamples:
        return np.array([])
    times = counts(len(real), resamples, 0), counts(len(generated), resamples, 1)
    return 1000 * mmd(real, generated, kernel, *times, unbiased=unbiased)


def resampled_cmmd(real: np.ndarray, generated: np.ndarray, resamples: int) -> np.ndarray:
    return resampled_mmd(unit_length(real), unit_length(generated), gaussian_kernel, False, resamples)


def resampled_neighbourhoods(
    real: np.ndarray, generated: np.ndarray, resamples: int, neighbours: int = NEIGHBOURS
) -> Results:
    """The neighbourhoods stay; which pictures the means are taken over is drawn anew."""
    return {
        name: (float(each.mean()), counts(len(each), resamples, 0) @ each / len(each))
        for name, each in neighbourhoods(real, generated, neighbours).items()
    }


def resampled_inception(logits: np.ndarray, resamples: int) -> Results:
    drawn = [inception_score(repeated(logits, times)) for times in counts(len(logits), resamples, 0)]
    return {"inception_score": (inception_score(logits), np.array(drawn))}


def check_resamples(resamples: int) -> None:
    if resamples == 1 or not 0 <= resamples <= MOST_RESAMPLES:
        raise ValueError(f"resamples={resamples} make no interval; give 0 for none, or from 2 to {MOST_RESAMPLES}.")


def check_comparable(real: Features | None, generated: Features) -> None:
    if real is None:
        return
    for name in ("sha256", "preprocessing"):
        if real.extractor[name] != generated.extractor[name]:
            raise ValueError(
                f"The features of the real pictures are of {real.extractor['name']!r} ({name} "
                f"{real.extractor[name][:40]}) and those of the generated ones of {generated.extractor['name']!r} "
                f"({generated.extractor[name][:40]}); make both by one extractor."
            )
    if real.pictures.get("size") != generated.pictures.get("size"):
        logger.warning(
            "The real pictures have %s pixels and the generated ones %s; give --size to compare them at one size.",
            *(" x ".join(map(str, each.pictures.get("size") or ["?"])) for each in (real, generated)),
        )


def why_not_fid(real: Features, generated: Features) -> str | None:
    """The reason why FID would say little, if there is one."""
    fewest, dimension = min(len(real.values), len(generated.values)), generated.values.shape[1]
    if fewest > dimension:
        return None
    return (
        f"FID of {fewest} pictures in {dimension} features is mostly the error of its covariance; give more than "
        f"{dimension} pictures, take kid or cmmd, or add --force"
    )


def check_enough(real: Features, generated: Features) -> None:
    if (fewest := min(len(real.values), len(generated.values))) <= NEIGHBOURS:
        there = "1 picture is" if fewest == 1 else f"{fewest} pictures are"
        raise ValueError(f"{there} too few to compare; give more than {NEIGHBOURS} of each.")


def check_wanted(wanted: list[str], real: Features | None, generated: Features, force: bool) -> None:
    """Raise a ValueError where a metric does not fit."""
    if "inception_score" in wanted and generated.logits is None:
        raise ValueError(
            f"inception_score needs classes, which {generated.extractor['name']!r} knows none of; take inception or an "
            "extractor of train-extractor."
        )
    against_real = [name for name in wanted if name != "inception_score"]
    if against_real and real is None:
        raise ValueError(f"{', '.join(against_real)} needs real pictures to compare with; give --real or --reference.")
    if real is None:
        return
    if against_real:
        check_enough(real, generated)
    if "fid" in wanted and not force and (reason := why_not_fid(real, generated)):
        raise ValueError(f"{reason}.")


def fitting(real: Features | None, generated: Features, force: bool) -> list[str]:
    """All metrics that these pictures allow."""
    wanted = [name for name in METRICS if real is not None or name == "inception_score"]
    if generated.logits is None:
        wanted.remove("inception_score")
    if real is not None:
        check_enough(real, generated)  # before a word of FID
    if real is not None and not force and (reason := why_not_fid(real, generated)):
        logger.warning("fid is left out: %s.", reason)
        wanted.remove("fid")
    if not wanted:
        raise ValueError("There is nothing to compute without real pictures or classes; give --real or --reference.")
    check_wanted(wanted, real, generated, force)
    return wanted
