"""Distances between two sets of features, and what of one lies among the other."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

NEIGHBOURS = 5  # as in arXiv 2002.09797
SIGMA = 10.0  # CMMD's, arXiv 2401.09603
ROWS = 1024  # of a kernel matrix at a time

OfPairs = Callable[[np.ndarray, np.ndarray], np.ndarray]  # [N, D] and [M, D] to [N, M]


class Given(nn.Module):
    """Takes the place of torchmetrics' extractor, for features that are there already."""

    def __init__(self, dimension: int):
        super().__init__()
        self.num_features = dimension

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """The Frechet distance of Gaussians fitted to features [N, D] and [M, D], by torchmetrics (arXiv 1706.08500)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    # all features are here: another process has none to add
    metric = FrechetInceptionDistance(feature=Given(real.shape[1]), sync_on_compute=False)
    for values, is_real in ((real, True), (generated, False)):
        metric.update(torch.from_numpy(values).double(), real=is_real)
    return float(metric.compute())


def kernel_distance(real: np.ndarray, generated: np.ndarray, subsets: int = 100, subset_size: int = 1000) -> float:
    """KID x 1000: the mean over random subsets of the unbiased MMD² of a cubic kernel (arXiv 1801.01401).

    By torchmetrics. Subsets are as large as the smaller set, at most `subset_size`, and always the same, whatever the
    order of the rows.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(real), len(generated))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*Kernel Inception Distance.*")
        torch.manual_seed(0)
        metric = KernelInceptionDistance(
            feature=Given(real.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
        for values, is_real in ((real, True), (generated, False)):
            metric.update(torch.from_numpy(in_order(values)).double(), real=is_real)
        return 1000 * float(metric.compute()[0])


def in_order(values: np.ndarray) -> np.ndarray:
    """The rows [N, D] in an order that depends on them alone."""
    return values[np.lexsort(values[:, :64].T)]  # of ReLUs' features, a few can be 0 in many rows


def cubic_kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)³ of rows [N, D] and [M, D]: KID's."""
    return (first @ second.T / first.shape[1] + 1) ** 3


def gaussian_kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """exp(-|x - y|² / (2 sigma²)) of rows of unit length: CMMD's."""
    return np.exp((first @ second.T - 1) / SIGMA**2)


def unit_length(values: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of nothing but 0 stays."""
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(values.dtype).tiny)


def cmmd(real: np.ndarray, generated: np.ndarray) -> float:
    """CMMD: 1000 x the biased MMD² of a Gaussian kernel (sigma 10) on embeddings of unit length (arXiv 2401.09603)."""
    once = np.ones((1, len(real))), np.ones((1, len(generated)))
    return 1000 * float(mmd(unit_length(real), unit_length(generated), gaussian_kernel, *once, unbiased=False)[0])


def mmd(
    real: np.ndarray,
    generated: np.ndarray,
    kernel: OfPairs,
    real_counts: np.ndarray,
    generated_counts: np.ndarray,
    unbiased: bool,
) -> np.ndarray:
    """The squared maximum mean discrepancy, [R], of sets that hold each row as often as the counts [R, N], [R, M] say.

    Without bias a row is not compared with itself, however often it is there.
    """
    within = [
        within_mean(rows.astype(np.float64), kernel, counts, unbiased)
        for rows, counts in ((real, real_counts), (generated, generated_counts))
    ]
    between = weighed_sum(real.astype(np.float64), generated.astype(np.float64), kernel, real_counts, generated_counts)
    return sum(within) - 2 * between / (real_counts.sum(1) * generated_counts.sum(1))


def within_mean(rows: np.ndarray, kernel: OfPairs, counts: np.ndarray, unbiased: bool) -> np.ndarray:
    """The mean of the kernel over pairs of a set, [R]."""
    total, pairs = weighed_sum(rows, rows, kernel, counts, counts), counts.sum(1) ** 2
    if not unbiased:
        return total / pairs
    own = np.concatenate([np.diag(kernel(part, part)) for part in np.array_split(rows, max(1, len(rows) // ROWS))])
    with np.errstate(divide="ignore", invalid="ignore"):  # where one row is all there is, and has no pair
        return (total - counts**2 @ own) / (pairs - (counts**2).sum(1))


def weighed_sum(
    first: np.ndarray, second: np.ndarray, kernel: OfPairs, first_counts: np.ndarray, second_counts: np.ndarray
) -> np.ndarray:
    """The sum of the kernel over all pairs, each as often as the counts say, [R]; a part of the rows at a time."""
    total = np.zeros(len(first_counts))
    for start in range(0, len(first), ROWS):
        part = slice(start, start + ROWS)
        total += (first_counts[:, part] @ kernel(first[part], second) * second_counts).sum(1)
    return total


def neighbourhoods(
    real: np.ndarray, generated: np.ndarray, neighbours: int = NEIGHBOURS, distances: OfPairs | None = None
) -> dict[str, np.ndarray]:
    """Precision, recall, density and coverage (arXiv 1904.06991, 2002.09797), of each picture: their means are scores.

    A picture's neighbourhood reaches to the `neighbours`-th nearest of its own set, and holds what lies just as far
    (<=, as in arXiv 1904.06991, equation 1), so that a picture that is there six times over has its copies as
    neighbours.

    Args:
        distances: of all pairs of rows [N, D] and [M, D]; `pairwise` unless given.

    Returns:
        "precision" and "density" [M] of generated pictures, "recall" and "coverage" [N] of real ones.
    """
    measure = distances or pairwise
    real_radii, generated_radii = (radii(rows, neighbours, measure) for rows in (real, generated))
    recall, coverage = np.zeros(len(real), bool), np.zeros(len(real), bool)
    covering = np.zeros(len(generated))  # how many real neighbourhoods a generated picture lies in
    for start in range(0, len(real), ROWS):
        part = slice(start, start + ROWS)
        apart = measure(real[part], generated)
        inside = apart <= real_radii[part, None]
        covering += inside.sum(0)
        coverage[part] = inside.any(1)
        recall[part] = (apart <= generated_radii[None]).any(1)
    return {
        "precision": (covering > 0).astype(float),
        "recall": recall.astype(float),
        "density": covering / neighbours,
        "coverage": coverage.astype(float),
    }


def radii(rows: np.ndarray, neighbours: int, distances: OfPairs) -> np.ndarray:
    """The distance of each row to the `neighbours`-th nearest other one."""
    parts = [distances(rows[start : start + ROWS], rows) for start in range(0, len(rows), ROWS)]
    return np.concatenate([np.partition(part, neighbours, axis=1)[:, neighbours] for part in parts])  # 0 is itself


def pairwise(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Euclidean distances [N, M], of copies the same in every set."""
    from scipy.spatial.distance import cdist

    return cdist(first, second)


def rounded_pairwise(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Euclidean distances [N, M] by a product of matrices: many times faster, and not quite 0 for copies."""
    rows = [torch.from_numpy(values).double() for values in (first, second)]
    return torch.cdist(rows[0], rows[1], compute_mode="use_mm_for_euclid_dist").numpy()


def inception_score(logits: np.ndarray) -> float:
    """exp of the mean divergence of each picture's classes from those of all (arXiv 1606.03498), of logits [N, K]."""
    from scipy.special import rel_entr, softmax

    each = softmax(logits, axis=1)
    return float(np.exp(rel_entr(each, each.mean(0)).sum(1).mean()))
