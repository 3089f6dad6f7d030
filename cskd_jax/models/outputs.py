"""The outputs that every network returns."""

import dataclasses
from typing import Any, NamedTuple

import jax


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """The positions of the patches of an image among its tokens [B, T, D].

    Attributes:
      first: Number of tokens before the patches, such as a class token.
      rows: Number of rows of patches.
      columns: Number of patches in a row; the patches of a row are consecutive.
    """

    first: int
    rows: int
    columns: int

    def to_map(self, tokens: jax.Array) -> jax.Array:
        """Returns the patch tokens as a map [B, rows, columns, D], leaving out the other tokens."""
        patches = tokens[:, self.first : self.first + self.rows * self.columns]
        return patches.reshape(len(tokens), self.rows, self.columns, tokens.shape[-1])


class ModelOutput(NamedTuple):
    """Outputs of a classification network; networks from elsewhere may leave out everything but the logits.

    Attributes:
      logits: Logits, [B, num_classes], at least float32.
      features: Maps after each stage, [B, H_l, W_l, D_l], first stage first, in the compute dtype; or the tokens
        [B, T, D] of a network with a `grid`.
      embedding: Input of the classifier, [B, D], in the compute dtype, such as the globally pooled last map.
      preactivations: Maps of `stages` before the last ReLU of each stage, in the compute dtype.
      maps: Map of the stem, then the map that each stage passes on to the next part of the network, in the compute
        dtype. They differ from `features` where a part between the stages belongs to neither of them, such as the
        normalization after a stage of a wide ResNet, or the head of MobileNet. Empty for networks that do not provide
        them.
      grid: Positions of the patches among the tokens; None for a network that outputs maps.
      head_logits: Logits of each head, whose mean is `logits`; empty for a network with one head.
      members: Outputs of each of several networks, as `ModelOutput`s, whose combination is `logits`; empty for a single
        network.
    """

    logits: jax.Array
    features: tuple[jax.Array, ...] = ()
    embedding: jax.Array | None = None
    preactivations: tuple[jax.Array, ...] = ()
    maps: tuple[jax.Array, ...] = ()
    grid: TokenGrid | None = None
    head_logits: tuple[jax.Array, ...] = ()
    members: tuple[Any, ...] = ()

    @property
    def stages(self) -> tuple[jax.Array, ...]:
        """Returns the map that each stage passes on, first stage first; `features` where `maps` is empty."""
        return self.maps[1:] or self.features

    @property
    def tokens(self) -> tuple[tuple[jax.Array, ...], TokenGrid | None]:
        """Returns the tokens of each stage and their grid; empty and None for a network that outputs maps."""
        return ((), None) if self.grid is None else (self.features, self.grid)

    @property
    def stem(self) -> jax.Array | None:
        """Returns the map of the stem, or None if the network does not provide it."""
        return self.maps[0] if self.maps else None
