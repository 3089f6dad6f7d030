"""How a configuration trains a network: its phases, their losses, optimizers and schedules."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections
import optax

from cskd_jax.losses import LOSSES
from cskd_jax.runs.loss_keys import weight_keys
from cskd_jax.training.optimizers import (
    ConstantSchedule,
    CosineSchedule,
    Schedule,
    StepSchedule,
    clip_first,
    dot,
    no_bias_or_norm,
    sgd,
)
from cskd_jax.training.phases import Phase


class Training(NamedTuple):
    """How a student is trained.

    Attributes:
      losses: Losses of the last phase, see `Objective.create`.
      schedule: Schedule of its optimizer.
      optimizer: Its optimizer.
      phases: All phases.
    """

    losses: Mapping[str, Any]
    schedule: Schedule
    optimizer: optax.GradientTransformation
    phases: list[Phase]


def make_training(config: ml_collections.ConfigDict, steps_per_epoch: int) -> Training:
    """Returns how a configuration trains its student."""
    losses, phases = config.losses.to_dict(), [Phase(config.epochs)]
    if config.first_phase.epochs:
        phases.insert(0, make_first_phase(config, steps_per_epoch))
        losses = _after_first_phase(losses, config.first_phase.epochs)
    distills = any(LOSSES[name].needs_teacher for name in losses)
    made = make_optimizer(config.optimizer, config.epochs, steps_per_epoch, distills)
    return Training(losses, *made, phases)


def make_first_phase(config: ml_collections.ConfigDict, steps_per_epoch: int) -> Phase:
    """Returns the first phase that `config.first_phase` describes, for the loss that has one."""
    phases = {name: LOSSES[name].first_phase for name in config.losses}
    name, first = next((name, phase) for name, phase in phases.items() if phase is not None)
    settings = config.first_phase
    schedule = ConstantSchedule(settings.learning_rate or config.optimizer.learning_rate)
    own = {key: value for key, value in config.losses[name].to_dict().items() if key not in weight_keys()}
    return Phase(
        settings.epochs,
        losses={name: own | {"weight": 1.0, **first.settings}},
        optimizer=optimizer_of(config.optimizer, schedule, steps_per_epoch),
        schedule=schedule,
        trainable=_is_in_stage if first.trains_network else _is_in_nothing,
        evaluate_frozen=True,
    )


def _is_in_stage(path: tuple[str, ...]) -> bool:
    """Returns whether a parameter of a network of `MODELS` precedes the head, last normalization and classifier."""
    return path[0] not in ("head", "norm", "fc_norm", "classifier", "distillation_classifier")


def _is_in_nothing(path: tuple[str, ...]) -> bool:
    del path
    return False


def _after_first_phase(losses: Mapping[str, Any], epochs: int) -> dict[str, Any]:
    """Returns the losses after a first phase, with epochs that are counted from its end."""
    later = {}
    for name, settings in losses.items():
        first = LOSSES[name].first_phase
        if first is not None and first.later is None:
            continue
        counted = ("start_epoch", "end_epoch", "decay_epoch")
        shifted = {key: settings[key] + epochs for key in counted if settings[key] is not None}
        later[name] = settings | shifted | (first.later if first is not None else {})
    return later


def make_schedule(settings: Any, epochs: int, steps_per_epoch: int) -> Schedule:
    """Returns the schedule that `config.optimizer` describes for a number of epochs."""
    rate, warmup = settings.learning_rate, settings.warmup_epochs * steps_per_epoch
    if settings.schedule == "constant":
        return ConstantSchedule(rate, warmup_steps=warmup)
    if settings.schedule == "cosine":
        return CosineSchedule(rate, epochs * steps_per_epoch, warmup_steps=warmup)
    boundaries = tuple(epoch * steps_per_epoch for epoch in settings.milestones)
    return StepSchedule(rate, boundaries, settings.decay_factor, warmup_steps=warmup)


def make_optimizer(
    settings: Any, epochs: int, steps_per_epoch: int, distills: bool = True
) -> tuple[Schedule, optax.GradientTransformation]:
    """Returns the schedule and the optimizer that `config.optimizer` describes for a number of epochs."""
    schedule = make_schedule(settings, epochs, steps_per_epoch)
    return schedule, optimizer_of(settings, schedule, steps_per_epoch, distills)


def optimizer_of(
    settings: Any, schedule: Schedule, steps_per_epoch: int, distills: bool = True
) -> optax.GradientTransformation:
    """Returns the optimizer that `config.optimizer` describes, with any schedule; dot is sgd if nothing distills."""
    decay, mask = settings.weight_decay, None if settings.decay_all else no_bias_or_norm
    if settings.name == "dot" and distills:
        return dot(schedule, momentum=settings.momentum, delta=settings.delta, weight_decay=decay, mask=mask)
    if settings.name == "adamw":
        betas = {"b1": settings.beta1, "b2": settings.beta2, "eps": settings.epsilon}
        optimizer = optax.adamw(schedule, **betas, weight_decay=decay, mask=mask)
    else:
        restart = steps_per_epoch if settings.restart_momentum else None
        optimizer = sgd(
            schedule,
            momentum=settings.momentum,
            weight_decay=decay,
            nesterov=settings.nesterov,
            restart_every_steps=restart,
            mask=mask,
        )
    return clip_first(optimizer, settings.clip_norm)
