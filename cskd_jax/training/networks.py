"""The networks of a run."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import ml_collections
from flax import linen as nn

from cskd_jax.distributed import devices
from cskd_jax.models import create_model

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of the run with the description that its checkpoints carry."""

    module: nn.Module
    name: str
    width: float

    @classmethod
    def create(cls, settings: ml_collections.ConfigDict, num_classes: int, dtype: str):
        """From `config.teacher` or `config.student`."""
        module = create_model(
            settings.name, num_classes=num_classes, width=settings.width, dtype=DTYPES[dtype], axis_name=devices.AXIS
        )
        return cls(module, settings.name, float(settings.width))

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be this network."""
        return {"name": self.name, "width": self.width}
