"""The keys of `losses` in a configuration, derived from the classes of the losses."""

import dataclasses

from cskd_jax.losses import LOSSES
from cskd_jax.runs.keys import REQUIRED, Key, attributes_of
from cskd_jax.training import rules
from cskd_jax.training.objective import WEIGHT_RULES, Weight, hyperparameters

# The key of a loss that reads a teacher.
LOSS_TEACHER = Key(
    None,
    rules.optional(rules.LOSS_TEACHER),
    "Teacher of a loss that reads one: the number of one of several; average for the moving average of the student "
    "itself, which needs optimizer.ema_decay; None for all teachers combined.",
)


def weight_keys() -> dict[str, Key]:
    """Returns the settings of every loss by name: the weight and how it changes over the epochs."""
    return {field.name: _key(field, WEIGHT_RULES[field.name], Weight) for field in dataclasses.fields(Weight)}


def common_keys() -> dict[str, Key]:
    """Returns the settings that losses share, by name: those of the weight, and the teacher."""
    return weight_keys() | {"teacher": LOSS_TEACHER}


def loss_keys(name: str) -> dict[str, Key]:
    """Returns all settings of a loss of `LOSSES` by name; their defaults are those of its class."""
    own = {}
    for setting, field in hyperparameters(LOSSES[name]).items():
        rule = rules.of_field(field)
        if rule is None:
            raise TypeError(f"no configuration can set {name}.{setting}, which is a {field.type}")
        own[setting] = _key(field, rule, LOSSES[name])
    return {**weight_keys(), **({"teacher": LOSS_TEACHER} if LOSSES[name].needs_teacher else {}), **own}


def _key(field, rule, owner):
    default = REQUIRED if field.default is dataclasses.MISSING else field.default
    return Key(default, rule, attributes_of(owner).get(field.name, ""))
