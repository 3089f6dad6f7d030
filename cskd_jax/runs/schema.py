"""Configurations from the table of keys: filled with defaults, validated, saved, and read back."""

import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from flax import traverse_util
from ml_collections import config_dict

from cskd_jax.configs import networks
from cskd_jax.errors import UserError, close_to
from cskd_jax.files import full_path
from cskd_jax.inputs import is_number, is_text, read_json
from cskd_jax.losses import LOSSES
from cskd_jax.models import MODELS, check_settings
from cskd_jax.runs import keys
from cskd_jax.runs.keys import REQUIRED, Key
from cskd_jax.runs.loss_keys import LOSS_TEACHER, loss_keys, weight_keys
from cskd_jax.training import rules
from cskd_jax.training.objective import AVERAGE, Weight, needs_teacher


def find_key(path: str) -> Key | None:
    """Returns the key "a.b" or "losses.NAME.SETTING" of a configuration; None if there is no such key."""
    if not path.startswith("losses."):
        return keys.KEYS.get(path)
    _, name, setting = [*path.split(".", 2), "", ""][:3]
    return loss_keys(name).get(setting) if name in LOSSES else None


def defaults() -> ml_collections.ConfigDict:
    """Returns a configuration with the default of every key that has one."""
    return fill(ml_collections.ConfigDict())


def fill(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Adds the default of every key that a configuration lacks, and gives None and integers the type of their key.

    Losses that the configuration names get the defaults of their settings. Anything invalid is left for `validate` to
    report.

    Args:
      config: Configuration, which is changed in place.

    Returns:
      The same configuration.
    """
    with config.unlocked():
        for path, key in keys.KEYS.items():
            section, _, name = path.rpartition(".")
            if section and section not in config:
                config[section] = ml_collections.ConfigDict()
            _fill_key(config[section] if section else config, name, key)
        losses = config.get("losses")
        for name in losses if isinstance(losses, ml_collections.ConfigDict) else ():
            for setting, key in loss_keys(name).items() if name in LOSSES else ():
                _fill_key(losses[name], setting, key)
    return config


def _fill_key(section, name, key):
    if not isinstance(section, ml_collections.ConfigDict):
        return
    if name not in section:
        if key.default is not REQUIRED:
            section[name] = _typed(key.default, key)
        return
    value = dict(section.items(preserve_field_references=True))[name]
    if value is None or type(value) is int:  # Placeholders and references already have their types.
        with section.ignore_type():
            section[name] = _typed(value, key)


def _typed(value, key):
    """Returns a value with the type of its key, so that overrides are converted to that type."""
    kind = key.rule.types[0]
    if value is None:
        return config_dict.placeholder(kind)
    if key is LOSS_TEACHER and type(value) is int:
        return str(value)
    return float(value) if kind is float and type(value) is int else value


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns {"a.b": value} for every leaf of a configuration."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def with_values(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns a copy of a configuration with other values of some keys, {"a.b": value}."""
    changed = config.copy_and_resolve_references() if values else config
    changed.update_from_flattened_dict(values)
    return changed


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the same as `flatten`, with values as they are after a round trip through JSON."""
    return json.loads(json.dumps(flatten(config)))


def read_flat(path: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a config.json, in which every key has a value of its type.

    Raises:
      UserError: It is damaged, or the value of a key has another type.
    """
    flat = read_json(path)
    wrong = wrong_types(flat)
    if wrong:
        raise UserError(f"{path} is damaged: {wrong[0]} is {str(flat[wrong[0]])[:100]}")
    return flat


def wrong_types(flat: Mapping[str, Any]) -> list[str]:
    """Returns the known keys of {"a.b": JSON value} whose values have the wrong types; other keys are ignored."""
    return [path for path, value in flat.items() if (key := find_key(path)) and not _has_type(value, key)]


def _has_type(value, key):
    allowed = {list if kind is tuple else kind for kind in key.rule.types}
    if isinstance(value, list):
        return list in allowed and all(map(is_text if key.rule is rules.TEXTS else is_number, value))
    sound = {int: is_number, float: is_number, str: is_text}.get(type(value))
    return type(value) in allowed and (sound is None or sound(value))


def complete(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the keys that did not exist when a run saved its configuration, with the values that it implied.

    Args:
      flat: {"a.b": JSON value}.

    Returns:
      The same with all keys except missing required ones, with numbers as floats if the key is a float, and with the
      methods of a sum in the order that recipes give them, which used to be the order on the command line.
    """
    names = {path.split(".")[1] for path in flat if path.startswith("losses.")}
    settings = {f"losses.{name}.{s}": key for name in names & LOSSES.keys() for s, key in loss_keys(name).items()}
    full = dict(flat)
    for path, key in {**keys.KEYS, **settings}.items():
        value = flat.get(path, key.value_in_workdir(flat.get("dataset.name")))
        if value is not REQUIRED:
            value = list(value) if isinstance(value, tuple) else value
            full[path] = value if value is None else _typed(value, key)
    if isinstance(full.get("method"), str):
        full["method"] = networks.in_order(full["method"])
    return full


def restore(flat: Mapping[str, Any], source: str) -> ml_collections.ConfigDict:
    """Returns the configuration that `plain` turned into `flat`, after `complete` and without validation.

    Args:
      flat: {"a.b": JSON value}.
      source: Name of the source, for the error message.

    Raises:
      UserError: A key is unknown, or a required one is missing.
    """
    for path in flat:
        if find_key(path) is None:
            raise UserError(f"{source} holds an unknown configuration key {path}")
    missing = sorted(path for path, key in keys.KEYS.items() if key.default is REQUIRED and path not in flat)
    if missing:
        raise UserError(f"{source} is missing {', '.join(missing)}: another version of cskd_jax wrote it")
    values = {}
    for path, value in complete(flat).items():
        value = _typed(value, find_key(path))
        values[path] = tuple(value) if isinstance(value, list) else value
    return ml_collections.ConfigDict(traverse_util.unflatten_dict(values, sep="."))


def unknown_key(key: str, known: Iterable[str]) -> UserError:
    """Returns the error for an unknown key, with close keys or the available ones."""
    known = list(known)
    loss = key.split(".")[1] if key.startswith("losses.") else ""
    present = sorted({k.split(".")[1] for k in known if k.startswith("losses.")})
    if loss in LOSSES and loss not in present:
        return UserError(f"{key}: this method has no {loss}, only {', '.join(present)}; see configs/methods.py")
    close = close_keys(key, known)
    if close:
        return UserError(f"unknown configuration key {key}; did you mean {' or '.join(close)}?")
    section = key
    while section and not any(k.startswith(f"{section}.") for k in known):
        section = section.rpartition(".")[0]
    if section:
        inner = dict.fromkeys(
            k.removeprefix(f"{section}.").partition(".")[0] for k in known if k.startswith(f"{section}.")
        )
        return UserError(f"unknown configuration key {key}; {section} has {', '.join(inner)}")
    return UserError(f"unknown configuration key {key}; cskd-jax config keys lists all keys")


def same_keys(key: str, known: Iterable[str]) -> list[str]:
    """Returns the known keys that a name can only mean, but which are written otherwise.

    A name may have other separators than dots, it may lack the section losses, it may be a section, whose name is then
    meant, or not say which network it is about.
    """
    section, _, rest = key.partition(".")
    written = [key, f"losses.{key}", f"{key}.name"]
    written += [
        f"{role}.{rest or 'name'}" for role in ("student", "teacher") if section in ("model", "network", "name")
    ]
    letters = {_letters(name) for name in written}
    return [path for path in known if _letters(path) in letters]


def _letters(key):
    return re.sub("[._-]", "", key.lower())


def close_keys(key: str, known: Iterable[str]) -> list[str]:
    """Returns at most three known keys that may have been meant.

    Keys of the same section are compared part by part. A key of another section is close only if it has exactly the
    same name, or if it resembles a name that was given without a section; an exact name in another section wins over
    one that is merely alike.
    """
    known = list(known)
    same = same_keys(key, known)
    if same:
        return same[:3]
    *sections, name = key.split(".")
    within, elsewhere = [], []
    for path in known:
        *theirs, last = path.split(".")
        if not close_to(name, [last]):
            continue
        if len(theirs) == len(sections) and all(map(close_to, sections, ([part] for part in theirs))):
            within.append(path)
        elif "losses" not in sections and (name == last or not sections):
            elsewhere.append(path)
    exact = [path for path in elsewhere if not sections and path.endswith(f".{name}")]
    beside = [path for path in within if path.rpartition(".")[0] == ".".join(sections)]
    found = exact or beside or within or elsewhere
    if not found and sections and sections[0] in LOSSES:
        return close_keys(f"losses.{key}", known)
    likeliest = close_to(name, [path.rpartition(".")[2] for path in found])
    return [path for last in likeliest for path in found if path.rpartition(".")[2] == last][:3]


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first mistake in a configuration that can be found without data."""
    values = flatten(config)
    losses = config.get("losses")
    if not isinstance(losses, ml_collections.ConfigDict) or not losses:
        raise UserError(f"config.losses must name at least one of {', '.join(sorted(LOSSES))}")
    for path in values:
        if path not in keys.KEYS and not path.startswith("losses."):
            raise unknown_key(path, keys.KEYS)
    for path, key in keys.KEYS.items():
        if path not in values:
            raise UserError(f"configuration key {path} is missing; it must be {key.rule.allowed}")
        rules.check(path, values[path], key.rule)
    for name, settings in losses.items():
        _validate_loss(name, settings)
    for role in ("teacher", "student"):
        if config[role].name:
            check_settings(config[role].name, keys.network_settings(config[role]), f"{role}.")
    options: Any = jax.config  # Its options are attributes, which type checkers do not see.
    if config.dtype == "float64" and not options.jax_enable_x64:
        raise UserError("dtype is float64; it needs the environment variable JAX_ENABLE_X64=1")
    if needs_teacher(losses) and not config.teacher.name:
        raise UserError(
            f"method {config.method} needs a teacher: set teacher.name to one of {', '.join(sorted(MODELS))}"
        )
    _validate_teachers(config)
    _validate_optimizer(config)
    _validate_first_phase(config)
    if len(config.dataset.mean) != len(config.dataset.std):
        raise UserError(f"dataset.mean {config.dataset.mean} and dataset.std {config.dataset.std} differ in length")


def check_read(paths: Iterable[str], pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Raises UserError for a key that was changed although nothing reads it.

    Args:
      paths: Keys.
      pairs: (values of the recipe, values with the changes) of all configurations, both flat. Where several have
        changed a key, it is enough that one of them reads it.
    """
    for path in paths:
        changed = [after for before, after in pairs if before.get(path) != after.get(path)]
        reasons = [_why_unread(path, values) for values in changed]
        if changed and all(reasons) and any(values[path] != keys.KEYS[path].default for values in changed):
            raise UserError(reasons[0])


def is_read(path: str, values: Mapping[str, Any]) -> bool:
    """Returns whether a run with these values, {key: value}, reads a key."""
    return _why_unread(path, values) is None


def _why_unread(path, values):
    """Returns why a run does not read a key, as a sentence; None if it does."""
    condition = key.only_with if (key := keys.KEYS.get(path)) else None
    if condition is None:
        return None
    other, allowed = condition
    if values[other] in allowed if allowed else values[other]:
        return None
    needed = f"is {' or '.join(allowed)}" if allowed else "is set"
    return f"{path} has no effect unless {other} {needed}; it is {values[other]}"


def _trains_teacher(config: ml_collections.ConfigDict) -> bool:
    """Returns whether a run trains its teacher itself."""
    return needs_teacher(config.losses) and config.teacher.checkpoint is None


def _validate_teachers(config: ml_collections.ConfigDict) -> None:
    settings, count = config.teacher, 1 + len(config.teacher.others)
    if settings.others and _trains_teacher(config):
        raise UserError("teacher.others adds to teacher.checkpoint, which is None: set it to the first teacher")
    for key in ("weights", "image_sizes"):
        if settings[key] and len(settings[key]) != count:
            raise UserError(
                f"teacher.{key} is {settings[key]}; it must have as many values as there are teachers, {count}"
            )
    if settings.image_sizes and _trains_teacher(config):
        raise UserError("teacher.image_sizes applies only to given teachers: name them with teacher.checkpoint")
    for name, loss in config.losses.items():
        teacher = loss.get("teacher")
        if teacher == AVERAGE and config.optimizer.ema_decay is None:
            raise UserError(
                f"losses.{name}.teacher is average, but no moving average is kept: set optimizer.ema_decay, for "
                "example to 0.99"
            )
        if teacher not in (None, AVERAGE) and int(teacher) >= count:
            raise UserError(f"losses.{name}.teacher is {teacher}; the teachers are numbered from 0 to {count - 1}")


def _validate_optimizer(config: ml_collections.ConfigDict) -> None:
    settings = config.optimizer
    if settings.name != "sgd" and settings.nesterov:
        raise UserError(f"optimizer.nesterov is True, but it applies only to sgd; optimizer.name is {settings.name}")
    if settings.name == "dot":
        _validate_dot(config)
    epochs = {"epochs": config.epochs} | ({"teacher.epochs": config.teacher.epochs} if _trains_teacher(config) else {})
    for key, value in epochs.items():
        if 0 < value <= settings.warmup_epochs:
            raise UserError(f"optimizer.warmup_epochs is {settings.warmup_epochs}; it must be less than {key}, {value}")
    if config.batch_size % settings.accumulation_steps:
        raise UserError(
            f"batch_size is {config.batch_size}, which is not divisible by optimizer.accumulation_steps, "
            f"{settings.accumulation_steps}"
        )


def _validate_dot(config: ml_collections.ConfigDict) -> None:
    settings = config.optimizer
    for key, default in (("clip_norm", None), ("restart_momentum", False)):
        if settings[key] != default:
            raise UserError(f"optimizer.{key} is {settings[key]}; with optimizer.name dot it must be {default}")
    if config.first_phase.epochs:
        raise UserError("optimizer.name is dot, which has no first phase: set first_phase.epochs to 0")
    if not settings.delta <= settings.momentum < 1 - settings.delta:
        raise UserError(
            f"optimizer.delta is {settings.delta} and optimizer.momentum is {settings.momentum}; delta must be at most "
            "momentum, and their sum less than 1"
        )


def with_first_phase(losses: Iterable[str]) -> list[str]:
    """Returns those of the losses, by name, that train in a first phase of their own."""
    return [name for name in losses if LOSSES[name].first_phase]


def _validate_first_phase(config: ml_collections.ConfigDict) -> None:
    if not config.first_phase.epochs:
        return
    fitting = with_first_phase(config.losses)
    if not fitting:
        known = ", ".join(sorted(with_first_phase(LOSSES)))
        raise UserError(
            f"first_phase.epochs is {config.first_phase.epochs}; it must be 0 unless one of the losses has a "
            f"first phase: {known}"
        )
    if len(fitting) > 1:
        raise UserError(f"losses.{fitting[0]} and losses.{fitting[1]} each need their own first phase; use one of them")


def _validate_loss(name: str, settings: Any) -> None:
    if name not in LOSSES:
        raise unknown_key(f"losses.{name}", [f"losses.{known}" for known in LOSSES])
    if not isinstance(settings, ml_collections.ConfigDict) or "weight" not in settings:
        raise UserError(f"losses.{name} must have a weight")
    allowed: dict[str, Key] = loss_keys(name)
    for setting, value in settings.items():
        path = f"losses.{name}.{setting}"
        if setting not in allowed:
            raise unknown_key(path, [f"losses.{name}.{known}" for known in allowed])
        rules.check(path, value, allowed[setting].rule)
    weight = Weight(**{key: value for key, value in settings.items() if key in weight_keys()})
    if weight.wrong:
        raise UserError(f"losses.{name}.{weight.wrong}")


def check_teacher_exists(config: ml_collections.ConfigDict, trained_before: bool = False) -> None:
    """Raises UserError if the checkpoint of any given teacher does not exist.

    Args:
      config: Configuration.
      trained_before: Whether the teacher of `teacher.checkpoint` is trained before the run, so that it need not exist.
    """
    given = {} if trained_before else {config.teacher.checkpoint: "checkpoint"}
    given |= dict.fromkeys(config.teacher.others, "others")
    for path, key in given.items() if needs_teacher(config.losses) else ():
        if path is not None and not full_path(path).exists():
            raise UserError(f"teacher.{key} {path} does not exist")


def why_not_extend(old: Mapping[str, Any]) -> str | None:
    """Returns the reason why a run cannot be extended to more epochs; None if it can.

    The cosine schedule depends on the number of epochs. The milestones of the step schedule count from the start.

    Args:
      old: Configuration of the run from its config.json, after `complete`.
    """
    if old["optimizer.schedule"] == "cosine":
        return "its cosine schedule has lowered the learning rate for the old number of epochs"
    return None
