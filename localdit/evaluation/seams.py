"""Seams of windowed attention: whether pictures change more across window borders than across other patch borders."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from localdit.command_line import Parser, start_process
from localdit.evaluation.generation import read_generation
from localdit.evaluation.images import list_images, to_images
from localdit.evaluation.limits import counting_to
from localdit.evaluation.processes import gathered, own_pictures
from localdit.evaluation.records import FILE, about_pictures, command_of, keep, make_record, scores_file

# ITU-R BT.601 in thousandths: whole numbers, so that equal pixels stay exactly equal
LUMINANCE = np.array([299, 587, 114])
RESAMPLES = 2000
LARGEST = 65_536  # pixels along one side of a window

# N pictures, P phases: a patch border k patches from the left or upper side of a picture has the phase k % P, where P
# is the number of patches along a window


def seam_ratio(
    images: Iterable[Image.Image] | np.ndarray, period: int, patch: int, offsets: Sequence[int] = (0,)
) -> dict:
    """Compare the gradient energy of window borders with that of the other patch borders; 1 without seams.

    The energy of a border is the mean of (a - b)² over the pairs of pixels a, b on its two sides, in luminance. The
    ratio is the energy of the window borders of one offset over that of the patch borders that are window borders at
    none of the offsets, both pooled over all pictures. Autoencoders and patches leave grids of their own; they raise
    both alike and cancel, while pixels inside a patch would make every border look like a seam. A step of height h at
    the window borders of white noise with standard deviation s gives 1 + h² / (2 s²).

    Args:
        images: PIL pictures of any sizes, or an array as `to_images` takes it.
        period: pixels along one side of a window: window_size * patch_size * vae_scale_factor.
        patch: pixels along one side of a patch (token): patch_size * vae_scale_factor.
        offsets: where the first window borders lie, in pixels; windows that shift from layer to layer have several.

    Returns:
        the number of "pictures" and for each of the "offsets" the measurements "columns" (borders between columns of
        pixels), "rows" and "together", each as `compare` returns it; None for a direction that has nothing to compare.

    Raises:
        ValueError: for a grid that cannot be compared, and where both directions have nothing to compare, since the
            pictures are too small to hold a window border, or have no gradient.
    """
    check_grid(period, patch, offsets)
    pictures = to_images(images) if isinstance(images, np.ndarray) else images
    return compare_offsets([energies(picture, period, patch) for picture in pictures], period, patch, offsets)


def energies(picture: Image.Image, period: int, patch: int) -> np.ndarray:
    """What `border_energy` finds between columns and between rows of a picture, [2, 2, P]."""
    luminance, phases = np.asarray(picture.convert("RGB")) @ LUMINANCE, period // patch
    return np.stack([border_energy(pixels, patch, phases) for pixels in (luminance, luminance.T)])


def compare_offsets(measured: Sequence[np.ndarray], period: int, patch: int, offsets: Sequence[int]) -> dict:
    """What `seam_ratio` returns, of the `energies` of each picture."""
    borders = [offset // patch for offset in offsets]
    others = [phase for phase in range(period // patch) if phase not in borders]
    sums = np.array(measured).reshape(-1, 2, 2, period // patch)  # picture, direction, energy and pixels, phase
    directions = {"columns": sums[:, 0], "rows": sums[:, 1], "together": sums.sum(axis=1)}

    ratios = []
    for offset, border in zip(offsets, borders, strict=True):
        found = {name: compare(part, border, others, patch) for name, part in directions.items()}
        if found["together"] is None:
            if directions["together"][:, 0, border].any() and not directions["together"][:, 0, others].any():
                raise ValueError(
                    f"All steps of {len(sums)} pictures are at window borders (period={period}, offset={offset}) and "
                    "none at the other patch borders, so that their ratio has no bound: look at the pictures."
                )
            raise ValueError(
                f"No picture of {len(sums)} has a gradient across window borders (period={period}, offset={offset}) "
                f"or the other patch borders; give pictures that are larger than {period} pixels "
                "and of more than one colour."
            )
        ratios.append({"offset": offset, **found})
    return {"pictures": len(sums), "period": period, "patch": patch, "offsets": ratios}


def border_energy(luminance: np.ndarray, patch: int, phases: int) -> np.ndarray:
    """Sum the squared steps of luminance [H, W] across its vertical patch borders by phase.

    Returns:
        the sums of the squares and the numbers of pairs of pixels they are over, [2, P].
    """
    energy = np.square(np.diff(luminance, axis=1)[:, patch - 1 :: patch]).sum(axis=0)  # [borders]
    pairs = np.full(len(energy), len(luminance))
    phase = np.arange(1, len(energy) + 1) % phases
    return np.stack([np.bincount(phase, weights, minlength=phases) for weights in (energy, pairs)])


def compare(sums: np.ndarray, border: int, others: list[int], patch: int) -> dict | None:
    """Compare the energy of the phase `border` with that of the phases `others`.

    Args:
        sums: what `border_energy` returns for each picture, [N, 2, P].

    Returns:
        None where nothing can be compared, else the "ratio" with its 95% bootstrap "interval" over pictures (None for
        one picture; an end of None has no bound), the number of "pictures" it is of, which leaves out those that are
        too small or flat, the energy of all "phases" relative to the others' by their first place in pixels, which of
        these phases is the "highest", and the "rank" of the border's own: 1 where it is the highest.
    """
    kinds, comparable = comparable_kinds(sums, border, others)
    total = kinds.sum(axis=0)  # [border or others, 2]
    if total[1, 0] == 0:
        return None
    energy, pairs = sums[comparable].sum(axis=0)  # [P] each
    natural = total[1, 0] / total[1, 1]
    relative = {
        phase * patch: round(float(energy[phase] / pairs[phase] / natural), 4)
        for phase in range(len(pairs))
        if pairs[phase]
    }
    return {
        "ratio": relative[border * patch],
        "interval": _interval(resampled_ratios(kinds)) if len(kinds) > 1 else None,
        "pictures": len(kinds),
        "phases": relative,
        "highest": max(relative, key=relative.__getitem__),
        "rank": 1 + sum(value > relative[border * patch] for value in relative.values()),
    }


def comparable_kinds(sums: np.ndarray, border: int, others: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The energies [M, border or others, 2] of the pictures that can be compared, and which of all [N] they are."""
    kinds = np.stack([sums[..., border], sums[..., others].sum(axis=-1)], axis=1)  # [N, border or others, 2]
    comparable = np.asarray((kinds[..., 1] > 0).all(axis=1) & (kinds[..., 0] > 0).any(axis=1))
    return kinds[comparable], comparable


def resampled_ratios(kinds: np.ndarray, seed: int = 0) -> np.ndarray:
    """Ratios of pooled energies of pictures drawn anew with replacement, [RESAMPLES], of [N, border or others, 2]."""
    rng, count = np.random.default_rng(seed), len(kinds)
    resampled = np.stack([kinds[rng.integers(count, size=count)].sum(axis=0) for _ in range(RESAMPLES)])
    energy = resampled[..., 0] / resampled[..., 1]  # [RESAMPLES, border or others]
    with np.errstate(divide="ignore"):
        return energy[:, 0] / energy[:, 1]


def _interval(ratios: np.ndarray) -> list[float | None]:
    """The 95% interval of resampled ratios; None for an end without a bound."""
    # a resample whose other borders are all flat is infinite, so that quantiles must not interpolate
    ends = np.quantile(ratios, [0.025, 0.975], method="inverted_cdf")
    return [round(float(end), 4) if np.isfinite(end) else None for end in ends]


def check_grid(period: int, patch: int, offsets: Sequence[int]) -> None:
    if patch < 1 or period <= patch or period % patch:
        raise ValueError(f"period={period} is no multiple of patch={patch} above it; give both in pixels.")
    known = range(0, period, patch)
    if unknown := [offset for offset in offsets if offset not in known]:
        raise ValueError(f"offset={unknown[0]} is no multiple of patch={patch} from 0 to below period={period}.")
    if not 0 < len(set(offsets)) < len(known):
        raise ValueError(
            f"offsets={list(offsets)} leave no window border, or no patch border to compare it with; "
            f"give some, and not all, of the multiples of {patch} below {period}."
        )


def against_real(
    generated: Sequence[np.ndarray], real: Sequence[np.ndarray], period: int, patch: int, offsets: Sequence[int]
) -> list[dict]:
    """The ratio of generated pictures over that of real ones, both of rows and columns together, for each offset.

    1 where window borders are as strong in both, whatever the favourite places of what they show.

    Args:
        generated, real: the `energies` of each picture, of which two or more must have a gradient to compare.

    Returns:
        for each offset the "ratio" and its 95% bootstrap "interval" over both sets of pictures.

    Raises:
        ValueError: for fewer pictures of either.
    """
    borders = [offset // patch for offset in offsets]
    others = [phase for phase in range(period // patch) if phase not in borders]
    found = []
    for border in borders:
        ratios, resampled = [], []
        for seed, energy in enumerate((generated, real)):
            kinds, _ = comparable_kinds(np.stack(energy).sum(axis=1), border, others)
            if len(kinds) < 2:
                which = ("generated", "real")[seed]
                raise ValueError(f"There are fewer than 2 {which} pictures with gradients to compare; give more.")
            pooled = kinds.sum(axis=0)
            ratios.append(pooled[0, 0] / pooled[0, 1] / (pooled[1, 0] / pooled[1, 1]))
            resampled.append(resampled_ratios(kinds, seed))
        with np.errstate(divide="ignore", invalid="ignore"):
            over = resampled[0] / resampled[1]
        over[np.isnan(over)] = np.inf
        found.append({"ratio": float(ratios[0] / ratios[1]), "interval": _interval(over)})
    return found


def score_seams(
    folder: str | Path, period: int, patch: int, offsets: Sequence[int] = (0,), real: str | Path | None = None
) -> list[dict[str, Any]]:
    """Records of the seams of a folder's pictures; several processes of accelerate each read a part.

    Args:
        real: a folder of pictures without seams, for "seams_to_real" as well.

    Returns:
        for each offset a record of "seams" (what `seam_ratio` calls "together", with all that it returns under
        "detail"), and with `real` one of "seams_to_real". An interval without an upper bound is None in the record.

    Raises:
        ValueError: as `seam_ratio`, and where a picture cannot be read.
    """
    check_grid(period, patch, offsets)
    energy, pictures = energies_of_folder(folder, period, patch)
    generation = read_generation(folder)
    measured = compare_offsets(energy, period, patch, offsets)["offsets"]
    records = []
    for each in measured:
        common = {"settings": {"period": period, "patch": patch, "offset": each["offset"]}, "generation": generation}
        records.append(seam_record("seams", each["together"], generated=pictures, detail=each, **common))
    if real is None:
        return records
    real_energy, real_pictures = energies_of_folder(real, period, patch)
    try:
        compare_offsets(real_energy, period, patch, offsets)  # which says what is wrong with them
    except ValueError as error:
        raise ValueError(f"Of the real pictures in {str(real)!r}: {error}") from error
    for each, one in zip(records[:], against_real(energy, real_energy, period, patch, offsets), strict=True):
        common = {"settings": each["settings"], "generation": generation}
        records.append(seam_record("seams_to_real", one, generated=pictures, real=real_pictures, **common))
    return records


def seam_record(metric: str, measured: dict, **more: Any) -> dict[str, Any]:
    interval = measured["interval"]
    return make_record(metric, measured["ratio"], None if interval is None or None in interval else interval, **more)


def energies_of_folder(folder: str | Path, period: int, patch: int) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The `energies` of each picture of a folder, and what a record tells of them."""
    paths = list_images(folder)
    own = own_pictures(paths, f"seams of {folder}")
    found = gathered([(energies(picture, period, patch), picture.size) for picture in own])
    return [energy for energy, _ in found], about_pictures(folder, paths, [size for _, size in found])


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m localdit.evaluation seams", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with pictures")
    parser.add_argument("--period", type=counting_to(LARGEST), required=True, help="pixels along one side of a window")
    parser.add_argument("--patch", type=counting_to(LARGEST), required=True, help="pixels along one side of a token")
    parser.add_argument(
        "--offset", type=int, action="append", help="where windows start, in pixels; once for each shift; by default 0"
    )
    parser.add_argument("--real", type=Path, help="folder of real pictures, whose own ratio is divided by")
    parser.add_argument("--output", help=f"by default {FILE} beside the folder; lines are added")
    options = parser.parse_args(arguments)
    start_process("cpu")
    output = scores_file(options.folder, options.output)
    offsets = tuple(dict.fromkeys(options.offset or (0,)))
    records = score_seams(options.folder, options.period, options.patch, offsets, options.real)
    keep(records, output, command_of(parser, arguments))
