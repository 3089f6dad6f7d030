"""The phases of a training: how long each lasts, what it trains, and with which optimizer and losses."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from cskd_jax.errors import UserError
from cskd_jax.training.objective import Objective


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a training. Fields that are None take the value of the student.

    A phase that changes the optimizer or the choice of what trains starts with a fresh optimizer, whose schedule counts
    from there; otherwise the optimizer continues. Epochs in the weights of losses are counted from
    the start of the first phase.

    Attributes:
      epochs: Number of epochs.
      losses: Losses, see `Objective.create`.
      optimizer: Optimizer.
      schedule: Learning rate of that optimizer by the number of its updates, for the log; read only beside `optimizer`.
      trainable: Function from the path of a parameter of the network, such as ("classifier", "kernel"), to whether it
        trains; None trains all. What losses train always trains.
    """

    epochs: int
    losses: Mapping[str, Any] | None = None
    optimizer: optax.GradientTransformation | None = None
    schedule: Callable[[Any], Any] | None = None
    trainable: Callable[[tuple[str, ...]], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A phase with everything filled in.

    Attributes:
      start: Number of steps before the phase.
      end: Number of steps before the next phase.
      objective: Losses of the phase.
      all_losses: Losses of all phases, whose parameters exist from the start.
      optimizer: Optimizer over {"network", "losses"}.
      schedule: Learning rate by the number of updates of the optimizer, or None if it is not known.
      fresh: Whether the phase starts with a fresh optimizer.
      optimizer_start: Number of steps before the optimizer started.
    """

    start: int
    end: int
    objective: Objective
    all_losses: Objective
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any] | None
    fresh: bool
    optimizer_start: int


def make_parts(
    phases: Sequence[Phase],
    losses: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any] | None,
    *,
    steps_per_epoch: int,
    create: Callable[[Mapping[str, Any]], Objective],
) -> list[Part]:
    """Returns the phases with everything filled in.

    Args:
      phases: Phases, in their order.
      losses: Losses of the student, for the phases that have none of their own.
      optimizer: Optimizer of the student, for the phases that have none of their own.
      schedule: Schedule of that optimizer.
      steps_per_epoch: Number of steps in an epoch.
      create: Function from a description of losses to an objective.

    Raises:
      UserError: There is no phase, or one has no epochs.
    """
    if not phases or not all(isinstance(phase.epochs, int | np.integer) and phase.epochs >= 1 for phase in phases):
        raise UserError("a training needs at least one phase, and every phase at least one epoch, as an integer")
    described = [losses if phase.losses is None else phase.losses for phase in phases]
    all_losses = create({name: entry for description in reversed(described) for name, entry in description.items()})
    parts: list[Part] = []
    before = None
    for phase, description in zip(phases, described, strict=True):
        chosen = (optimizer, schedule) if phase.optimizer is None else (phase.optimizer, phase.schedule)
        start = parts[-1].end if parts else 0
        fresh = before != (chosen, phase.trainable)
        before = chosen, phase.trainable
        parts.append(
            Part(
                start=start,
                end=start + phase.epochs * steps_per_epoch,
                objective=create(description),
                all_losses=all_losses,
                optimizer=_only(chosen[0], phase.trainable) if fresh else parts[-1].optimizer,
                schedule=chosen[1],
                fresh=fresh,
                optimizer_start=start if fresh else parts[-1].optimizer_start,
            )
        )
    return parts


def _only(optimizer, trainable):
    """Returns the optimizer restricted to the parameters that train; the others do not change or decay."""
    if trainable is None:
        return optimizer

    def label(path, _):
        names = tuple(entry.key for entry in path)
        return "train" if names[0] != "network" or trainable(names[1:]) else "keep"

    return optax.multi_transform(
        {"train": optimizer, "keep": optax.set_to_zero()}, lambda params: jax.tree.map_with_path(label, params)
    )
