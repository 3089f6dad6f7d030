"""The outputs that every network returns."""

from typing import NamedTuple

import jax


class ModelOutput(NamedTuple):
    """Outputs of a classification network, of which networks from elsewhere may leave out all but the logits.

    Attributes:
      logits: Logits, [B, num_classes], at least float32.
      features: Maps after each stage, [B, H_l, W_l, D_l], the first stage first, in the compute dtype.
      embedding: Globally pooled last map, the input of the classifier, [B, D], in the compute dtype.
      preactivations: Maps of `stages` before the last ReLU of each stage, in the compute dtype.
      maps: Map of the stem, then the map that each stage hands on to the next part of the network, in the compute
        dtype. They differ from `features` where a part between the stages belongs to neither of them, such as the
        normalization after a stage of a wide ResNet, or the head of MobileNet. Empty for networks that do not tell.
    """

    logits: jax.Array
    features: tuple[jax.Array, ...] = ()
    embedding: jax.Array | None = None
    preactivations: tuple[jax.Array, ...] = ()
    maps: tuple[jax.Array, ...] = ()

    @property
    def stages(self) -> tuple[jax.Array, ...]:
        """Returns the map that each stage hands on, the first stage first; `features` where `maps` is empty."""
        return self.maps[1:] or self.features

    @property
    def stem(self) -> jax.Array | None:
        """Returns the map of the stem, or None if the network does not tell."""
        return self.maps[0] if self.maps else None
