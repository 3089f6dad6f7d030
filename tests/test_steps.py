"""The whole training step: the same run on any number of devices; non-degenerate in every recipe."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.data.augment import Normalize, augment
from cskd_jax.distributed.devices import AXIS, Devices
from cskd_jax.models import BasicBlock, Bottleneck, ResNet
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.objective import Objective, needs_teacher
from cskd_jax.training.optimizers import StepSchedule, sgd
from cskd_jax.training.state import init_network, init_state
from cskd_jax.training.step import make_eval_step
from tests.tiers import chosen
from tests.whole_step import make_whole_step

NUM_CLASSES, IMAGE = 6, (8, 8, 3)
REFERENCE = {"category_structure": {"weight": 1.0, "variant": "reference"}, "cross_entropy": {"weight": 0.9}}
OBJECTIVES = {
    "reference": REFERENCE,
    "paper": {
        "category_structure": {"weight": 1.0, "variant": "paper"},
        "mse_logits": {"weight": 0.9},
        "cross_entropy": {"weight": 0.1},
    },
    "kd": {"kd": {"weight": 0.9}, "cross_entropy": {"weight": 0.1}},
}


def networks(axis_name=None, dtype=jnp.float64):
    common = {"num_classes": NUM_CLASSES, "stage_widths": (4, 6), "dtype": dtype, "axis_name": axis_name}
    student = ResNet(stage_sizes=(1, 1), block=BasicBlock, **common)
    return LinenNetwork(student), LinenNetwork(ResNet(stage_sizes=(1, 1), block=Bottleneck, **common))


def initial(student, objective, optimizer, teacher):
    """State of the training and variables of the teacher; compiled, because op by op it takes longer."""

    def init(key):
        variables, output = init_network(teacher, key, IMAGE) if teacher else (None, None)
        return init_state(key, student, objective, optimizer, IMAGE, output), variables

    return jax.jit(init)(jax.random.PRNGKey(0))


def train(losses, num_devices, *, steps=5, batch_size=16, num_classes=NUM_CLASSES):
    """Parameters, statistics and metrics after some steps of the real step, augmentation included."""
    student, teacher = networks(AXIS)
    objective = Objective.create(losses, num_classes=num_classes, axis_name=AXIS)
    optimizer = sgd(StepSchedule(0.1, (3,)), momentum=0.9, weight_decay=1e-4, restart_every_steps=3)
    normalize = Normalize((0.5,), (0.25,))
    step = make_whole_step(
        student, objective, optimizer, teacher=teacher, axis_name=AXIS,
        preprocess=lambda images, *keys: normalize(augment(images, *keys, crop_padding=1, flip=True)),
    )  # fmt: skip
    step = jax.pmap(
        step, axis_name=AXIS, in_axes=(None, None, 0, None), out_axes=(None, None), devices=jax.devices()[:num_devices]
    )
    # Already where the step will leave them: else the second call compiles again.
    devices = Devices(jax.devices()[:num_devices])
    state, teacher_variables = devices.replicate(initial(student, objective, optimizer, teacher))
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = {
            "image": rng.integers(0, 256, (batch_size, *IMAGE), np.uint8),
            "label": rng.integers(0, NUM_CLASSES, batch_size, np.int32),
        }
        batch = {name: x.reshape(num_devices, -1, *x.shape[1:]) for name, x in batch.items()}
        # Fake devices share one pool of threads: two steps in flight can wait for each other for ever.
        state, metrics = jax.block_until_ready(step(state, teacher_variables, batch, jax.random.PRNGKey(2)))
    return state, metrics


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), chosen([("reference", 8), ("reference", 2), ("paper", 4)], 1))
@pytest.mark.usefixtures("x64")
def test_same_run_on_any_number_of_devices(name, number):
    expected, actual = (train(OBJECTIVES[name], num_devices) for num_devices in (1, number))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10), actual, expected)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_devices_hold_equal_replicas():
    state, _ = train(OBJECTIVES["reference"], 4, steps=2)
    for leaf in jax.tree.leaves(state):
        first, *others = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(others) == 3
        for other in others:
            np.testing.assert_array_equal(other, first)


def plain_step(losses):
    student, teacher = networks(dtype=jnp.float32)
    objective = Objective.create(losses, num_classes=NUM_CLASSES)
    optimizer = sgd(StepSchedule(0.1), momentum=0.9, weight_decay=1e-4)
    teacher = teacher if needs_teacher(losses) else None
    step = make_whole_step(student, objective, optimizer, teacher=teacher)
    return jax.jit(step), *initial(student, objective, optimizer, teacher)


def batch(size=8):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, NUM_CLASSES, size, np.int32)
    return {"image": rng.normal(size=(size, *IMAGE)).astype(np.float32), "label": labels}


@pytest.mark.slow
def test_total_is_the_weighted_sum_of_its_methods():
    step, state, variables = plain_step(OBJECTIVES["kd"])
    _, metrics = step(state, variables, batch(), jax.random.PRNGKey(0))
    expected = 0.9 * metrics["kd"] + 0.1 * metrics["cross_entropy"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


@pytest.mark.slow
def test_training_learns_a_batch():
    step, state, variables = plain_step(OBJECTIVES["reference"])
    losses = []
    for _ in range(30):
        state, metrics = step(state, variables, batch(), jax.random.PRNGKey(0))
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.1 < losses[0]
    assert int(state.step) == 30


@pytest.mark.slow
def test_sigma_trains_and_the_teacher_stays():
    step, state, variables = plain_step(OBJECTIVES["reference"])
    before = jax.tree.map(np.asarray, variables)
    new_state, _ = step(state, variables, batch(), jax.random.PRNGKey(0))
    sigma, new_sigma = (s.params["losses"]["category_structure"]["sigma"] for s in (state, new_state))
    assert sigma.shape == (6, 24)
    assert np.abs(np.asarray(new_sigma - sigma)).max() > 0
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.slow
def test_bfloat16_trains_with_float32_state():
    student, teacher = networks(dtype=jnp.bfloat16)
    objective = Objective.create(REFERENCE, num_classes=NUM_CLASSES)
    optimizer = sgd(StepSchedule(0.1), momentum=0.9, weight_decay=0.0)
    state, variables = initial(student, objective, optimizer, teacher)
    step = make_whole_step(student, objective, optimizer, teacher=teacher)
    new_state, metrics = jax.jit(step)(state, variables, batch(), jax.random.PRNGKey(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state.params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(new_state.collections)} == {jnp.dtype("float32")}
    assert {value.dtype for value in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
    assert all(np.isfinite(value) for value in metrics.values())


@pytest.mark.slow
def test_evaluation_counts_every_image_once_on_any_number_of_devices():
    student, _ = networks(AXIS, jnp.float32)
    variables = jax.jit(lambda key: init_network(student, key, IMAGE)[0])(jax.random.PRNGKey(0))
    step = make_eval_step(student, preprocess=lambda images: images, axis_name=AXIS)
    full = batch(16) | {"mask": np.arange(16) < 13}
    sums, predicted = [], []
    for num_devices in (1, 8):
        mapped = jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, devices=jax.devices()[:num_devices])
        split = {name: x.reshape(num_devices, -1, *x.shape[1:]) for name, x in full.items()}
        for collected, found in zip((sums, predicted), jax.device_get(mapped(variables, split)), strict=True):
            collected.append(found)
    assert sums[0]["count"] == sums[1]["count"] == 13
    assert sums[0]["top1"] == sums[1]["top1"]
    logits = student.on_axis(None).apply(variables, full["image"][:13], train=False)[0].logits
    assert sums[0]["top1"] == (np.argmax(logits, axis=1) == full["label"][:13]).sum()
    for found in predicted:
        np.testing.assert_array_equal(found[:13], np.argmax(logits, axis=1))
