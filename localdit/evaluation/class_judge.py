"""Scores of pictures of classes: accuracy by an independent classifier, distance, precision, recall, diversity."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import pdist
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from localdit.evaluation.distances import frechet_distance, neighbourhoods
from localdit.evaluation.intervals import rate_interval
from localdit.evaluation.records import make_record
from localdit.evaluation.scores import interval, resampled_frechet, resampled_neighbourhoods

NEIGHBOURS = 3  # of the manifold estimate, as in arXiv 1904.06991
NEIGHBOURLY = ("precision", "recall", "density", "coverage")
RESAMPLES = 50


class ClassJudge:
    """Knows the classes from a part of a set that no generator has seen, and compares pictures with that part.

    A support vector machine with radial basis functions says which class a picture shows. Distances are taken in the 64
    features of a small perceptron, both trained on the judge's part only. They mean something beside those of real
    pictures only (score what the generator was trained on).

    Args:
        images: uint8, or float in [0, 1], [N, height, width]: the judge's part, small and grey.
        labels: [N], the class of each.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        pixels = _flat(images)
        self.classifier = SVC(C=10, gamma="scale").fit(pixels, labels)
        self.perceptron = MLPClassifier((64,), max_iter=500, random_state=0).fit(pixels, labels)
        self.labels = np.asarray(labels)
        self.reference = self.features(images)

    def features(self, images: np.ndarray) -> np.ndarray:
        """The hidden layer of the perceptron, [N, 64]."""
        weight, bias = self.perceptron.coefs_[0], self.perceptron.intercepts_[0]
        return np.maximum(_flat(images) @ weight + bias, 0)

    def score(self, images: np.ndarray, labels: Sequence[int] | np.ndarray) -> dict:
        """Compare pictures [N, height, width] of the given classes with the judge's part.

        Returns:
            "accuracy" (with its 95% bootstrap "interval"), the Frechet "distance" of the features, "precision" and
            "recall" (arXiv 1904.06991), and "diversity": the mean distance between two pictures of one class over that
            of the judge's part, 1 where they vary as much.
        """
        right = self.classifier.predict(_flat(images)) == np.asarray(labels)
        features = self.features(images)
        near = neighbourhoods(self.reference, features, NEIGHBOURS)
        return {
            "accuracy": float(right.mean()),
            "interval": rate_interval(float(right.mean()), len(right)),
            "distance": frechet_distance(self.reference, features),
            "precision": float(near["precision"].mean()),
            "recall": float(near["recall"].mean()),
            "diversity": spread(features, np.asarray(labels)) / spread(self.reference, self.labels),
        }

    def records(self, images: np.ndarray, labels: Sequence[int] | np.ndarray, **told: Any) -> list[dict[str, Any]]:
        """What `score` finds, as records with an interval each, and density and coverage besides.

        The distance is called "fid", and accuracy and diversity "class_accuracy" and "class_diversity".

        Args:
            told: for the record, "generated", "real", "generation" and the "name" of the judge's part.
        """
        scores, features, labels = self.score(images, labels), self.features(images), np.asarray(labels)
        extractor = {
            "name": told.pop("name"),
            "family": "class judge",
            "sha256": self.sha256,
            "dimension": features.shape[1],
            "preprocessing": "grey, [-1, 1], as it is",
        }
        found = {
            "class_accuracy": (scores["accuracy"], scores["interval"]),
            "fid": (scores["distance"], resampled_frechet(self.reference, features, RESAMPLES)),
            **resampled_neighbourhoods(self.reference, features, RESAMPLES, NEIGHBOURS),
            "class_diversity": (scores["diversity"], self._resampled_diversity(features, labels)),
        }
        return [
            make_record(
                metric,
                value,
                within if isinstance(within, list) else interval(value, within, metric),
                extractor=extractor,
                **({"settings": {"neighbours": NEIGHBOURS}} if metric in NEIGHBOURLY else {}),
                **told,
            )
            for metric, (value, within) in found.items()
        ]

    def _resampled_diversity(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The diversity of pictures drawn anew with replacement from each class, [RESAMPLES]."""
        classes, rng = [np.flatnonzero(labels == label) for label in np.unique(labels)], np.random.default_rng(0)
        drawn = [np.concatenate([rng.choice(rows, len(rows)) for rows in classes]) for _ in range(RESAMPLES)]
        return np.array([spread(features[rows], labels[rows]) for rows in drawn]) / spread(self.reference, self.labels)

    @property
    def sha256(self) -> str:
        """Of what was learned."""
        whole = hashlib.sha256()
        learned = [*self.perceptron.coefs_, *self.perceptron.intercepts_, self.classifier.dual_coef_]
        for array in (*learned, self.classifier.support_vectors_):
            whole.update(np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()


def spread(features: np.ndarray, labels: np.ndarray) -> float:
    """The mean distance between two pictures of one class, over the classes."""
    return float(np.mean([pdist(features[labels == label]).mean() for label in np.unique(labels)]))


def _flat(images: np.ndarray) -> np.ndarray:
    """Pictures [N, ...], uint8 or float in [0, 1], as rows of numbers in [-1, 1]."""
    images = np.asarray(images)
    scale = 127.5 if images.dtype == np.uint8 else 0.5
    return images.reshape(len(images), -1).astype(np.float64) / scale - 1
