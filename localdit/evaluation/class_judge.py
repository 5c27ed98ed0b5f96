"""Scores of pictures of classes: accuracy by an independent classifier, distance, precision, recall, diversity."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist, pdist
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from localdit.evaluation.distances import frechet_distance
from localdit.evaluation.intervals import rate_interval

NEIGHBOURS = 3  # of the manifold estimate, as in arXiv 1904.06991


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
        precision, recall = precision_recall(self.reference, features)
        return {
            "accuracy": float(right.mean()),
            "interval": rate_interval(float(right.mean()), len(right)),
            "distance": frechet_distance(self.reference, features),
            "precision": precision,
            "recall": recall,
            "diversity": spread(features, np.asarray(labels)) / spread(self.reference, self.labels),
        }


def precision_recall(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """The share of each set [N, D] that lies within a neighbour's distance of the other (arXiv 1904.06991)."""

    def covered(points: np.ndarray, manifold: np.ndarray) -> float:
        # the nearest is the point itself, at 0
        radii = np.partition(cdist(manifold, manifold), NEIGHBOURS, axis=1)[:, NEIGHBOURS]
        return float((cdist(points, manifold) <= radii).any(1).mean())

    return covered(generated, real), covered(real, generated)


def spread(features: np.ndarray, labels: np.ndarray) -> float:
    """The mean distance between two pictures of one class, over the classes."""
    return float(np.mean([pdist(features[labels == label]).mean() for label in np.unique(labels)]))


def _flat(images: np.ndarray) -> np.ndarray:
    """Pictures [N, ...], uint8 or float in [0, 1], as rows of numbers in [-1, 1]."""
    images = np.asarray(images)
    scale = 127.5 if images.dtype == np.uint8 else 0.5
    return images.reshape(len(images), -1).astype(np.float64) / scale - 1
