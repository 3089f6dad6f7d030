"""SGD as the recipes have it: L2 on every parameter, momentum, a step schedule, optional restarts of the momentum."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class RestartState(NamedTuple):
    """State of `restart_every`."""

    count: jax.Array
    inner: optax.OptState


def restart_every(inner: optax.GradientTransformation, period: int) -> optax.GradientTransformation:
    """Resets the state of `inner` before every `period`-th update, as if it had been built anew.

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


def step_schedule(learning_rate: float, milestones: Sequence[int], decay_factor: float, steps_per_epoch: int):
    """Learning rate by step: `learning_rate` times `decay_factor` for each epoch of `milestones` that has begun."""
    boundaries = {epoch * steps_per_epoch: decay_factor for epoch in milestones}
    schedule = optax.piecewise_constant_schedule(learning_rate, boundaries)
    # Optax multiplies a float by whether the count has passed: under strict promotion it takes a float count alone.
    return lambda count: schedule(jnp.asarray(count, float))


def make_optimizer(
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    milestones: Sequence[int],
    decay_factor: float,
    restart_momentum: bool,
    steps_per_epoch: int,
) -> optax.GradientTransformation:
    """SGD with momentum as torch.optim.SGD computes it.

    Args:
      learning_rate: at the first step.
      momentum: buffer = momentum * buffer + gradient; parameters -= learning rate * buffer.
      weight_decay: times the parameter, added to the gradient of every parameter (L2).
      milestones: epochs at whose start the learning rate is multiplied by decay_factor.
      decay_factor: see milestones.
      restart_momentum: start each epoch with a zero buffer (released code).
      steps_per_epoch: optimization steps in an epoch.
    """
    trace = optax.trace(momentum)
    if restart_momentum:
        trace = restart_every(trace, steps_per_epoch)
    schedule = step_schedule(learning_rate, milestones, decay_factor, steps_per_epoch)
    return optax.chain(optax.add_decayed_weights(weight_decay), trace, optax.scale_by_learning_rate(schedule))
