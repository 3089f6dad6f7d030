"""The outputs that every network returns."""

import dataclasses
from typing import Any, NamedTuple

import jax


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """The places of the patches of an image among its tokens [B, T, D].

    Attributes:
      first: Number of tokens before those of the patches, such as a class token.
      rows: Number of rows of patches.
      columns: Number of patches in a row; the patches of a row follow each other.
    """

    first: int
    rows: int
    columns: int

    def to_map(self, tokens: jax.Array) -> jax.Array:
        """Returns the tokens of the patches as a map [B, rows, columns, D], without those of no patch."""
        patches = tokens[:, self.first : self.first + self.rows * self.columns]
        return patches.reshape(len(tokens), self.rows, self.columns, tokens.shape[-1])


class ModelOutput(NamedTuple):
    """Outputs of a classification network, of which networks from elsewhere may leave out all but the logits.

    Attributes:
      logits: Logits, [B, num_classes], at least float32.
      features: Maps after each stage, [B, H_l, W_l, D_l], the first stage first, in the compute dtype; or tokens
        [B, T, D] of a network with a `grid`.
      embedding: Input of the classifier, [B, D], in the compute dtype, such as the globally pooled last map.
      preactivations: Maps of `stages` before the last ReLU of each stage, in the compute dtype.
      maps: Map of the stem, then the map that each stage hands on to the next part of the network, in the compute
        dtype. They differ from `features` where a part between the stages belongs to neither of them, such as the
        normalization after a stage of a wide ResNet, or the head of MobileNet. Empty for networks that do not tell.
      grid: Where the patches are among the tokens; None for a network of maps.
      head_logits: Logits of each head, of which `logits` are the mean; empty for a network of one head.
      members: Outputs of each of several networks, `ModelOutput`s, of which `logits` are the combination; empty for a
        single network.
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
        """Returns the map that each stage hands on, the first stage first; `features` where `maps` is empty."""
        return self.maps[1:] or self.features

    @property
    def tokens(self) -> tuple[tuple[jax.Array, ...], TokenGrid | None]:
        """Returns the tokens of each stage and their grid; nothing and None of a network of maps."""
        return ((), None) if self.grid is None else (self.features, self.grid)

    @property
    def stem(self) -> jax.Array | None:
        """Returns the map of the stem, or None if the network does not tell."""
        return self.maps[0] if self.maps else None
