"""Exits from the stages of a Vision Transformer: patch merging, a few more blocks, and a classifier."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from cskd_jax.losses._connectors import Pointwise

# The constants of the OFA-KD authors: merging ends before a side has fewer patches than this.
_LEAST_SIDE = 7
_HEADS = 4
_MLP_RATIO = 4
_EPSILON = 1e-5
_initial = nn.initializers.truncated_normal(0.02)


class _LayerNorm(nn.Module):
    """Normalization of the last axis to mean 0 and variance 1, followed by a trained scale and offset."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., D]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], x.dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], x.dtype)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _EPSILON) * scale + bias


class _PatchMerging(nn.Module):
    """Merges every 2x2 square of patches: concatenates, normalizes and linearly maps them to the size of one patch.

    Attributes:
      has_activation: Whether a GELU follows.
    """

    has_activation: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps patches [B, rows, columns, D] to [B, rows / 2, columns / 2, D]."""
        size = x.shape[-1]
        # The left column of a square comes before the right one.
        x = jnp.concatenate([x[:, row::2, column::2] for column in range(2) for row in range(2)], axis=-1)
        x = Pointwise(size, kernel_init=_initial, name="reduction")(_LayerNorm(name="norm")(x))
        return nn.gelu(x, approximate=False) if self.has_activation else x


class _Block(nn.Module):
    """Four-head self-attention and an MLP, each with a normalization before it and a shortcut around it."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, D] to [B, T, D]."""
        x += self._attend(_LayerNorm(name="norm1")(x))
        hidden = Pointwise(_MLP_RATIO * x.shape[-1], use_bias=True, kernel_init=_initial, name="fc1")
        outer = Pointwise(x.shape[-1], use_bias=True, kernel_init=_initial, name="fc2")
        return x + outer(nn.gelu(hidden(_LayerNorm(name="norm2")(x)), approximate=False))

    def _attend(self, x):
        batch, length, size = x.shape
        qkv = Pointwise(3 * size, kernel_init=_initial, name="qkv")(x)
        query, key, value = jnp.moveaxis(qkv.reshape(batch, length, 3, _HEADS, size // _HEADS), 2, 0)
        shares = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", shares, value).reshape(x.shape)
        return Pointwise(size, use_bias=True, kernel_init=_initial, name="proj")(mixed)


class TokenExit(nn.Module):
    """A classifier of the tokens of a stage, as in OFA-KD (Hao et al. 2023).

    Squares of 2x2 patches are merged into one as long as each side keeps at least seven patches. All tokens then pass
    through blocks of a Vision Transformer; then the first token, or the mean of all where there are only patches, is
    classified.

    Attributes:
      num_classes: Number of classes.
      blocks: Number of blocks.
    """

    num_classes: int
    blocks: int

    @nn.compact
    def __call__(self, tokens: jax.Array, grid: Any) -> jax.Array:
        """Maps tokens [B, T, D], whose patches are arranged as `grid` says, to logits [B, num_classes].

        Raises:
          ValueError: The size D of a token is not divisible by four, or a side that is to be halved is odd.
        """
        size = tokens.shape[-1]
        if size % _HEADS:
            raise ValueError(
                f"the exits of ofa have {_HEADS} heads, but the token size {size} is not divisible by that"
            )
        tokens = tokens.astype(np.promote_types(tokens.dtype, np.float32))
        others, patches = tokens[:, : grid.first], grid.to_map(tokens)
        merges = max(int(math.log2(min(grid.rows, grid.columns) / _LEAST_SIDE)), 0)
        for number in range(merges):
            if patches.shape[1] % 2 or patches.shape[2] % 2:
                raise ValueError(f"the exits of ofa halve both sides of {patches.shape[1:3]} patches, but one is odd")
            has_activation = number == 0 or number < merges - 1
            patches = _PatchMerging(has_activation, name=f"merging{number + 1}")(patches)
        x = jnp.concatenate([others, patches.reshape(len(patches), -1, size)], axis=1)
        for number in range(self.blocks):
            x = _Block(name=f"block{number + 1}")(x)
        feature = x[:, 0] if grid.first else jnp.mean(x, axis=1)
        return Pointwise(self.num_classes, use_bias=True, kernel_init=_initial, name="classifier")(feature)
