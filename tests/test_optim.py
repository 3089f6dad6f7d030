"""The optimizer against SGD written by hand as torch.optim.SGD computes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cskd_jax.training.optimizers import (
    ConstantSchedule,
    SeparateGradients,
    StepSchedule,
    dot,
    learning_rate_of_step,
    restart_every,
    sgd,
)

STEPS_PER_EPOCH = 3
DEFAULTS = {
    "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0, "milestones": (), "decay_factor": 0.1,
    "restart_momentum": False,
}  # fmt: skip


def start():
    rng = np.random.default_rng(0)
    return {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3), "scale": np.ones(3)}


def gradients(steps):
    rng = np.random.default_rng(1)
    return [{name: rng.normal(size=value.shape) for name, value in start().items()} for _ in range(steps)]


def trained(steps, **settings):
    """Parameters after each step of `sgd`."""
    settings = DEFAULTS | settings
    boundaries = tuple(epoch * STEPS_PER_EPOCH for epoch in settings["milestones"])
    optimizer = sgd(
        StepSchedule(settings["learning_rate"], boundaries, settings["decay_factor"]),
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        restart_every_steps=STEPS_PER_EPOCH if settings["restart_momentum"] else None,
    )
    update = jax.jit(optimizer.update)
    params, history = start(), []
    state = optimizer.init(params)
    for gradient in gradients(steps):
        updates, state = update(gradient, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        history.append(params)
    return history


def by_hand(steps, **settings):
    """The same by torch.optim.SGD and MultiStepLR, whose optimizer is rebuilt each epoch for restart_momentum."""
    settings = DEFAULTS | settings
    params = start()
    buffer, history = None, []
    for step, gradient in enumerate(gradients(steps)):
        epoch = step // STEPS_PER_EPOCH
        learning_rate = settings["learning_rate"]
        for milestone in settings["milestones"]:
            if epoch >= milestone:
                learning_rate *= settings["decay_factor"]
        if settings["restart_momentum"] and step % STEPS_PER_EPOCH == 0:
            buffer = None
        decayed = {name: gradient[name] + settings["weight_decay"] * params[name] for name in params}
        if buffer is None:
            buffer = decayed
        else:
            buffer = {name: settings["momentum"] * buffer[name] + decayed[name] for name in params}
        params = {name: params[name] - learning_rate * buffer[name] for name in params}
        history.append(params)
    return history


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0},
        {},
        {"weight_decay": 0.05},
        {"milestones": (1, 3), "decay_factor": 0.3},
        {"restart_momentum": True},
        {"weight_decay": 0.05, "milestones": (1, 3), "restart_momentum": True},
    ],
    ids=["plain", "momentum", "weight_decay", "milestones", "restart", "all"],
)
def test_trajectory(settings, x64):
    steps = 4 * STEPS_PER_EPOCH
    for step, (params, expected) in enumerate(zip(trained(steps, **settings), by_hand(steps, **settings), strict=True)):
        for name, value in expected.items():
            # The learning rate of the schedule may be rounded to float32.
            np.testing.assert_allclose(params[name], value, rtol=1e-6, atol=1e-7, err_msg=f"{name} at step {step}")


@pytest.mark.parametrize("name", ["kernel", "bias", "scale"])
def test_every_parameter_decays(name, x64):
    plain, decayed = trained(1), trained(1, weight_decay=0.5)
    np.testing.assert_allclose(plain[0][name] - decayed[0][name], 0.1 * 0.5 * start()[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (799, 0.1), (800, 0.01), (1199, 0.01), (1200, 0.001), (5000, 0.001)]
)
def test_schedule_changes_at_the_first_step_of_a_milestone(step, expected):
    schedule = StepSchedule(0.1, (800, 1200), 0.1)
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-6)
    # What the log says is computed without a device.
    assert learning_rate_of_step(schedule, step) == pytest.approx(expected)


@pytest.mark.parametrize("boundaries", [(3, 3), (7, 3)])
def test_boundaries_must_increase(boundaries):
    with pytest.raises(ValueError, match=r"boundaries must increase, not be \(., 3\)"):
        StepSchedule(0.1, boundaries)


def test_schedule_without_milestones_is_constant():
    assert StepSchedule(0.1)(10_000) == 0.1
    assert learning_rate_of_step(StepSchedule(0.1), 10_000) == 0.1


def test_learning_rate_of_any_schedule_of_optax_is_logged():
    assert learning_rate_of_step(optax.cosine_decay_schedule(0.1, 10), 5) == pytest.approx(0.05)
    assert learning_rate_of_step(0.3, 5) == 0.3
    assert learning_rate_of_step(None, 5) is None


def buffer_after(optimizer, updates, state):
    for update in updates:
        update, state = optimizer.update(np.float32(update), state)
    return update, state


def test_restart_starts_from_zero():
    optimizer = restart_every(optax.trace(0.5), period=2)
    outputs, state = [], optimizer.init(np.float32(0))
    for _ in range(5):
        output, state = optimizer.update(np.float32(1), state)
        outputs.append(float(output))
    assert outputs == [1, 1.5, 1, 1.5, 1]


def test_restart_survives_saving_and_restoring_the_state():
    optimizer = restart_every(optax.trace(0.5), period=3)
    _, state = buffer_after(optimizer, [1, 1], optimizer.init(np.float32(0)))
    restored = jax.tree.map(np.asarray, state)
    outputs = [float(buffer_after(optimizer, [1] * count, restored)[0]) for count in (1, 2)]
    assert outputs == [1.75, 1]


def test_dot_is_sgd_with_a_momentum_for_each_gradient():
    """What losses train has no gradient of supervision, and is trained by plain SGD; it decays after the first step."""
    rng = np.random.default_rng(0)
    params = {"network": {"kernel": rng.normal(size=3)}, "losses": {"cc": {"kernel": rng.normal(size=2)}}}
    optimizer = dot(StepSchedule(0.1, (2,)), momentum=0.8, delta=0.1, weight_decay=0.01)
    plain = sgd(StepSchedule(0.1, (2,)), momentum=0.8, weight_decay=0.01)
    with jax.enable_x64(True):
        state, plain_params, plain_state = optimizer.init(params), params["losses"], plain.init(params["losses"])
        expected, task, distilled = params["network"]["kernel"], 0, 0
        for rate in (0.1, 0.1, 0.01):
            drawn = [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in "sd"]
            drawn[0]["losses"] = jax.tree.map(np.zeros_like, params["losses"])
            task = 0.7 * task + drawn[0]["network"]["kernel"] + 0.01 * expected
            distilled = 0.9 * distilled + drawn[1]["network"]["kernel"]
            expected = expected - rate * (task + distilled)
            updates, state = optimizer.update(SeparateGradients(*drawn), state, params)
            params = optax.apply_updates(params, updates)
            decaying = plain_params if state.count > 1 else jax.tree.map(np.zeros_like, plain_params)
            updates, plain_state = plain.update(drawn[1]["losses"], plain_state, decaying)
            plain_params = optax.apply_updates(plain_params, updates)
        np.testing.assert_allclose(params["network"]["kernel"], expected, rtol=1e-12)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), params["losses"], plain_params)


@pytest.mark.parametrize("group", ["network", "losses"])
def test_dot_moves_what_distillation_alone_reaches_by_its_gradient(group):
    """With the mean of the momenta; the weight decay, from the second step on, is in the same buffer."""

    def moves(weight_decay):
        optimizer = dot(ConstantSchedule(1.0), momentum=0.9, delta=0.075, weight_decay=weight_decay)
        params = {"network": {}, "losses": {}, group: {"kernel": jnp.ones(1)}}
        gradients = SeparateGradients(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.ones_like, params))
        state, found = optimizer.init(params), []
        for _ in range(3):
            updates, state = optimizer.update(gradients, state, params)
            found.append(updates[group]["kernel"].item())
            np.testing.assert_array_equal(state.buffers.supervision[group]["kernel"], 0)
        return found

    np.testing.assert_allclose(moves(0.0), [-1, -1.9, -2.71], rtol=1e-6)
    np.testing.assert_allclose(moves(0.5), [-1, -2.4, -3.66], rtol=1e-6)


def test_dot_leaves_alone_what_no_gradient_reaches():
    optimizer = dot(ConstantSchedule(1.0), momentum=0.9, delta=0.075, weight_decay=0.5)
    params = {"network": jnp.ones(2), "losses": {}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = optimizer.update(SeparateGradients(zeros, zeros), optimizer.init(params), params)
    updates, _ = optimizer.update(SeparateGradients(zeros, zeros), state, params)
    assert not updates["network"].any()
