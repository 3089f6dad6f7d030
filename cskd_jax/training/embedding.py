"""Embeddings of images by a trained network, and how tight the classes are in them."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.spatial.distance import pdist

from cskd_jax.data.augment import Normalize
from cskd_jax.errors import UserError
from cskd_jax.training.networks import Network, Variables

_BATCH = 100
_LARGEST = 1e15


class Tightness(NamedTuple):
    """Distances between embeddings.

    Attributes:
      within: Mean distance of a sample from the center of its class.
      between: Mean distance between the centers of two classes.
    """

    within: float
    between: float

    @property
    def ratio(self) -> float:
        """Returns `within` divided by `between`: small if classes are tight and far apart.

        Raises:
          UserError: The centers of all classes are the same.
        """
        if not self.between:
            raise UserError("the network's embeddings of all classes have the same center, so they have no tightness")
        return self.within / self.between


def embed(network: Network, variables: Variables, normalize: Normalize, images: Any) -> np.ndarray:
    """Returns the embeddings of images in evaluation mode.

    Args:
      network: Network that outputs an embedding.
      variables: Its variables.
      normalize: Function from images to inputs of the network.
      images: Images, uint8 [N, H, W, C], or any object whose slices are such arrays.

    Returns:
      An array, float64 [N, D].

    Raises:
      UserError: The network does not output an embedding, or one that is not finite.
    """
    variables, embedded = jax.device_put(variables), []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        padded = np.pad(batch, [(0, _BATCH - len(batch)), (0, 0), (0, 0), (0, 0)])
        output = _apply(network, normalize, variables, padded)
        if output is None:
            raise UserError("the network returns no embedding")
        embedded.append(np.asarray(output, np.float64)[: len(batch)])
        # Sums of squares of larger numbers overflow in the float32 of scikit-learn.
        if not np.all(np.abs(embedded[-1]) < _LARGEST):
            raise UserError(f"the network's embedding holds a value that is not a finite number below {_LARGEST:g}")
    return np.concatenate(embedded)


@functools.partial(jax.jit, static_argnames=("network", "normalize"))
def _apply(network: Network, normalize: Normalize, variables: Any, images: jax.Array) -> Any:
    return network.apply(variables, normalize(images), train=False)[0].embedding


def tightness(embeddings: np.ndarray, labels: np.ndarray) -> Tightness:
    """Returns the tightness of embeddings [N, D] with labels int [N] of at least two classes."""
    present, index = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(present), embeddings.shape[1]))
    np.add.at(sums, index, embeddings)
    centers = sums / np.bincount(index)[:, None]
    within = np.linalg.norm(embeddings - centers[index], axis=1).mean()
    return Tightness(float(within), float(pdist(centers).mean()))
