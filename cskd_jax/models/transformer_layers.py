"""Layers of Vision Transformers, and random draws that do not depend on the number of devices."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from cskd_jax.models.layers import torch_kernel, torch_uniform


def draw_by_position(key: jax.Array, draw: Callable, size: int, axis_name: str | None) -> jax.Array:
    """Returns a random draw for each image that does not depend on the number of devices.

    Args:
      key: Key, the same on all devices.
      draw: Function from a key to the draw of one image.
      size: Number of images of this device.
      axis_name: Name of the mapped axis over which the batch is split; None on one device.
    """
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * size
    positions = offset + jnp.arange(size, dtype=jnp.int32)
    return jax.vmap(lambda position: draw(jax.random.fold_in(key, position)))(positions)


class Dropout(nn.Module):
    """Dropout with draws that depend on the position of an image in the global batch.

    Attributes:
      rate: Probability of a zero; the remaining values are divided by 1 - rate.
      axis_name: Name of the mapped axis over which the batch is split; None on one device.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns x [B, ...] with zeros in training, and x itself otherwise."""
        if not train or self.rate == 0:
            return x

        def draw(key):
            return jax.random.bernoulli(key, 1 - self.rate, x.shape[1:])

        keep = draw_by_position(self.make_rng("dropout"), draw, len(x), self.axis_name)
        return jnp.where(keep, x / (1 - self.rate), 0)


class StochasticDepth(nn.Module):
    """The draws of stochastic depth (Huang et al. 2016), one for each branch of each block and each image.

    All are drawn at once, because each random draw takes long to compile.

    Attributes:
      rate: Probability that the branches of the last block are dropped; it grows linearly from 0.
      depth: Number of blocks.
      axis_name: Name of the mapped axis over which the batch is split; None on one device.
    """

    rate: float
    depth: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, size: int, dtype: Any) -> jax.Array:
        """Returns factors [size, depth, 2] for the branches: 0, or the value that preserves the mean."""
        keep = 1 - self.rate * np.arange(self.depth)[:, None] / max(self.depth - 1, 1)

        def draw(key):
            return jax.random.uniform(key, (self.depth, 2), jnp.float32) < jnp.asarray(keep, jnp.float32)

        drawn = draw_by_position(self.make_rng("dropout"), draw, size, self.axis_name)
        return jnp.where(drawn, jnp.asarray(1 / keep, dtype), 0)


class LayerNorm(nn.Module):
    """Normalization of the last axis; mean and variance are computed in at least float32.

    Attributes:
      epsilon: Number added to the variance.
      dtype: Dtype of the computation.
    """

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x [..., D]."""
        dtype = np.promote_types(self.dtype, np.float32)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], dtype)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], dtype)
        x = x.astype(dtype)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale + bias).astype(self.dtype)


class PatchEmbedding(nn.Module):
    """A linear map of non-overlapping square patches.

    Attributes:
      features: Size of a token.
      patch_size: Side of a patch.
      use_bias: Whether a bias is added.
      dtype: Dtype of the computation.
    """

    features: int
    patch_size: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images [B, H, W, C] to [B, H / patch_size, W / patch_size, features]."""
        shape = (self.patch_size, self.patch_size, images.shape[-1], self.features)
        dtype = np.promote_types(self.dtype, np.float32)
        # timm keeps the default initialization of torch.nn.Conv2d.
        kernel = self.param("kernel", torch_kernel, shape, dtype)
        batch, height, width, channels = images.shape
        rows, columns = height // self.patch_size, width // self.patch_size
        x = images.astype(self.dtype).reshape(batch, rows, self.patch_size, columns, self.patch_size, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
        x = x @ kernel.astype(self.dtype).reshape(-1, self.features)
        if self.use_bias:
            init = torch_uniform(math.prod(shape[:-1]))
            x += self.param("bias", init, (self.features,), dtype).astype(self.dtype)
        return x


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al. 2021b).

    Attributes:
      initial: Initial value of every factor.
      dtype: Dtype of the computation.
    """

    initial: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales x [..., D]."""
        init = nn.initializers.constant(self.initial)
        return x * self.param("gamma", init, x.shape[-1:], np.promote_types(self.dtype, np.float32)).astype(self.dtype)


class Attention(nn.Module):
    """Multi-head self-attention; the softmax is computed in at least float32.

    Attributes:
      num_heads: Number of heads, which divides the size of a token.
      dense: Constructor of linear layers.
      norm: Constructor of layer normalizations.
      qkv_bias: Whether queries, keys and values have a bias.
      proj_bias: Whether the output has a bias.
      qk_norm: Whether queries and keys are normalized in each head.
    """

    num_heads: int
    dense: Any
    norm: Any
    qkv_bias: bool
    proj_bias: bool
    qk_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens [B, T, D] to [B, T, D]."""
        batch, length, size = x.shape
        qkv = self.dense(3 * size, use_bias=self.qkv_bias, name="qkv")(x)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, size // self.num_heads)
        query, key, value = (qkv[:, :, part] for part in range(3))
        if self.qk_norm:
            query, key = self.norm(name="q_norm")(query), self.norm(name="k_norm")(key)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
        shares = jax.nn.softmax(scores.astype(np.promote_types(x.dtype, np.float32))).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", shares, value).reshape(x.shape)
        return self.dense(size, use_bias=self.proj_bias, name="proj")(mixed)


class MLP(nn.Module):
    """Two linear layers with a GELU in between, or a SwiGLU (Shazeer 2020).

    Attributes:
      kind: "gelu"; "swiglu", whose first layer holds the gate and the value in one matrix, as in DINOv2; or
        "swiglu_split", which holds them in two.
      hidden: Number of outputs of the first layer, gate and value together for "swiglu".
      dense: Constructor of linear layers.
      norm: Constructor of layer normalizations.
      use_norm: Whether the input of the second layer is normalized.
      use_bias: Whether the second layer has a bias.
      dropout: Constructor of dropout after each of the two layers.
    """

    kind: str
    hidden: int
    dense: Any
    norm: Any
    use_norm: bool
    use_bias: bool
    dropout: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps tokens [B, T, D] to [B, T, D]."""
        size = x.shape[-1]
        if self.kind == "swiglu_split":
            gate = self.dense(self.hidden, use_bias=self.use_bias, name="fc1_g")(x)
            x = nn.silu(gate) * self.dense(self.hidden, use_bias=self.use_bias, name="fc1_x")(x)
        else:
            x = self.dense(self.hidden, use_bias=self.use_bias, name="fc1")(x)
            if self.kind == "swiglu":
                gate, x = jnp.split(x, 2, axis=-1)
                x = nn.silu(gate) * x
            else:
                x = nn.gelu(x, approximate=False)
        x = self.dropout(name="dropout1")(x, train=train)
        if self.use_norm:
            x = self.norm(name="norm")(x)
        x = self.dense(size, use_bias=self.use_bias, name="fc2")(x)
        return self.dropout(name="dropout2")(x, train=train)


class Block(nn.Module):
    """Attention and an MLP, each with a normalization before it and a shortcut around it.

    Attributes:
      attention: Constructor of the attention.
      mlp: Constructor of the MLP.
      norm: Constructor of layer normalizations.
      dropout: Constructor of dropout after the attention.
      scale: Constructor of LayerScale; None leaves it out.
    """

    attention: Any
    mlp: Any
    norm: Any
    dropout: Any
    scale: Any

    @nn.compact
    def __call__(self, x: jax.Array, factors: jax.Array | None, *, train: bool) -> jax.Array:
        """Maps tokens [B, T, D] to [B, T, D]; `factors` [B, 2] are those of stochastic depth."""

        def branch(y, number):
            y = y if self.scale is None else self.scale(name=f"ls{number}")(y)
            return y if factors is None else y * factors[:, number - 1, None, None]

        y = self.attention(name="attn")(self.norm(name="norm1")(x))
        x = x + branch(self.dropout(name="dropout")(y, train=train), 1)
        return x + branch(self.mlp(name="mlp")(self.norm(name="norm2")(x), train=train), 2)
