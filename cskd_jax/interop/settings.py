"""Reads settings of a network from the tensors of a file, such as the patch size of a Vision Transformer."""

import math
import re
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from cskd_jax.models import VisionTransformer
from cskd_jax.models.vision_transformer import MAX_DEPTH, VISION_TRANSFORMER_SETTINGS

# Initial value of LayerScale in DINOv2. It cannot be read from a file, and only new weights depend on it.
_LAYER_SCALE = 1e-5


def read_settings(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Returns the settings of a network (see `models.settings_of`) as read from the tensors of a file.

    All settings but the number of heads of a Vision Transformer can be read; name and width are not.

    Args:
      module: Network constructed from its name and width.
      shapes: {name of the tensor in this package's exports: its shape in PyTorch}.
      image_size: (height, width) of the images that a position embedding is for; None if they are square.
    """
    patch, positions = shapes.get("patch_embed.proj.weight", ()), shapes.get("pos_embed", ())
    # Anything that is not such a Vision Transformer is left for the comparison with the network to report.
    if not isinstance(module, VisionTransformer) or len(patch) != 4 or len(positions) != 3 or not min(patch):
        return {}
    if "dist_token" in shapes and ("cls_token" not in shapes or "fc_norm.weight" in shapes):
        return {}
    tokens = sum(name in shapes for name in ("cls_token", "dist_token"))
    registers = shapes.get("reg_token", (1, 0, 0))
    settings: dict[str, Any] = {
        "patch_size": patch[-1],
        "depth": min(MAX_DEPTH, len({match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))})),
        "class_token": "cls_token" in shapes,
        "distillation_token": "dist_token" in shapes,
        "register_tokens": registers[1] if len(registers) == 3 else 0,
        "pool": "token" if "cls_token" in shapes and "fc_norm.weight" not in shapes else "average",
        "patch_bias": "patch_embed.proj.bias" in shapes,
        "pre_norm": "norm_pre.weight" in shapes,
        **_read_block({name.removeprefix("blocks.0."): shape for name, shape in shapes.items()}, patch[0]),
    }
    pooled = "fc_norm.weight" in shapes
    if pooled != (settings["pool"] == "average"):
        settings["last_norm"] = "pooled" if pooled else "tokens"
    if "blocks.0.ls1.gamma" in shapes:
        settings["layer_scale"] = module.layer_scale or _LAYER_SCALE
    grid = None if image_size is None else (image_size[0] // patch[-1], image_size[1] // patch[-1])
    found = _read_positions(positions[1], tokens, settings["register_tokens"], grid)
    if found is not None:
        settings["position_tokens"], (rows, columns) = found
        settings["image_size"] = (rows * patch[-1], columns * patch[-1])
    if not all(VISION_TRANSFORMER_SETTINGS[name].allows(value) for name, value in settings.items()):
        return {}
    return {name: value for name, value in settings.items() if value != getattr(module, name)}


def _read_block(shapes: Mapping[str, tuple[int, ...]], size: int) -> dict[str, Any]:
    """Returns the settings that can be read from the first block.

    Args:
      shapes: Shapes by the names within the block.
      size: Size of a token.
    """
    settings: dict[str, Any] = {
        "qkv_bias": "attn.qkv.bias" in shapes,
        "proj_bias": "attn.proj.bias" in shapes,
        "qk_norm": "attn.q_norm.weight" in shapes,
        "mlp_norm": "mlp.norm.weight" in shapes,
    }
    first = shapes.get("mlp.fc1_g.weight", shapes.get("mlp.fc1.weight", ()))
    second = shapes.get("mlp.fc2.weight", ())
    if len(first) == len(second) == 2 and first[0]:
        packed = "swiglu" if 2 * second[1] == first[0] else "gelu"
        settings["mlp"] = "swiglu_split" if "mlp.fc1_g.weight" in shapes else packed
        settings["mlp_ratio"] = first[0] / size
    return settings


def _read_positions(
    count: int, tokens: int, registers: int, grid: tuple[int, int] | None
) -> tuple[str, tuple[int, int]] | None:
    """Returns which tokens have a position, and the rows and columns of patches; None if no choice fits.

    Args:
      count: Number of positions.
      tokens: Number of class and distillation tokens.
      registers: Number of register tokens.
      grid: Rows and columns of patches that are tried before a square grid.
    """
    choices = {"all": tokens + registers, "class": tokens, "none": 0}
    for name, before in choices.items():
        if grid is not None and count - before == grid[0] * grid[1] > 0:
            return name, grid
    for name, before in choices.items():
        side = math.isqrt(max(count - before, 0))
        if side and side * side == count - before:
            return name, (side, side)
    return None
