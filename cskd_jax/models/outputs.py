"""The outputs that every network returns."""

from typing import NamedTuple

import jax


class ModelOutput(NamedTuple):
    """Outputs of a classification network, of which networks from elsewhere may leave out all but the logits.

    Attributes:
      logits: Logits, [B, num_classes], at least float32.
      features: Maps after each stage, [B, H_l, W_l, D_l], the first stage first, in the compute dtype.
      embedding: Globally pooled last map, the input of the classifier, [B, D], in the compute dtype.
      preactivations: Maps of `features` before the last ReLU of each stage, in the compute dtype.
    """

    logits: jax.Array
    features: tuple[jax.Array, ...] = ()
    embedding: jax.Array | None = None
    preactivations: tuple[jax.Array, ...] = ()
