"""The phases of training: how long each lasts, what it trains, and with which optimizer and losses."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from cskd_jax.errors import UserError
from cskd_jax.training.objective import Objective
from cskd_jax.training.optimizers import SeparateOptimizer, without_decay
from cskd_jax.training.peers import own_path


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the training. Fields that are None take the value of the student.

    A phase whose `optimizer` or `trainable` differs from that of the phase before it (compared by ==) starts with a
    fresh optimizer, whose schedule counts from there; otherwise the optimizer continues. Until the optimizer changes
    again, the parameters of losses that are off stay as they are. Epochs in the weights of losses are counted from the
    start of the first phase.

    Attributes:
      epochs: Number of epochs.
      losses: Losses, see `Objective.create`.
      optimizer: Optimizer.
      schedule: Learning rate of that optimizer as a function of the number of its updates, for the log; only read if
        `optimizer` is given.
      trainable: Function from the path of a parameter of the network, such as ("classifier", "kernel"), to whether it
        is trained, in the student and in its peers alike; None trains all. The parameters of the losses of the phase
        are always trained.
      evaluate_frozen: Whether the modules of the network whose parameters are all frozen run in evaluation mode, so
        that their running statistics do not change. This requires a flax.linen module whose submodules get their
        training flag by keyword.
    """

    epochs: int
    losses: Mapping[str, Any] | None = None
    optimizer: optax.GradientTransformation | None = None
    schedule: Callable[[Any], Any] | None = None
    trainable: Callable[[tuple[str, ...]], bool] | None = None
    evaluate_frozen: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """A phase with everything filled in.

    Attributes:
      start: Number of steps before the phase.
      end: Number of steps before the next phase.
      objective: Losses of the phase.
      all_losses: Losses of all phases, whose parameters exist from the start.
      optimizer: Optimizer over {"network", "losses"}.
      schedule: Learning rate as a function of the number of updates of the optimizer, or None if it is not known.
      fresh: Whether the phase starts with a fresh optimizer.
      optimizer_start: Number of steps before the optimizer started.
      evaluated: Function from the path of a parameter of the network to whether it is trained, if frozen modules run in
        evaluation mode; None if the whole network runs in training mode.
    """

    start: int
    end: int
    objective: Objective
    all_losses: Objective
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any] | None
    fresh: bool
    optimizer_start: int
    evaluated: Callable[[tuple[str, ...]], bool] | None = None


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
      UserError: There is no phase, or one has no epochs, no losses or no optimizer.
    """
    if not phases:
        raise UserError("training needs at least one phase")
    for phase in phases:
        if not isinstance(phase.epochs, int | np.integer) or phase.epochs < 1:
            raise UserError(f"epochs is {phase.epochs!r}; it must be an integer, at least 1")
    described = [losses if phase.losses is None else phase.losses for phase in phases]
    objectives = [create(description) for description in described]
    all_losses = create({name: entry for description in reversed(described) for name, entry in description.items()})
    undecayed = {(name, part) for name, (_, loss) in all_losses.losses.items() for part in loss.undecayed}
    chosen = [
        (optimizer, schedule) if phase.optimizer is None else (phase.optimizer, phase.schedule) for phase in phases
    ]
    for given, _ in chosen:
        if not all(callable(getattr(given, name, None)) for name in ("init", "update")):
            raise UserError(f"optimizer is {given!r}; it must be an optimizer of optax, such as optax.adamw(1e-3)")
    keys = [(given, phase.trainable) for (given, _), phase in zip(chosen, phases, strict=True)]
    starts = [number for number, key in enumerate(keys) if number == 0 or key != keys[number - 1]]
    parts: list[Part] = []
    for number, phase in enumerate(phases):
        start, fresh = parts[-1].end if parts else 0, number in starts
        if fresh:
            end = next((later for later in starts if later > number), len(phases))
            kept = _kept(objectives[number:end], all_losses)
            optimizer = without_decay(_only(chosen[number][0], phase.trainable, kept), undecayed)
        parts.append(
            Part(
                start=start,
                end=start + phase.epochs * steps_per_epoch,
                objective=objectives[number],
                all_losses=all_losses,
                optimizer=optimizer if fresh else parts[-1].optimizer,
                schedule=chosen[number][1],
                fresh=fresh,
                optimizer_start=start if fresh else parts[-1].optimizer_start,
                evaluated=phase.trainable if phase.evaluate_frozen else None,
            )
        )
    return parts


def _kept(objectives, all_losses):
    """Returns the paths of the parameters of losses that do not change while one optimizer is in use."""
    kept = set()
    for name in all_losses.losses:
        on = [objective.losses[name][1] for objective in objectives if name in objective.losses]
        frozen = [set(loss.frozen) for loss in on]
        kept |= {(name, part) for part in set.intersection(*frozen)} if on else {(name,)}
    return kept


def _only(optimizer, trainable, kept):
    """Returns the optimizer restricted to the parameters that are trained; the others do not change or decay.

    Args:
      optimizer: Optimizer of all parameters.
      trainable: Function from the path of a parameter of the network to whether it is trained; None trains all.
      kept: Paths within the parameters of the losses below which none are trained.
    """
    if trainable is None and not kept:
        return optimizer
    if isinstance(optimizer, SeparateOptimizer):
        raise UserError("an optimizer with separate gradients trains all parameters: no phase can freeze any of them")

    def label(path, _):
        part, *names = (jax.tree_util.keystr((entry,), simple=True) for entry in path)
        if part == "losses":
            return "keep" if kept & {tuple(names[:1]), tuple(names[:2])} else "train"
        return "train" if trainable is None or trainable(own_path(tuple(names))) else "keep"

    return optax.multi_transform(
        {"train": optimizer, "keep": optax.set_to_zero()}, lambda params: jax.tree.map_with_path(label, params)
    )
