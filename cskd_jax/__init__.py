"""Knowledge distillation via category structure, and the methods it is compared with, in JAX and Flax."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # Python looks for the module of `python -m cskd_jax.NAME`.
    from cskd_jax.commands import table

    table.check_module("".join(sys.orig_argv[-len(sys.argv) :][:1]).removeprefix("-m"))

if TYPE_CHECKING:
    from cskd_jax.data import ImageDataset
    from cskd_jax.data.augment import Normalize
    from cskd_jax.distillation import distill
    from cskd_jax.errors import DivergedError, InterruptedRun, UserError
    from cskd_jax.losses import LOSSES, LossInputs, Method
    from cskd_jax.models import MODELS, ModelOutput, create_model
    from cskd_jax.runs.api import LoadedRun, get_config, load_run, load_teacher, run
    from cskd_jax.training.adapters import FunctionNetwork, LinenNetwork
    from cskd_jax.training.callbacks import Callback, Console
    from cskd_jax.training.mixing import Mix
    from cskd_jax.training.networks import Network
    from cskd_jax.training.nnx_adapter import NnxNetwork
    from cskd_jax.training.phases import Phase
    from cskd_jax.training.teachers import Teacher
    from cskd_jax.training.trainer import Result, Student, Trainer

# Loaded on first use, because the commands and the processes that decode images need not import all of them.
_PUBLIC = {
    "cskd_jax.data": ("ImageDataset",),
    "cskd_jax.data.augment": ("Normalize",),
    "cskd_jax.distillation": ("distill",),
    "cskd_jax.errors": ("DivergedError", "InterruptedRun", "UserError"),
    "cskd_jax.losses": ("LOSSES", "LossInputs", "Method"),
    "cskd_jax.models": ("MODELS", "ModelOutput", "create_model"),
    "cskd_jax.runs.api": ("LoadedRun", "get_config", "load_run", "load_teacher", "run"),
    "cskd_jax.training.callbacks": ("Callback", "Console"),
    "cskd_jax.training.adapters": ("FunctionNetwork", "LinenNetwork"),
    "cskd_jax.training.mixing": ("Mix",),
    "cskd_jax.training.networks": ("Network",),
    "cskd_jax.training.nnx_adapter": ("NnxNetwork",),
    "cskd_jax.training.phases": ("Phase",),
    "cskd_jax.training.teachers": ("Teacher",),
    "cskd_jax.training.trainer": ("Result", "Student", "Trainer"),
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "LOSSES",
    "MODELS",
    "Callback",
    "Console",
    "DivergedError",
    "FunctionNetwork",
    "ImageDataset",
    "InterruptedRun",
    "LinenNetwork",
    "LoadedRun",
    "LossInputs",
    "Method",
    "Mix",
    "ModelOutput",
    "Network",
    "NnxNetwork",
    "Normalize",
    "Phase",
    "Result",
    "Student",
    "Teacher",
    "Trainer",
    "UserError",
    "create_model",
    "distill",
    "get_config",
    "load_run",
    "load_teacher",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
