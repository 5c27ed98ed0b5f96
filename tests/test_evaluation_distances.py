"""Distances between sets of features, against independent definitions and known answers."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from localdit.evaluation.distances import (
    cmmd,
    cubic_kernel,
    frechet_distance,
    inception_score,
    kernel_distance,
    mmd,
    neighbourhoods,
    pairwise,
    rounded_pairwise,
)

RNG = np.random.default_rng(0)


def features(count: int, dimension: int = 12, shift: float = 0.0) -> np.ndarray:
    mixing = np.random.default_rng(5).normal(size=(dimension, dimension))
    return RNG.normal(size=(count, dimension)) @ mixing + shift


def test_frechet_distance_is_what_scipys_matrix_root_gives():
    first, second = features(400), features(300, shift=0.3)
    covariances = [np.cov(rows, rowvar=False) for rows in (first, second)]
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum()
    expected += np.trace(sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_a_set_to_itself_moved_is_the_square_of_the_way():
    rows, way = features(500), np.linspace(-1, 1, 12)
    assert frechet_distance(rows, rows + way) == pytest.approx((way**2).sum(), rel=1e-6)
    assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_scaled_gaussians_has_its_closed_form():
    rows = features(500)
    expected = ((2 - 1) ** 2) * np.trace(np.cov(rows, rowvar=False))  # tr(4C + C - 2 * 2C), the means set to 0
    centred = rows - rows.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_samples_of_two_gaussians_is_near_its_closed_form():
    way, mixing = np.array([1.0, -0.5, 0.0, 2.0]), np.random.default_rng(3).normal(size=(4, 4))
    first, second = RNG.normal(size=(20_000, 4)), RNG.normal(size=(20_000, 4)) @ mixing + way
    covariance = mixing.T @ mixing
    expected = way @ way + np.trace(np.eye(4) + covariance - 2 * sqrtm(covariance).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=0.03)


def test_cmmd_is_its_papers_formula():
    first, second = features(70), features(50, shift=0.5)
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second))

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        return np.mean([[np.exp(-np.sum((one - other) ** 2) / (2 * 10.0**2)) for other in b] for one in a])

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(first, second) == pytest.approx(expected, rel=1e-6)
    assert cmmd(first, 3 * first) == pytest.approx(0, abs=1e-9)  # lengths do not count
    first[0] = 0  # as a network of ReLUs can have it
    assert np.isfinite(cmmd(first, second))


def test_kid_of_one_subset_of_everything_is_the_unbiased_formula():
    first, second = features(60), features(60, shift=0.5)
    expected = direct_unbiased(first, second)
    assert kernel_distance(first, second, subsets=3, subset_size=60) == pytest.approx(1000 * expected, rel=1e-9)
    once = np.ones((1, 60))
    assert mmd(first, second, cubic_kernel, once, once, unbiased=True) == pytest.approx(expected, rel=1e-9)


def direct_unbiased(first: np.ndarray, second: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    def within(rows: np.ndarray) -> float:
        return np.mean([kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j])

    return within(first) + within(second) - 2 * np.mean([kernel(a, b) for a in first for b in second])


def test_counted_rows_are_compared_as_if_they_were_there_so_often():
    first, second, rng = features(30), features(20, shift=0.5), np.random.default_rng(1)
    counts = rng.multinomial(30, np.full(30, 1 / 30)), rng.multinomial(20, np.full(20, 1 / 20))
    repeated = np.repeat(first, counts[0], axis=0), np.repeat(second, counts[1], axis=0)
    once = np.ones((1, 30)), np.ones((1, 20))
    weighed = mmd(first, second, cubic_kernel, *(each[None].astype(float) for each in counts), unbiased=False)
    np.testing.assert_allclose(weighed, mmd(*repeated, cubic_kernel, *once, unbiased=False), rtol=1e-9)


def test_rounded_distances_are_distances():
    first, second = features(30, 9), features(20, 9, shift=1.0)
    np.testing.assert_allclose(rounded_pairwise(first, second), pairwise(first, second), rtol=1e-6)


def test_kid_does_not_depend_on_the_order_of_the_rows():
    first, second = features(120), features(90, shift=0.2)
    shuffled = first[::-1].copy(), np.random.default_rng(2).permutation(second)
    assert kernel_distance(first, second, subset_size=40) == kernel_distance(*shuffled, subset_size=40)
    for rows in (*shuffled, first, second):
        rows[:, :10] = 0  # as ReLUs leave them, so that only the last columns tell rows apart
    assert kernel_distance(first, second, subset_size=40) == kernel_distance(*shuffled, subset_size=40)


def test_neighbourhoods_are_what_a_loop_finds():
    real, generated = features(40, 3), features(30, 3, shift=1.0)
    generated[:4], generated[20:] = real[:4], generated[20]  # pictures that are there twice, and often

    def reach(rows: np.ndarray) -> list[float]:
        return [sorted(np.linalg.norm(rows - row, axis=1))[5] for row in rows]

    mine, theirs = reach(real), reach(generated)
    between = [[np.linalg.norm(a - b) for b in generated] for a in real]
    found = neighbourhoods(real, generated)
    inside = [[between[i][j] <= mine[i] for j in range(30)] for i in range(40)]
    assert found["precision"].tolist() == [float(any(inside[i][j] for i in range(40))) for j in range(30)]
    assert found["density"].tolist() == [sum(inside[i][j] for i in range(40)) / 5 for j in range(30)]
    assert found["coverage"].tolist() == [float(any(row)) for row in inside]
    assert found["recall"].tolist() == [float(any(between[i][j] <= theirs[j] for j in range(30))) for i in range(40)]


def test_neighbourhoods_of_sets_that_are_far_apart_or_the_same():
    rows = features(50, 3)
    assert all(each.mean() == 0 for each in neighbourhoods(rows, rows + 100).values())
    same = neighbourhoods(rows, rows)
    assert [same[name].mean() for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert same["density"].mean() == pytest.approx(6 / 5)  # the picture itself and the five that its radius reaches


def test_one_picture_over_and_over_lies_among_its_copies_and_nowhere_else():
    one, other, rows = np.ones((9, 3)), np.full((7, 3), 2.0), features(50, 3)
    same = neighbourhoods(one, one[:7])
    assert [same[name].mean() for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert same["density"].mean() == pytest.approx(9 / 5)  # every real copy counts
    assert all(each.mean() == 0 for each in neighbourhoods(one, other).values())
    collapsed = neighbourhoods(rows, rows[:1].repeat(9, axis=0))
    distances = np.linalg.norm(rows - rows[0], axis=1)
    reached = distances <= np.sort(np.linalg.norm(rows[:, None] - rows, axis=2), axis=1)[:, 5]
    assert collapsed["precision"].mean() == 1
    assert collapsed["recall"].mean() == 1 / 50  # none but the picture itself
    assert collapsed["coverage"].mean() == reached.mean()
    assert collapsed["density"].mean() == pytest.approx(reached.sum() / 5)


def test_inception_score_is_one_for_no_opinion_and_the_number_of_classes_for_sure_ones():
    assert inception_score(np.zeros((20, 10))) == pytest.approx(1)
    assert inception_score(1000 * np.eye(10).repeat(3, axis=0)) == pytest.approx(10)
    never_the_last = np.float32(1000) * np.eye(10, dtype=np.float32)[:9]
    assert inception_score(never_the_last) == pytest.approx(9)
