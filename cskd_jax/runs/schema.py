"""Validation of a configuration, before anything compiles: every error names the key, the value, what is allowed."""

import dataclasses
import difflib
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from flax import traverse_util
from ml_collections import config_dict

from cskd_jax.errors import UserError
from cskd_jax.losses import LOSSES
from cskd_jax.models import MODELS
from cskd_jax.training.objective import hyperparameters, needs_teacher


class Rule(NamedTuple):
    """What a value must be: an instance of `types` for which `test` holds; `allowed` says so in words."""

    types: tuple[type, ...]
    test: Callable[[Any], bool]
    allowed: str


def _integer(low: int, high: int = 10**6) -> Rule:
    return Rule((int,), lambda value: low <= value <= high, f"an integer from {low} to {high}")


def _one_of(*values: str) -> Rule:
    return Rule((str,), lambda value: value in values, "one of " + ", ".join(sorted(values)))


def _optional(rule: Rule) -> Rule:
    return Rule((*rule.types, type(None)), lambda value: value is None or rule.test(value), f"{rule.allowed}, or None")


_BOOL = Rule((bool,), lambda _: True, "True or False")
_TEXT = Rule((str,), bool, "a text")
_POSITIVE = Rule((float, int), lambda value: 0 < value < math.inf, "a number greater than 0")
_NOT_NEGATIVE = Rule((float, int), lambda value: 0 <= value < math.inf, "a number of at least 0")
_WIDTH = Rule((float, int), lambda value: 0 < value <= 64, "a number above 0, up to 64")
_FRACTION = Rule((float, int), lambda value: 0 <= value < 1, "a number in [0, 1)")
_CHANNELS = Rule(
    (tuple,),
    lambda value: value and all(isinstance(v, int | float) and math.isfinite(v) for v in value),
    "a tuple of finite numbers",
)
_DEVIATIONS = Rule((tuple,), lambda value: _CHANNELS.test(value) and min(value) > 0, "a tuple of numbers above 0")
_EPOCHS = Rule(
    (tuple,),
    lambda value: all(type(v) is int and 0 < v <= 10**6 for v in value) and list(value) == sorted(set(value)),
    "an increasing tuple of epochs up to 1000000",
)

# Every key of a configuration but those of `losses`.
RULES = {
    "method": _TEXT,
    "seed": _integer(0, 2**32 - 1),
    "batch_size": _integer(1),
    "drop_last": _BOOL,
    "epochs": _integer(1),
    "dtype": _one_of("float32", "bfloat16", "float64"),
    "log_every": _integer(1),
    "keep_checkpoints": _integer(1),
    "dataset.name": _TEXT,
    "dataset.data_dir": _optional(_TEXT),
    "dataset.path": _optional(_TEXT),
    "dataset.train_examples": _optional(_integer(1, 10**9)),
    "dataset.image_size": _optional(_integer(1, 4096)),
    "dataset.streaming": _optional(_BOOL),
    "dataset.workers": _optional(_integer(1, 1024)),
    "dataset.mean": _CHANNELS,
    "dataset.std": _DEVIATIONS,
    "sampler.name": _one_of("uniform", "balanced"),
    "sampler.samples_per_category": _integer(1),
    "augment.resize": _integer(0, 1024),
    "augment.crop_padding": _integer(0, 256),
    "augment.flip": _BOOL,
    "teacher.name": _optional(Rule((str,), lambda value: value in MODELS or not value, f"one of {', '.join(MODELS)}")),
    "teacher.width": _WIDTH,
    "teacher.checkpoint": _optional(_TEXT),
    "teacher.epochs": _integer(1),
    "student.name": _one_of(*MODELS),
    "student.width": _WIDTH,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.momentum": _FRACTION,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.milestones": _EPOCHS,
    "optimizer.decay_factor": _POSITIVE,
    "optimizer.restart_momentum": _BOOL,
}

# What makes no difference to the results: a run may be resumed with other values.
INDIFFERENT = ("dataset.streaming", "dataset.workers")

# The keys of every loss beside its hyper-parameters: the fields of `objective.Weight`.
WEIGHT_RULES = {
    "weight": _NOT_NEGATIVE,
    "start_epoch": _integer(0),
    "end_epoch": _optional(_integer(1)),
    "warmup_epochs": _integer(0),
}


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """{"a.b": value} for every leaf."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """`flatten` with values as JSON gives them back."""
    return json.loads(json.dumps(flatten(config)))


def restore(flat: dict[str, Any], source: str) -> ml_collections.ConfigDict:
    """The configuration that `plain` gave `flat` of; not validated.

    Args:
      flat: {"a.b": JSON value}.
      source: where it comes from, for the message.

    Raises:
      UserError: a key is not one of a configuration, or one is missing.
    """
    values = {}
    for key, value in flat.items():
        types = _types(key)
        if not types:
            raise UserError(f"{source} holds an unknown configuration key {key}")
        if value is None:
            # Not plain None: an override could not be converted to the right type.
            value = config_dict.placeholder(types[0])
        values[key] = tuple(value) if isinstance(value, list) else value
    missing = sorted(RULES.keys() - flat.keys())
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}: another version of cskd_jax wrote it")
    return ml_collections.ConfigDict(traverse_util.unflatten_dict(values, sep="."))


def _types(key: str) -> tuple[type, ...]:
    """What the value of a key may be; empty for a key that is none."""
    if not key.startswith("losses."):
        return RULES[key].types if key in RULES else ()
    _, name, setting = [*key.split("."), "", ""][:3]
    if name in LOSSES and setting in WEIGHT_RULES:
        return WEIGHT_RULES[setting].types
    if name in LOSSES and setting in hyperparameters(name):
        return _field_types(hyperparameters(name)[setting])
    return ()


def _field_types(field: dataclasses.Field) -> tuple[type, ...]:
    """The types of a hyper-parameter, None among them where it is optional."""
    return tuple(getattr(field.type, "__args__", None) or (field.type,))


def unknown_key(key: str, known: Any) -> UserError:
    """The error for a key that is not there, with what was probably meant."""
    loss = key.split(".")[1] if key.startswith("losses.") else ""
    present = sorted({k.split(".")[1] for k in known if k.startswith("losses.")})
    if loss in LOSSES and loss not in present:
        return UserError(f"{key}: this method has no {loss}, only {', '.join(present)}; see configs/methods.py")
    close = difflib.get_close_matches(key, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(known))}"
    return UserError(f"unknown configuration key {key}; {hint}")


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first thing that is wrong with a configuration taken by itself."""
    values = flatten(config)
    losses = config.get("losses")
    if not isinstance(losses, ml_collections.ConfigDict) or not losses:
        raise UserError(f"config.losses must name at least one of {', '.join(sorted(LOSSES))}")
    for key in values:
        if key not in RULES and not key.startswith("losses."):
            raise unknown_key(key, RULES)
    for key, rule in RULES.items():
        if key not in values:
            raise UserError(f"configuration key {key} is missing; it must be {rule.allowed}")
        _check(key, values[key], rule)
    for name, settings in losses.items():
        _validate_loss(name, settings)
    if config.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UserError("dtype is float64; it needs the environment variable JAX_ENABLE_X64=1")
    if needs_teacher(losses) and not config.teacher.name:
        raise UserError(
            f"method {config.method} needs a teacher: set teacher.name to one of {', '.join(sorted(MODELS))}"
        )
    if len(config.dataset.mean) != len(config.dataset.std):
        raise UserError(f"dataset.mean {config.dataset.mean} and dataset.std {config.dataset.std} differ in length")


def check_teacher_exists(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if the checkpoint of a given teacher is not there; asked only where it is read."""
    path = config.teacher.checkpoint
    if needs_teacher(config.losses) and path is not None and not pathlib.Path(path).expanduser().exists():
        raise UserError(f"teacher.checkpoint {path} does not exist")


def _validate_loss(name: str, settings: Any) -> None:
    if name not in LOSSES:
        raise unknown_key(f"losses.{name}", [f"losses.{known}" for known in LOSSES])
    if not isinstance(settings, ml_collections.ConfigDict) or "weight" not in settings:
        raise UserError(f"losses.{name} must have a weight")
    allowed = hyperparameters(name)
    for key, value in settings.items():
        path = f"losses.{name}.{key}"
        if key in WEIGHT_RULES:
            _check(path, value, WEIGHT_RULES[key])
        elif key not in allowed:
            raise unknown_key(path, [f"losses.{name}.{known}" for known in (*WEIGHT_RULES, *allowed)])
        else:
            annotation, types = allowed[key].type, _field_types(allowed[key])
            types += (int,) if float in types else ()
            wanted = getattr(annotation, "__name__", str(annotation)) if len(types) == 1 else str(annotation)
            _check(path, value, Rule(types, _is_sensible, f"of type {wanted}, a number finite and at least 0"))
    end, start = settings.get("end_epoch"), settings.get("start_epoch", 0)
    if end is not None and end <= start:
        raise UserError(f"losses.{name}.end_epoch is {end}; it must be more than start_epoch, {start}")


def _is_sensible(value):
    """No hyper-parameter of a loss is a negative or infinite number."""
    return not isinstance(value, int | float) or 0 <= value < math.inf


def _check(key: str, value: Any, rule: Rule) -> None:
    # bool is an int in Python, but never means a number here.
    right_type = isinstance(value, rule.types) and (not isinstance(value, bool) or bool in rule.types)
    if not right_type or not rule.test(value):
        raise UserError(f"{key} is {value!r}; it must be {rule.allowed}")
