"""Seams of windowed attention: whether pictures change more across window borders than across other patch borders."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from localdit.command_line import Parser
from localdit.evaluation.images import list_images, read_rgb, to_images
from localdit.evaluation.limits import counting_to

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
    _check_grid(period, patch, offsets)
    phases = period // patch
    borders = [offset // patch for offset in offsets]
    others = [phase for phase in range(phases) if phase not in borders]
    pictures = to_images(images) if isinstance(images, np.ndarray) else images
    luminances = (np.asarray(picture.convert("RGB")) @ LUMINANCE for picture in pictures)
    both = [(border_energy(pixels, patch, phases), border_energy(pixels.T, patch, phases)) for pixels in luminances]
    sums = np.array(both).reshape(-1, 2, 2, phases)  # picture, direction, energy and pixels, phase
    directions = {"columns": sums[:, 0], "rows": sums[:, 1], "together": sums.sum(axis=1)}

    measured = []
    for offset, border in zip(offsets, borders, strict=True):
        found = {name: compare(part, border, others, patch) for name, part in directions.items()}
        if found["together"] is None:
            raise ValueError(
                f"No picture of {len(sums)} has a gradient across window borders (period={period}, offset={offset}) "
                f"or the other patch borders; give pictures that are larger than {period} pixels "
                "and of more than one colour."
            )
        measured.append({"offset": offset, **found})
    return {"pictures": len(sums), "period": period, "patch": patch, "offsets": measured}


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
    kinds = np.stack([sums[..., border], sums[..., others].sum(axis=-1)], axis=1)  # [N, border or others, 2]
    comparable = (kinds[..., 1] > 0).all(axis=1) & (kinds[..., 0] > 0).any(axis=1)
    kinds = kinds[comparable]
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
        "interval": _interval(kinds),
        "pictures": len(kinds),
        "phases": relative,
        "highest": max(relative, key=relative.__getitem__),
        "rank": 1 + sum(value > relative[border * patch] for value in relative.values()),
    }


def _interval(kinds: np.ndarray) -> list[float | None] | None:
    """The 95% bootstrap interval of the ratio of pooled energies, from kinds [N, border or others, 2]."""
    count = len(kinds)
    if count == 1:
        return None
    rng = np.random.default_rng(0)
    resampled = np.stack([kinds[rng.integers(count, size=count)].sum(axis=0) for _ in range(RESAMPLES)])
    energy = resampled[..., 0] / resampled[..., 1]  # [RESAMPLES, border or others]
    with np.errstate(divide="ignore"):
        ratios = energy[:, 0] / energy[:, 1]
    # a resample whose other borders are all flat is infinite, so that quantiles must not interpolate
    ends = np.quantile(ratios, [0.025, 0.975], method="inverted_cdf")
    return [round(float(end), 4) if np.isfinite(end) else None for end in ends]


def _check_grid(period: int, patch: int, offsets: Sequence[int]) -> None:
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


def main(arguments: list[str]) -> None:
    """Run the command line, which prints the ratios as JSON."""
    parser = Parser(prog="python -m localdit.evaluation seams", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with pictures")
    parser.add_argument("--period", type=counting_to(LARGEST), required=True, help="pixels along one side of a window")
    parser.add_argument("--patch", type=counting_to(LARGEST), required=True, help="pixels along one side of a token")
    parser.add_argument(
        "--offset", type=int, action="append", help="where windows start, in pixels; once for each shift; by default 0"
    )
    options = parser.parse_args(arguments)
    images = (read_rgb(path) for path in list_images(options.folder))
    print(json.dumps(seam_ratio(images, options.period, options.patch, options.offset or (0,)), indent=2))
