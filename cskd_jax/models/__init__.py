"""Networks; `MODELS` is the table of the names that configurations may use."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cskd_jax.errors import UserError
from cskd_jax.models.inception import INCEPTIONS
from cskd_jax.models.mobilenet import MOBILENETS
from cskd_jax.models.outputs import ModelOutput
from cskd_jax.models.resnet import RESNETS, BasicBlock, Bottleneck, ResNet
from cskd_jax.models.shufflenet import SHUFFLENETS
from cskd_jax.models.vgg import VGGS
from cskd_jax.models.wide_resnet import WIDE_RESNETS

__all__ = ["MODELS", "BasicBlock", "Bottleneck", "ModelOutput", "ResNet", "count_parameters", "create_model"]

# {name: constructor that takes num_classes, width, dtype and axis_name}
MODELS = {**RESNETS, **WIDE_RESNETS, **VGGS, **MOBILENETS, **SHUFFLENETS, **INCEPTIONS}


def create_model(
    name: str, *, num_classes: int, width: float = 1.0, dtype: Any = jnp.float32, axis_name: str | None = None
) -> nn.Module:
    """Returns the network `name` of `MODELS`; raises UserError for a name that is not there."""
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}; known: {', '.join(sorted(MODELS))}")
    return MODELS[name](num_classes=num_classes, width=width, dtype=dtype, axis_name=axis_name)


def count_parameters(params: Any) -> int:
    """Returns the number of trainable scalars in a tree of arrays or ShapeDtypeStructs."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
