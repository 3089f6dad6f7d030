"""The keys of `losses` in a configuration, derived from the classes of the losses."""

import dataclasses

from cskd_jax.losses import LOSSES
from cskd_jax.runs import rules
from cskd_jax.runs.keys import REQUIRED, Key, attributes_of
from cskd_jax.training.objective import Weight, hyperparameters

# The key of a loss that reads a teacher.
LOSS_TEACHER = Key(
    None,
    rules.optional(rules.LOSS_TEACHER),
    "Teacher of a loss that reads one: the number of one of several; average for the moving average of the student "
    "itself, which needs optimizer.ema_decay; None for all teachers combined.",
)
# The rules of the keys that every loss has: the fields of `Weight`.
_WEIGHT_RULES = {
    "weight": rules.NOT_NEGATIVE,
    "start_epoch": rules.integer(0),
    "end_epoch": rules.optional(rules.integer(1)),
    "warmup_epochs": rules.integer(0),
    "decay_epoch": rules.optional(rules.integer(0)),
}


def weight_keys() -> dict[str, Key]:
    """Returns the settings of every loss by name: the weight and how it changes over the epochs."""
    return {field.name: _key(field, _WEIGHT_RULES[field.name], Weight) for field in dataclasses.fields(Weight)}


def common_keys() -> dict[str, Key]:
    """Returns the settings that losses share, by name: those of the weight, and the teacher."""
    return weight_keys() | {"teacher": LOSS_TEACHER}


def loss_keys(name: str) -> dict[str, Key]:
    """Returns all settings of a loss of `LOSSES` by name; their defaults are those of its class."""
    own = {field.name: _key(field, rules.of_field(field), LOSSES[name]) for field in hyperparameters(name).values()}
    return {**weight_keys(), **({"teacher": LOSS_TEACHER} if LOSSES[name].needs_teacher else {}), **own}


def _key(field, rule, owner):
    default = REQUIRED if field.default is dataclasses.MISSING else field.default
    return Key(default, rule, attributes_of(owner).get(field.name, ""))
