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
    rounded_pairwise,
    unit_length,
)
from localdit.evaluation.features import Features
from localdit.evaluation.processes import shown
from localdit.evaluation.records import make_record

logger = logging.getLogger(__name__)

METRICS = ("fid", "kid", "cmmd", "precision", "recall", "density", "coverage", "inception_score")
TWO_SIDED = 1.96  # standard deviations
SHARES = ("precision", "recall", "coverage")  # which lie in [0, 1]
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
    replacement, about the score. (Percentiles would not hold FID, which fewer distinct pictures raise.) Copies would
    have no distance to their neighbours, so that of the shares and the density random halves of both sets are scored.

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
    compared = real.pictures if real is not None else None
    common = {
        "extractor": generated.extractor,
        "generated": generated.pictures,
        "generation": generation,
        "resamples": resamples,
    }
    records = []
    for names, compute in computations(real, generated, resamples):
        if asked := [name for name in names if name in wanted]:
            results = compute()
            for name in asked:
                value, resampled = results[name]
                # which sees no real picture
                beside = None if name == "inception_score" else compared
                records.append(make_record(name, value, interval(value, resampled, name), real=beside, **common))
    return records


def interval(value: float, resampled: np.ndarray, metric: str = "") -> list[float] | None:
    """The 95% interval of a value, that of a share within [0, 1]; None where fewer than two were resampled."""
    resampled = resampled[np.isfinite(resampled)]  # one picture many times over has no other to be compared with
    if len(resampled) < 2:
        return None
    half = TWO_SIDED * float(np.std(resampled, ddof=1))
    ends = [value - half, value + half]
    return [min(max(end, 0.0), 1.0) for end in ends] if metric in SHARES else ends


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
    times = list(zip(counts(len(real), resamples, 0), counts(len(generated), resamples, 1), strict=True))
    drawn = ((repeated(real, mine), repeated(generated, theirs)) for mine, theirs in shown(times, "interval of fid"))
    return np.array([frechet_distance(*pair) for pair in drawn])


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
    """Precision, recall, density and coverage, and those of random halves of both sets [R].

    Means over halves without replacement spread as those of the whole do among sets drawn anew.
    """
    rng, halves = np.random.default_rng(0), []
    if min(len(real), len(generated)) // 2 <= neighbours:
        resamples = 0
    for _ in shown(range(resamples), "interval of precision and recall"):
        parts = (rows[rng.permutation(len(rows))[: len(rows) // 2]] for rows in (real, generated))
        found = neighbourhoods(*parts, neighbours, distances=rounded_pairwise)
        halves.append({name: each.mean() for name, each in found.items()})
    whole = neighbourhoods(real, generated, neighbours)
    return {name: (float(each.mean()), np.array([half[name] for half in halves])) for name, each in whole.items()}


def resampled_inception(logits: np.ndarray, resamples: int) -> Results:
    times = counts(len(logits), resamples, 0)
    drawn = [inception_score(repeated(logits, each)) for each in times]
    return {"inception_score": (inception_score(logits), np.array(drawn))}


def check_resamples(resamples: int) -> None:
    if resamples == 1 or not 0 <= resamples <= MOST_RESAMPLES:
        raise ValueError(f"resamples={resamples} make no interval; give 0 for none, or from 2 to {MOST_RESAMPLES}.")


def check_extractors(real: dict[str, Any], generated: dict[str, Any]) -> None:
    """Raise a ValueError where real and generated pictures are not seen by one extractor."""
    for name in ("sha256", "preprocessing"):
        if real[name] != generated[name]:
            raise ValueError(
                f"The features of the real pictures are of {real['name']!r} ({name} {real[name][:40]}) and those of "
                f"the generated ones of {generated['name']!r} ({generated[name][:40]}); make both by one extractor."
            )


def check_comparable(real: Features | None, generated: Features) -> None:
    if real is None:
        return
    check_extractors(real.extractor, generated.extractor)
    if real.pictures.get("size") != generated.pictures.get("size"):
        logger.warning(
            "The real pictures have %s pixels and the generated ones %s; bring both to one size, as --size does where "
            "the features of both are made.",
            *(" x ".join(map(str, each.pictures.get("size") or ["?"])) for each in (real, generated)),
        )


def why_not_fid(fewest: int, dimension: int) -> str | None:
    """The reason why FID of so few pictures would say little, if there is one."""
    if fewest > dimension:
        return None
    return (
        f"FID of {fewest} pictures in {dimension} features is mostly the error of its covariance; give more than "
        f"{dimension} pictures, take kid or cmmd, or add --force"
    )


def check_counts(fewest: int, dimension: int, metrics: Sequence[str], force: bool) -> None:
    """Raise a ValueError where real or generated pictures are too few for the metrics."""
    if fewest <= NEIGHBOURS and set(metrics) - {"inception_score"}:
        there = "1 picture is" if fewest == 1 else f"{fewest} pictures are"
        raise ValueError(f"{there} too few to compare; give more than {NEIGHBOURS} of each.")
    if "fid" in metrics and not force and (reason := why_not_fid(fewest, dimension)):
        raise ValueError(f"{reason}.")


def fewest_and_dimension(real: Features, generated: Features) -> tuple[int, int]:
    return min(len(real.values), len(generated.values)), generated.values.shape[1]


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
    if real is not None:
        check_counts(*fewest_and_dimension(real, generated), wanted, force)


def fitting(real: Features | None, generated: Features, force: bool) -> list[str]:
    """All metrics that these pictures allow."""
    wanted = [name for name in METRICS if real is not None or name == "inception_score"]
    if generated.logits is None:
        wanted.remove("inception_score")
    if real is not None:
        check_counts(*fewest_and_dimension(real, generated), wanted, force=True)  # before a word of FID
        if not force and (reason := why_not_fid(*fewest_and_dimension(real, generated))):
            logger.warning("fid is left out: %s.", reason)
            wanted.remove("fid")
    if not wanted:
        raise ValueError("There is nothing to compute without real pictures or classes; give --real or --reference.")
    check_wanted(wanted, real, generated, force)
    return wanted
