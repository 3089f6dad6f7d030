"""How well classes can be told apart in the embedding of a network, whatever its own classifier says."""

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from cskd_jax.data import ImageDataset
from cskd_jax.data.augment import Normalize
from cskd_jax.errors import UserError
from cskd_jax.runs.build import TrainedNetwork
from cskd_jax.training.embedding import embed, tightness

# As in the evaluation of self-supervised networks (Wu et al. 2018, Caron et al. 2021).
NEIGHBORS, _TEMPERATURE = 20, 0.07
MEANING = (
    f"knn: vote of the {NEIGHBORS} training images with the nearest embedding by the cosine c, each with weight "
    f"exp(c / {_TEMPERATURE}); probe: logistic regression on standardized embeddings of the training images; top-1 on "
    "the test split; within: mean distance of a test image from the center of its class; between: mean distance "
    "between two such centers"
)


def check(dataset: ImageDataset) -> None:
    """Raises UserError unless `measure` can use a data set: images with one class each, training images included."""
    if dataset.multilabel:
        raise UserError("--embedding needs images with one class each")
    if dataset.unlabeled:
        raise UserError(
            "--embedding needs training images with labels: name a recipe that has them with --config, or a folder "
            "of classes with --config.dataset.path"
        )


def measure(trained: TrainedNetwork, dataset: ImageDataset, normalize: Normalize) -> dict[str, float]:
    """Returns how well the classes of the test split can be told apart.

    These are the top-1 accuracies of nearest neighbors, "knn", and of a linear probe, "probe", and the distances of
    `Tightness`, "within" and "between".

    Args:
      trained: Trained network.
      dataset: Data set that `check` accepts; its training split supplies the neighbors and trains the probe.
      normalize: Function from images to inputs of the network.

    Raises:
      UserError: The network does not output an embedding.
    """
    network, saved = trained
    splits = (dataset.train, dataset.test)
    train, test = (embed(network, saved.variables, normalize, split.images) for split in splits)
    return score(train, dataset.train.labels, test, dataset.test.labels)


def _weights(distances):
    return np.exp((1 - distances) / _TEMPERATURE)


def score(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> dict[str, float]:
    """Returns the values of `measure` for embeddings [N, D] and labels int [N] of both splits."""
    weights: Any = _weights
    neighbors = KNeighborsClassifier(min(NEIGHBORS, len(train)), metric="cosine", weights=weights)
    scaler = StandardScaler().fit(train)
    probe = LogisticRegression(max_iter=1000)
    # On a busy machine, threads wait a long time for each other.
    with threadpool_limits(1):
        neighbors.fit(train, train_labels)
        probe.fit(scaler.transform(train), train_labels)
        return {
            "knn": float(neighbors.score(test, test_labels)),
            "probe": float(probe.score(scaler.transform(test), test_labels)),
            **tightness(test, test_labels)._asdict(),
        }
