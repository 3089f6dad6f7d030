"""Vision Transformers (Dosovitskiy et al. 2021) in the form of timm and DeiT (Touvron et al. 2021).

They support what the checkpoints of that family use: a class token or an average over the patches, a distillation
token, register tokens (Darcet et al. 2024), LayerScale, SwiGLU, and images of any size, for which the position
embedding is interpolated.
"""

from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cskd_jax.models.layers import scale_width
from cskd_jax.models.outputs import ModelOutput, TokenGrid
from cskd_jax.models.settings import Setting
from cskd_jax.models.transformer_layers import (
    MLP,
    Attention,
    Block,
    Dropout,
    LayerNorm,
    LayerScale,
    PatchEmbedding,
    StochasticDepth,
)

# timm initializes the weights of linear layers, the position embedding and the distillation token like this, and the
# other tokens almost as zeros. It cuts the distribution off at 2, which is a hundred standard deviations.
_linear_init = nn.initializers.normal(0.02)
_token_init = nn.initializers.normal(1e-6)
# Number of blocks that a description of a network may have; the deepest published ones have fewer than 100.
MAX_DEPTH = 200


class VisionTransformer(nn.Module):
    """Vision Transformer: patches as tokens, blocks of attention and MLP, and a linear classifier.

    `features` are the tokens [B, T, D] after each stage; the stages are equal parts of the blocks. The features of the
    last stage are normalized, as they enter the pooling. `stages` are the same before that normalization, and `stem` is
    the input of the first block. Class, distillation and register tokens come first, in this order; `grid` says where
    the patches are.

    Attributes:
      num_classes: Number of classes; 0 leaves the head out, and then the logits are the embedding.
      embed_dim: Size of a token at width 1.
      num_heads: Number of heads of the attention.
      depth: Number of blocks.
      width: Factor on the size of a token.
      patch_size: Side of a patch.
      image_size: (height, width) of the images that the position embedding is for; it is interpolated for other sizes.
        None allows only one size, that of the first images.
      pool: Whether the head gets the class token or the average of the patches.
      class_token: Whether there is a class token.
      distillation_token: Whether there is a distillation token with its own head; the logits are then the mean of both
        heads, and `head_logits` are the logits of the class token and of the distillation token.
      register_tokens: Number of register tokens.
      position_tokens: Tokens besides the patches that have a position embedding: all, all but the registers ("class"),
        or none.
      layer_scale: Initial factors of LayerScale; None leaves it out.
      mlp: Kind of the MLP (see `MLP`).
      mlp_ratio: Number of outputs of the first layer of an MLP, as a multiple of the token size.
      mlp_norm: Whether an MLP has a normalization before its second layer.
      qkv_bias: Whether queries, keys and values have a bias.
      proj_bias: Whether the other linear layers of the blocks have a bias.
      patch_bias: Whether the embedding of the patches has a bias.
      qk_norm: Whether queries and keys are normalized.
      pre_norm: Whether tokens are normalized before the first block.
      last_norm: Whether the last normalization is applied to all tokens ("tokens") or to the pooled one ("pooled");
        None applies it to the pooled one for pool "average", as timm does.
      epsilon: Number added to the variances of the normalizations.
      dropout: Rate of dropout after the position embedding, the attention, and each layer of an MLP.
      stochastic_depth: Probability that the branches of the last block are dropped; it grows linearly from 0.
      num_stages: Largest number of stages.
      dtype: Dtype of the computation; parameters and logits are at least float32.
      axis_name: Name of the mapped axis over which the batch is split, for random draws; None on one device.
      draws_by_position: Whether random draws depend on the positions of images in the global batch, and therefore not
        on the number of devices.
    """

    num_classes: int
    embed_dim: int
    num_heads: int
    depth: int = 12
    width: float = 1.0
    patch_size: int = 16
    image_size: tuple[int, int] | None = None
    pool: Literal["token", "average"] = "token"
    class_token: bool = True
    distillation_token: bool = False
    register_tokens: int = 0
    position_tokens: Literal["all", "class", "none"] = "all"
    layer_scale: float | None = None
    mlp: Literal["gelu", "swiglu", "swiglu_split"] = "gelu"
    mlp_ratio: float = 4.0
    mlp_norm: bool = False
    qkv_bias: bool = True
    proj_bias: bool = True
    patch_bias: bool = True
    qk_norm: bool = False
    pre_norm: bool = False
    last_norm: Literal["tokens", "pooled"] | None = None
    epsilon: float = 1e-6
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    num_stages: int = 4
    dtype: Any = jnp.float32
    axis_name: str | None = None
    draws_by_position: ClassVar[bool] = True

    @property
    def token_size(self) -> int:
        """Returns the size of a token, a multiple of the number of heads."""
        return scale_width(self.embed_dim, self.width, self.num_heads)

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """Returns the rows and columns of patches that the position embedding is for; None to use the images'."""
        return None if self.image_size is None else self._grid(self.image_size)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> ModelOutput:
        """Maps normalized floating-point images [B, H, W, C] to a ModelOutput with tokens [B, T, D] for each stage."""
        if not self.class_token and (self.pool == "token" or self.distillation_token):
            raise ValueError("without a class token, pool must be average and distillation_token False")
        if self.distillation_token and self.pool != "token":
            raise ValueError("with a distillation token, pool must be token")
        param_dtype = np.promote_types(self.dtype, np.float32)
        norm = partial(LayerNorm, self.epsilon, self.dtype)
        x, grid = self._embed(images, param_dtype)
        dropout = partial(Dropout, self.dropout, axis_name=self.axis_name)
        x = dropout(name="dropout")(x, train=train)
        if self.pre_norm:
            x = norm(name="norm_pre")(x)
        stem, stages, block, factors = x, [], self._block(norm, dropout, param_dtype), None
        if train and self.stochastic_depth:
            factors = StochasticDepth(self.stochastic_depth, self.depth, self.axis_name)(len(x), x.dtype)
        for blocks in np.array_split(np.arange(self.depth), min(self.num_stages, self.depth)):
            for index in blocks.tolist():
                own = None if factors is None else factors[:, index]
                x = block(name=f"block{index + 1}")(x, own, train=train)
            stages.append(x)
        last_norm = self.last_norm or ("pooled" if self.pool == "average" else "tokens")
        if last_norm == "tokens":
            x = norm(name="norm")(x)
        embedding = x[:, 0] if self.pool == "token" else jnp.mean(x[:, grid.first :], axis=1)
        if last_norm == "pooled":
            embedding = norm(name="fc_norm")(embedding)
        logits, heads = self._classify("classifier", embedding, param_dtype), ()
        if self.distillation_token:
            heads = logits, self._classify("distillation_classifier", x[:, 1], param_dtype)
            logits = (heads[0] + heads[1]) / 2
        return ModelOutput(logits, (*stages[:-1], x), embedding, maps=(stem, *stages), grid=grid, head_logits=heads)

    def _embed(self, images, dtype):
        """Returns (tokens [B, T, D] with position embedding, TokenGrid)."""
        rows, columns = self._grid(images.shape[1:3])
        size, count = self.token_size, rows * columns
        patches = PatchEmbedding(size, self.patch_size, self.patch_bias, self.dtype, name="patch_embed")(images)
        first = []
        if self.class_token:
            first.append(self.param("cls_token", _token_init, (1, 1, size), dtype))
        if self.distillation_token:
            first.append(self.param("dist_token", _linear_init, (1, 1, size), dtype))
        embedded = {"all": len(first) + self.register_tokens, "class": len(first), "none": 0}[self.position_tokens]
        if self.register_tokens:
            first.append(self.param("reg_token", _token_init, (1, self.register_tokens, size), dtype))
        own_rows, own_columns = self.grid_size or (rows, columns)
        position = self.param("pos_embed", _linear_init, (1, embedded + own_rows * own_columns, size), dtype)
        if (own_rows, own_columns) != (rows, columns):
            old = position[:, embedded:].reshape(1, own_rows, own_columns, size)
            # This is torch's bicubic interpolation with antialiasing, as timm applies it.
            new = jax.image.resize(old, (1, rows, columns, size), "cubic").reshape(1, count, size)
            position = jnp.concatenate([position[:, :embedded], new], axis=1)
        tokens = [
            *(jnp.broadcast_to(token, (images.shape[0], *token.shape[1:])).astype(self.dtype) for token in first),
            patches.reshape(images.shape[0], count, size),
        ]
        x, missing = jnp.concatenate(tokens, axis=1), sum(token.shape[1] for token in first) - embedded
        # Registers follow the embedded tokens; there are none of those if not even the class token is embedded.
        gap = jnp.zeros((1, missing, size), dtype)
        position = jnp.concatenate([position[:, :embedded], gap, position[:, embedded:]], axis=1)
        return x + position.astype(self.dtype), TokenGrid(embedded + missing, rows, columns)

    def _grid(self, image_size):
        if any(side % self.patch_size or not side for side in image_size):
            height, width = image_size
            raise ValueError(
                f"images of {height}x{width} cannot be divided into patches of {self.patch_size}x{self.patch_size}; "
                "set patch_size to a divisor of their sides"
            )
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    def _block(self, norm, dropout, param_dtype):
        """Returns a function that constructs a block from its name."""
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=param_dtype, kernel_init=_linear_init)
        hidden = round(self.token_size * self.mlp_ratio)
        # Jitted so that identical blocks are traced and lowered once.
        return partial(
            nn.jit(Block, static_argnames=("train",)),
            partial(Attention, self.num_heads, dense, norm, self.qkv_bias, self.proj_bias, self.qk_norm),
            partial(MLP, self.mlp, hidden, dense, norm, self.mlp_norm, self.proj_bias, dropout),
            norm,
            dropout,
            scale=None if self.layer_scale is None else partial(LayerScale, self.layer_scale, self.dtype),
        )

    def _classify(self, name, x, dtype):
        x = x.astype(dtype)
        if not self.num_classes:
            return x
        return nn.Dense(self.num_classes, dtype=dtype, param_dtype=dtype, kernel_init=_linear_init, name=name)(x)


def _is_count(low, high):
    return Setting((int,), lambda value: low <= value <= high, f"an integer from {low} to {high}")


def _is_one_of(*values):
    return Setting((str,), lambda value: value in values, "one of " + ", ".join(values))


_IS_BOOL = Setting((bool,), lambda value: True, "true or false")
_IS_RATE = Setting((float, int), lambda value: 0 <= value < 1, "a number in [0, 1)")
_IS_SCALE = Setting((float, int), lambda value: 0 < value <= 1e6, "a number greater than 0, up to 1000000")
_IS_SIZE = Setting(
    (tuple,),
    lambda value: len(value) == 2 and all(type(side) is int and 0 < side <= 10**5 for side in value),
    "(height, width) in pixels",
)

# The fields of a network that may differ from those in the table; checkpoints store them, and configurations set some.
VISION_TRANSFORMER_SETTINGS = {
    "patch_size": _is_count(1, 1024),
    "image_size": _IS_SIZE,
    "depth": _is_count(1, MAX_DEPTH),
    "num_heads": _is_count(1, 1024),
    "pool": _is_one_of("token", "average"),
    "class_token": _IS_BOOL,
    "distillation_token": _IS_BOOL,
    "register_tokens": _is_count(0, 1024),
    "position_tokens": _is_one_of("all", "class", "none"),
    "layer_scale": _IS_SCALE,
    "mlp": _is_one_of("gelu", "swiglu", "swiglu_split"),
    "mlp_ratio": _IS_SCALE,
    "mlp_norm": _IS_BOOL,
    "qkv_bias": _IS_BOOL,
    "proj_bias": _IS_BOOL,
    "patch_bias": _IS_BOOL,
    "qk_norm": _IS_BOOL,
    "pre_norm": _IS_BOOL,
    "last_norm": _is_one_of("tokens", "pooled"),
    "epsilon": _IS_SCALE,
    "dropout": _IS_RATE,
    "stochastic_depth": _IS_RATE,
}

VISION_TRANSFORMERS = {
    "deit_tiny": partial(VisionTransformer, embed_dim=192, num_heads=3),
    "deit_small": partial(VisionTransformer, embed_dim=384, num_heads=6),
    "deit_base": partial(VisionTransformer, embed_dim=768, num_heads=12),
}
