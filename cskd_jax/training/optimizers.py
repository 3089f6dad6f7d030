"""Learning-rate schedules, and the optimizers of the recipes."""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Names of the Vision Transformer arrays that `no_bias_or_norm` excludes from weight decay.
_TOKENS = frozenset({"cls_token", "dist_token", "reg_token", "pos_embed"})


@dataclasses.dataclass(frozen=True)
class Schedule(abc.ABC):
    """A learning rate as a function of the number of updates, both for the optimizer and, on the host, for the log.

    Attributes:
      learning_rate: Learning rate after the warm-up, before anything lowers it.
      warmup_steps: Number of updates over which the rate rises linearly from zero, as in `optax.linear_schedule`.
    """

    learning_rate: float
    warmup_steps: int = dataclasses.field(default=0, kw_only=True)

    @abc.abstractmethod
    def after_warmup(self, count: Any, xp: Any) -> Any:
        """Returns the learning rate after `count` updates without the warm-up, computed by `xp`: jax.numpy or numpy."""

    def __call__(self, count: Any) -> Any:
        """Returns the learning rate after `count` updates, as optax schedules do."""
        return self._at(jnp.asarray(count, float), jnp)

    def on_host(self, count: int) -> float:
        """Returns the same value computed on the host, where it does not queue behind the steps in flight."""
        return float(self._at(float(count), np))

    def _at(self, count, xp):
        value = self.after_warmup(count, xp)
        return value * xp.minimum(1.0, count / self.warmup_steps) if self.warmup_steps else value


@dataclasses.dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """A learning rate that stays the same after the warm-up."""

    def after_warmup(self, count: Any, xp: Any) -> Any:
        """Returns `learning_rate`."""
        return xp.full_like(count, self.learning_rate)


@dataclasses.dataclass(frozen=True)
class StepSchedule(Schedule):
    """A learning rate that falls by a factor at given steps, which are counted from the start of the warm-up.

    Attributes:
      boundaries: Increasing numbers of updates after which the learning rate is multiplied by `decay_factor`.
      decay_factor: Factor by which the learning rate falls.

    Raises:
      ValueError: The boundaries do not increase.
    """

    boundaries: tuple[int, ...] = ()
    decay_factor: float = 0.1

    def __post_init__(self):
        if any(first >= second for first, second in itertools.pairwise(self.boundaries)):
            raise ValueError(f"boundaries must increase, not be {self.boundaries}")

    def after_warmup(self, count: Any, xp: Any) -> Any:
        """Returns `learning_rate`, multiplied by `decay_factor` for every boundary that has passed."""
        if xp is np:
            return self.learning_rate * self.decay_factor ** sum(boundary <= count for boundary in self.boundaries)
        # Optax multiplies a float by a comparison with the count: under strict promotion this requires a float count.
        falls = dict.fromkeys(self.boundaries, self.decay_factor)
        return optax.piecewise_constant_schedule(self.learning_rate, falls)(count)


@dataclasses.dataclass(frozen=True)
class CosineSchedule(Schedule):
    """A learning rate that falls from the end of the warm-up to zero along half a cosine.

    Attributes:
      steps: Total number of updates, including the warm-up.
    """

    steps: int

    def after_warmup(self, count: Any, xp: Any) -> Any:
        """Returns half a cosine from `learning_rate` to zero."""
        progress = (count - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * self.learning_rate * (1.0 + xp.cos(math.pi * xp.clip(progress, 0.0, 1.0)))


def learning_rate_of_step(schedule: Callable[[Any], Any] | None, count: int) -> float | None:
    """Returns the learning rate after `count` updates for the log; None if no schedule is known."""
    if schedule is None or isinstance(schedule, int | float):
        return schedule
    if isinstance(schedule, Schedule):
        return schedule.on_host(count)
    return float(jax.device_get(schedule(count)))


class RestartState(NamedTuple):
    """State of `restart_every`."""

    count: Any
    inner: optax.OptState


def restart_every(inner: optax.GradientTransformation, period: int) -> optax.GradientTransformation:
    """Returns `inner` with its state reset before every `period`-th update, as if it were rebuilt.

    The released code rebuilds its optimizer at each epoch, so its momentum starts from zero there.
    """

    def init(params):
        return RestartState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates, state, params=None):
        restart = state.count % period == 0
        start = inner.init(updates if params is None else params)
        kept = jax.tree.map(lambda new, old: jnp.where(restart, new, old), start, state.inner)
        updates, kept = inner.update(updates, kept, params)
        return updates, RestartState(optax.safe_increment(state.count), kept)

    return optax.GradientTransformation(init, update)


def sgd(
    schedule: Schedule,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    restart_every_steps: int | None = None,
    mask: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """Returns SGD with momentum that computes the same updates as torch.optim.SGD.

    Args:
      schedule: Learning rate.
      momentum: Factor of the buffer: buffer = momentum * buffer + gradient; parameters -= learning rate * buffer.
      weight_decay: Coefficient of L2 weight decay: this factor times the parameter is added to its gradient.
      nesterov: Whether the update is gradient + momentum * buffer instead of the buffer.
      restart_every_steps: Number of steps after which the buffer starts again at zero, as it does at every epoch of the
        released code; None never restarts it.
      mask: Function from the parameters to a mask of those that decay; None decays all.
    """
    trace = optax.trace(momentum, nesterov)
    if restart_every_steps is not None:
        trace = restart_every(trace, restart_every_steps)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), trace, optax.scale_by_learning_rate(schedule))


class SeparateGradients(NamedTuple):
    """The gradients of the losses that need no teacher, and of those that do."""

    supervision: Any
    distillation: Any


class SeparateOptimizer(optax.GradientTransformation):
    """An optax optimizer whose `update` takes `SeparateGradients` instead of the gradients of their sum."""


# Version of the computation in `dot`. It is increased when the same settings lead to different values than before.
DOT_VERSION = 3


class _DotState(NamedTuple):
    count: Any
    buffers: SeparateGradients


def dot(
    schedule: Schedule,
    *,
    momentum: float,
    delta: float,
    weight_decay: float,
    mask: Callable[[Any], Any] | None = None,
) -> SeparateOptimizer:
    """Returns the distillation-oriented trainer: SGD with a momentum for each of two losses.

    Every parameter has one buffer for the supervision gradient, with weight decay, and one for the distillation
    gradient: buffer = (momentum - delta) * buffer + gradient and buffer = (momentum + delta) * buffer + gradient,
    respectively; the parameter moves by minus the learning rate times their sum. As in the authors' code, a parameter
    that only one of the two gradients has reached so far uses the mean of the momenta. If that is the distillation
    gradient, its buffer has the weight decay, from the second step on. This applies to most parameters of losses, and
    to a classifier without cross-entropy; the classifier behind matched maps is reached by supervision alone. A
    parameter that neither gradient reaches does not change.

    Args:
      schedule: Learning rate.
      momentum: Mean of the two momenta.
      delta: Half of their difference.
      weight_decay: Coefficient of L2 weight decay: this factor times the parameter is added to its supervision
        gradient, or to its distillation gradient if that alone reaches it.
      mask: Function from the parameters to a mask of those that decay; None decays all.

    References:
      Zhao, Cui, Song, Liang, "DOT: A Distillation-Oriented Trainer", ICCV 2023, https://arxiv.org/abs/2307.08436; code:
      https://github.com/megvii-research/mdistiller.
    """
    decay = optax.add_decayed_weights(weight_decay, mask)

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return _DotState(jnp.zeros((), jnp.int32), SeparateGradients(zeros, zeros))

    def update(updates, state, params: Any = None):
        zeros = jax.tree.map(jnp.zeros_like, updates.supervision)
        decays, _ = decay.update(zeros, decay.init(params), params)

        def accumulate(supervision, distillation, supervision_buffer, distillation_buffer, decay):
            # A gradient that has always been zero is taken to be missing.
            distilled = jnp.any(distillation_buffer != 0)
            supervised = jnp.any(supervision != 0) | jnp.any(supervision_buffer != 0)
            both = supervised & (distilled | jnp.any(distillation != 0))
            lower, higher = (jnp.where(both, momentum + d, momentum).astype(decay.dtype) for d in (-delta, delta))
            return SeparateGradients(
                lower * supervision_buffer + (supervision + jnp.where(supervised, decay, 0)),
                higher * distillation_buffer + (distillation + jnp.where(distilled & ~supervised, decay, 0)),
            )

        buffers = jax.tree.map(accumulate, *updates, *state.buffers, decays)
        buffers = jax.tree.transpose(jax.tree.structure(zeros), jax.tree.structure(SeparateGradients(0, 0)), buffers)
        rate = schedule(state.count)
        moves = jax.tree.map(lambda x, y: -jnp.asarray(rate, x.dtype) * (x + y), *buffers)
        return moves, _DotState(optax.safe_increment(state.count), buffers)

    return SeparateOptimizer(init, update)


def clip_first(optimizer: optax.GradientTransformation, norm: float | None) -> optax.GradientTransformation:
    """Returns the optimizer with gradients first clipped to a global norm; None leaves it unchanged."""
    return optimizer if norm is None else optax.chain(optax.clip_by_global_norm(norm), optimizer)


def without_decay(optimizer: Any, undecayed: Set[tuple[str, str]]) -> Any:
    """Returns the optimizer without weight decay for some parameters of the losses.

    Optimizers read the values of parameters to apply weight decay. Here the optimizer sees zeros as the values of those
    parameters, so this works with any optimizer. Its state and all other updates stay the same.

    Args:
      optimizer: Optimizer over {"network", "losses"}.
      undecayed: Parameters that do not decay, as (name of the loss, name of its parameter).
    """
    if not undecayed:
        return optimizer

    def update(updates, state, params=None, **extra):
        if params is not None:
            losses = {
                name: {
                    part: jax.tree.map(jnp.zeros_like, x) if (name, part) in undecayed else x
                    for part, x in parts.items()
                }
                for name, parts in params["losses"].items()
            }
            params = {**params, "losses": losses}
        return optimizer.update(updates, state, params, **extra)

    kind = SeparateOptimizer if isinstance(optimizer, SeparateOptimizer) else optax.GradientTransformationExtraArgs
    return kind(optimizer.init, update)


def no_bias_or_norm(params: Any) -> Any:
    """Returns a mask that is False for biases and normalization parameters: arrays of at most one dimension.

    It is also False for the tokens and the position embedding of a Vision Transformer, which timm does not decay
    either.
    """

    def decays(path, x):
        return x.ndim > 1 and getattr(path[-1], "key", None) not in _TOKENS if path else x.ndim > 1

    return jax.tree.map_with_path(decays, params)
