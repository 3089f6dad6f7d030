"""What every network returns."""

from typing import NamedTuple

import jax


class ModelOutput(NamedTuple):
    """Outputs of a classification network. A network of one's own may leave out all but the logits.

    Attributes:
      logits: [B, num_classes], at least float32.
      features: The maps after each stage, [B, H_l, W_l, D_l], first stage first, in the compute dtype.
      embedding: [B, D], the globally pooled last map that the classifier reads, in the compute dtype.
      preactivations: The maps of `features` before the last ReLU of each stage, in the compute dtype.
    """

    logits: jax.Array
    features: tuple[jax.Array, ...] = ()
    embedding: jax.Array | None = None
    preactivations: tuple[jax.Array, ...] = ()
