"""Embeddings of images by a trained network."""

import functools
from typing import Any

import jax
import numpy as np

from cskd_jax.data.augment import Normalize
from cskd_jax.errors import UserError
from cskd_jax.training.networks import Network, Variables

_BATCH = 100
_LARGEST = 1e15


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
