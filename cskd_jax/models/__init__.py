"""Networks; `MODELS` is the table of the names that configurations may use."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cskd_jax.errors import UserError, meant
from cskd_jax.models.description import Description, Model, Stage
from cskd_jax.models.inception import INCEPTIONS
from cskd_jax.models.mobilenet import MOBILENETS
from cskd_jax.models.outputs import ModelOutput, TokenGrid
from cskd_jax.models.resnet import RESNETS, BasicBlock, Bottleneck, ResNet
from cskd_jax.models.settings import Setting
from cskd_jax.models.shufflenet import SHUFFLENETS
from cskd_jax.models.vgg import VGGS
from cskd_jax.models.vision_transformer import VISION_TRANSFORMER_SETTINGS, VISION_TRANSFORMERS, VisionTransformer
from cskd_jax.models.wide_resnet import WIDE_RESNETS

__all__ = [
    "MODELS",
    "BasicBlock",
    "Bottleneck",
    "Description",
    "Model",
    "ModelOutput",
    "ResNet",
    "Stage",
    "TokenGrid",
    "VisionTransformer",
    "check_settings",
    "count_parameters",
    "create_model",
    "settings_of",
]

_SMALL = {**RESNETS, **WIDE_RESNETS, **VGGS, **MOBILENETS, **SHUFFLENETS, **INCEPTIONS}

# {name: constructor that takes num_classes, width, dtype and axis_name, and that describes the outputs of the network}
MODELS = {
    **{name: Model(made, *((224, 1000) if name.endswith("_224") else ())) for name, made in _SMALL.items()},
    **{name: Model(made, 224, 1000) for name, made in VISION_TRANSFORMERS.items()},
}


def settings_of(name: str) -> Mapping[str, Setting]:
    """Returns {name: `Setting`} of the settings that the network `name` has besides its width."""
    return VISION_TRANSFORMER_SETTINGS if name in VISION_TRANSFORMERS else {}


def check_settings(name: str, settings: Mapping[str, Any], source: str) -> None:
    """Raises UserError unless the network `name` of `MODELS` has these settings.

    Args:
      name: Name of the network.
      settings: {name: value} of its settings.
      source: Prefix of the names of the settings in the message, such as "student.".
    """
    known = settings_of(name)
    for key, value in settings.items():
        if key not in known:
            only = f"only {', '.join(known)}" if known else "nor any other"
            raise UserError(f"{source}{key} is {value!r}; {name} has no such setting, {only}")
        if not known[key].allows(value):
            raise UserError(f"{source}{key} is {value!r}; it must be {known[key].allowed}")


def create_model(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    dtype: Any = jnp.float32,
    axis_name: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Returns a network of `MODELS`.

    Args:
      name: Name of the network.
      num_classes: Number of classes; a Vision Transformer with 0 has no head.
      width: Factor on the number of channels.
      dtype: Dtype of the computation.
      axis_name: Name of the mapped axis over which the batch is split; None on one device.
      settings: Further settings of the network (see `settings_of`), such as {"patch_size": 4}.

    Raises:
      UserError: There is no such network, or it has no such setting.
    """
    if name not in MODELS:
        known = f"known: {', '.join(sorted(MODELS))}"
        raise UserError(f"unknown network {name!r}; {meant(name, MODELS) or known}")
    if not num_classes and name not in VISION_TRANSFORMERS:
        raise UserError(f"{name} needs a number of classes; only {', '.join(VISION_TRANSFORMERS)} may have no head")
    settings = settings or {}
    check_settings(name, settings, "")
    return MODELS[name](num_classes=num_classes, width=width, dtype=dtype, axis_name=axis_name, **settings)


def count_parameters(params: Any) -> int:
    """Returns the number of trainable scalars in a tree of arrays or ShapeDtypeStructs."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
