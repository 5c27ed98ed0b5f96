"""The judge of classes: known answers, and a ranking nobody would dispute."""

import numpy as np
import pytest

from localdit.data.labelled_images import load_labelled_images
from localdit.evaluation.class_judge import NEIGHBOURS, ClassJudge
from localdit.evaluation.distances import frechet_distance, neighbourhoods
from localdit.evaluation.intervals import rate_interval


@pytest.fixture(scope="module")
def judge() -> ClassJudge:
    images, labels, _ = load_labelled_images("sklearn_digits", "test")
    return ClassJudge(images, labels)


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    scale, shift = np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.0, -1.0])
    first = rng.standard_normal((200_000, 3))
    second = rng.standard_normal((200_000, 3)) * scale + shift
    assert frechet_distance(first, second) == pytest.approx((shift**2).sum() + ((scale - 1) ** 2).sum(), rel=0.02)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)


def test_precision_falls_with_pictures_off_the_manifold_and_recall_with_missing_ones():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((400, 2))
    far = real + 100
    half = real[real[:, 0] > 0] + 1e-6

    def precision_recall(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
        near = neighbourhoods(real, generated, NEIGHBOURS)
        return float(near["precision"].mean()), float(near["recall"].mean())

    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, far) == (0.0, 0.0)
    precision, recall = precision_recall(real, half)
    assert precision == 1.0 and 0.4 < recall < 0.7


def test_real_digits_score_as_real_and_damage_shows(judge):
    images, labels, _ = load_labelled_images("sklearn_digits", "train")
    real = judge.score(images, labels)
    assert real["accuracy"] > 0.97 and 0.9 < real["diversity"] < 1.1
    assert real["precision"] > 0.8 and real["recall"] > 0.8
    low, high = real["interval"]
    assert low < real["accuracy"] < high

    wrong = judge.score(images, (labels + 1) % 10)
    assert wrong["accuracy"] < 0.02
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 60, images.shape), 0, 255).astype(np.uint8)
    assert judge.score(noisy, labels)["distance"] > 3 * real["distance"]
    copies = np.stack([images[labels == label][0] for label in labels])
    same = judge.score(copies, labels)
    assert same["diversity"] < 0.01 and same["recall"] < 0.2


def test_the_interval_of_a_rate_narrows_with_the_number_of_cases():
    few, many = rate_interval(0.9, 20), rate_interval(0.9, 2000)
    assert few[0] < many[0] < 0.9 < many[1] < few[1]
    assert rate_interval(1.0, 50) == [1.0, 1.0]


def test_precision_and_recall_are_shares_within_the_third_neighbour(judge):
    images, labels, _ = load_labelled_images("sklearn_digits", "train")
    damaged = images[:99] + np.random.default_rng(0).normal(0, 60, images[:99].shape)
    drawn = damaged.clip(0, 255).astype(np.uint8)
    real, generated = judge.reference, judge.features(drawn)

    def share(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(manifold - row, axis=1))[3] for row in manifold]  # the nearest is itself
        return np.mean([(np.linalg.norm(manifold - point, axis=1) <= radii).any() for point in points])

    found = judge.score(drawn, labels[:99])
    assert found["precision"] == pytest.approx(share(generated, real))
    assert found["recall"] == pytest.approx(share(real, generated))


def test_what_the_judge_finds_is_written_with_intervals_and_by_whom(judge):
    images, labels, _ = load_labelled_images("sklearn_digits", "train")
    scores = judge.score(images[:200], labels[:200])
    told = {"name": "judge", "real": {"count": 9}, "generated": {"count": 200}, "generation": {"seed": 1}}
    records = {record["metric"]: record for record in judge.records(images[:200], labels[:200], **told)}
    names = {"class_accuracy": "accuracy", "fid": "distance", "class_diversity": "diversity"}
    for metric in ("class_accuracy", "fid", "precision", "recall", "class_diversity"):
        record = records[metric]
        low, high = record["interval"]
        assert record["value"] == pytest.approx(scores[names.get(metric, metric)])
        assert low <= record["value"] <= high
        assert record["extractor"]["sha256"] == judge.sha256 and record["generation"] == {"seed": 1}
    assert records["precision"]["settings"] == {"neighbours": 3} and "settings" not in records["fid"]
