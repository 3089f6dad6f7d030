"""SGD as the recipes have it: L2 on every parameter, momentum, a step schedule, optional restarts of the momentum."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class RestartState(NamedTuple):
    """State of `restart_every`."""

    count: Any
    inner: optax.OptState


def restart_every(inner: optax.GradientTransformation, period: int) -> optax.GradientTransformation:
    """Returns `inner` with its state reset before every `period`-th update, as if it had been built anew.

    The released code builds its optimizer anew at each epoch, so its momentum starts from zero there.
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


@dataclasses.dataclass(frozen=True)
class StepSchedule:
    """A learning rate that falls by a factor at given steps; the same object makes the update and the line in the log.

    Attributes:
      learning_rate: Learning rate of the first step.
      boundaries: Numbers of steps after which it is multiplied by `decay_factor`, increasing.
      decay_factor: Factor of every fall.
    """

    learning_rate: float
    boundaries: tuple[int, ...] = ()
    decay_factor: float = 0.1

    def __call__(self, count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        """Returns the learning rate after `count` steps, as a schedule of optax does."""
        schedule = optax.piecewise_constant_schedule(
            self.learning_rate, dict.fromkeys(self.boundaries, self.decay_factor)
        )
        # Optax multiplies a float by whether the count has passed: under strict promotion it takes a float count alone.
        return schedule(jnp.asarray(count, float))

    def on_host(self, count: int) -> float:
        """Returns the same without a device, on which it would queue behind the steps in flight."""
        return self.learning_rate * self.decay_factor ** sum(boundary <= count for boundary in self.boundaries)


def learning_rate_of_step(schedule: Callable[[Any], Any] | None, count: int) -> float | None:
    """Returns the learning rate after `count` steps for the log; None where no schedule is known."""
    if schedule is None or isinstance(schedule, int | float):
        return schedule
    if isinstance(schedule, StepSchedule):
        return schedule.on_host(count)
    return float(jax.device_get(schedule(count)))


def sgd(
    schedule: StepSchedule, *, momentum: float, weight_decay: float, restart_every_steps: int | None = None
) -> optax.GradientTransformation:
    """Returns SGD with momentum as torch.optim.SGD computes it.

    Args:
      schedule: Learning rate.
      momentum: buffer = momentum * buffer + gradient; parameters -= learning rate * buffer.
      weight_decay: Factor of the parameter that is added to the gradient of every parameter (L2).
      restart_every_steps: Number of steps after which the buffer starts again at zero, as it does at every epoch of the
        released code; None: it never does.
    """
    trace = optax.trace(momentum)
    if restart_every_steps is not None:
        trace = restart_every(trace, restart_every_steps)
    return optax.chain(optax.add_decayed_weights(weight_decay), trace, optax.scale_by_learning_rate(schedule))
