"""Networks that were trained on images with another normalization or size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cskd_jax.data.augment import Normalize
from cskd_jax.models import ModelOutput
from cskd_jax.training.networks import Network, Variables
from cskd_jax.training.wrapping import WrappingNetwork


class _Adapted(WrappingNetwork):
    """Base of a `Network` that changes images before passing them to another network."""

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """Returns fresh variables, and the outputs for two black images of shape [H, W, C]."""
        changed = jax.eval_shape(self._change, jax.ShapeDtypeStruct((2, *image_shape), jnp.float32))
        return self.network.init(key, changed.shape[1:])

    def apply(
        self, variables: Variables, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[ModelOutput, Variables]:
        """Returns the outputs for images [B, H, W, C] before the change, and the updated collections."""
        return self.network.apply(variables, self._change(images), train=train, key=key)

    def _change(self, images: jax.Array) -> jax.Array:
        """Returns the images in the form that the other network gets."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class RenormalizedNetwork(_Adapted):
    """A `Network` that takes images in one normalization and passes them to a network in another.

    Attributes:
      network: Network.
      given: Normalization of the images that this network takes.
      own: Normalization of the images that `network` was trained on.
    """

    given: Normalize
    own: Normalize

    def _change(self, images: jax.Array) -> jax.Array:
        given_mean, given_std, mean, std = (
            np.asarray(values, np.float64) for values in (self.given.mean, self.given.std, self.own.mean, self.own.std)
        )
        scale, shift = ((given_std / std).astype(images.dtype), ((given_mean - mean) / std).astype(images.dtype))
        return images * scale + shift


@dataclasses.dataclass(frozen=True)
class ResizedNetwork(_Adapted):
    """A `Network` that takes images of any size and passes them to a network as squares of one size.

    Images are resized by linear interpolation, with an antialiasing filter if they become smaller.

    Attributes:
      network: Network.
      size: Side of the squares, in pixels.
    """

    size: int

    def _change(self, images: jax.Array) -> jax.Array:
        return jax.image.resize(images, (len(images), self.size, self.size, images.shape[-1]), "linear")


def renormalize(network: Network, given: Normalize, own: Normalize | None) -> Network:
    """Returns a network that takes images in the normalization `given`; the same network if that is its own.

    Args:
      network: Network.
      given: Normalization of the images that it will get.
      own: Normalization of the images that it was trained on; None if it is unknown, in which case `given` is assumed.
    """
    if own is None or given.is_same(own):
        return network
    return RenormalizedNetwork(network, given, own)
