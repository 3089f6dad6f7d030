"""What the tests of the methods share: made-up outputs, finite differences, several devices, training steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from cskd_jax.distributed.devices import AXIS, Devices
from cskd_jax.losses import LossInputs
from cskd_jax.models import ModelOutput
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.objective import Objective
from cskd_jax.training.optimizers import StepSchedule, sgd
from cskd_jax.training.state import init_network, init_state
from tests.tiers import chosen
from tests.whole_step import make_whole_step

NUM_CLASSES, NUM_EXAMPLES, BATCH = 5, 24, 8
IMAGE = (4, 4, 2)


def make_output(seed, batch=BATCH, channels=(3, 4, 6), dtype=np.float64, num_classes=NUM_CLASSES):
    """Random outputs of a network with maps of 6x6, 4x4 and 2x2; its embedding is not negative, as a ResNet's."""
    rng = np.random.default_rng(seed)
    sizes = (6, 4, 2)
    features = tuple(rng.normal(size=(batch, n, n, c)).astype(dtype) for n, c in zip(sizes, channels, strict=True))
    embedding = np.abs(rng.normal(size=(batch, channels[-1]))).astype(dtype)
    logits = (2 * rng.normal(size=(batch, num_classes))).astype(dtype)
    return ModelOutput(logits, features, embedding, preactivations=features)


def make_inputs(batch=BATCH, dtype=np.float64):
    """Inputs of a method; the teacher has other channels than the student, and a pair of samples shares a category."""
    rng = np.random.default_rng(7)
    return LossInputs(
        make_output(1, batch, dtype=dtype),
        make_output(2, batch, (4, 6, 10), dtype),
        (np.arange(batch) % NUM_CLASSES).astype(np.int32),
        rng.permutation(NUM_EXAMPLES)[:batch].astype(np.int32),
        np.asarray(jax.random.PRNGKey(3)),
    )


def create(method_class, inputs, **fields):
    """A method with its variables, whose parameters are moved away from special values such as zero."""
    method = method_class(num_classes=NUM_CLASSES, num_examples=NUM_EXAMPLES, **fields)
    variables = jax.jit(lambda: method.init(jax.random.PRNGKey(0), inputs))()
    leaves, structure = jax.tree.flatten(variables.get("params", {}))
    rng = np.random.default_rng(5)
    leaves = [leaf + 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return method, variables | {"params": jax.tree.unflatten(structure, leaves)}


def finite_differences(function, array, step=1e-5):
    """Central differences of a scalar function with respect to each element of `array`."""
    array = np.asarray(array)
    gradient = np.empty_like(array)
    for position in np.ndindex(array.shape):
        above, below = array.copy(), array.copy()
        above[position] += step
        below[position] -= step
        gradient[position] = (function(above) - function(below)) / (2 * step)
    return gradient


def evaluate(method, variables, inputs, num_devices=None):
    """Value, terms, memory, and gradients, of the global batch; on several devices if their number is given.

    The gradients are those of the parameters, and of the outputs of both networks. On several devices the result is put
    together as the training step does; the memory keeps the copies of all devices.
    """
    mapped = method if num_devices is None else method.clone(axis_name=AXIS)
    memory = variables.get("memory", {})

    def run(params, batch):
        def loss(params, student, teacher):
            applied = {"params": params, "memory": memory}
            shard = LossInputs(student, teacher, batch.labels, batch.indices, inputs.key)
            (value, terms), updated = mapped.apply(applied, shard, mutable=["memory"])
            return value, (terms, updated.get("memory", {}))

        gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        (value, (terms, new)), gradients = gradient(params, batch.student, batch.teacher)
        if num_devices is not None:
            value, terms, params_gradients = lax.pmean((value, terms, gradients[0]), AXIS)
            gradients = params_gradients, *jax.tree.map(lambda g: g / num_devices, gradients[1:])
        return {"value": value, "terms": terms}, gradients, new

    batch = inputs._replace(key=None)
    if num_devices is None:
        return jax.jit(run)(variables["params"], batch)
    split = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
    run = jax.pmap(run, AXIS, in_axes=(None, 0), devices=jax.devices()[:num_devices])
    result, gradients, new = jax.block_until_ready(run(variables["params"], split))
    first = jax.tree.map(lambda x: x[0], (result, gradients[0]))
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), gradients[1:])
    return first[0], (first[1], *rows), new


def assert_close(actual, expected, tolerance=1e-10, least=1e-300):
    """Equal trees up to `tolerance` of the largest element of each leaf, or of `least` where all are smaller."""

    def check(path, a, e):
        scale = max(np.abs(e).max(initial=0), least) if np.isfinite(e).all() else 0
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(check, actual, expected)


def assert_finite(tree):
    """No leaf has a NaN or an infinity."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(leaf).all(), (jax.tree_util.keystr(path), leaf)


any_number_of_devices = pytest.mark.parametrize("devices", chosen([8, 1, 2, 4], 1))


def assert_same_on_devices(method, variables, inputs, devices, least=1e-300):
    """Values, gradients and memory of several devices are those of the global batch; copies are equal.

    Gradients that are zero but for rounding need another `least`, see `assert_close`.
    """
    value, gradients, memory = evaluate(method, variables, inputs)
    actual = evaluate(method, variables, inputs, devices)
    assert_close(actual[:2], (value, gradients), least=least)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[0], x.shape)), actual[2])
    assert_close(jax.tree.map(lambda x: x[0], actual[2]), memory)


class SmallNetwork(nn.Module):
    """The outputs of a network, by the least computation."""

    dtype: Any = jnp.float64
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, *, train):
        self.variable("batch_stats", "unused", jnp.zeros, (), self.dtype)
        features = [images]
        for channels in (4, 6, 8):
            features.append(nn.relu(nn.Dense(channels, param_dtype=self.dtype)(features[-1])))
        embedding = features[-1].mean((1, 2))
        logits = nn.Dense(NUM_CLASSES, param_dtype=self.dtype)(embedding)
        return ModelOutput(logits, tuple(features[1:]), embedding, preactivations=tuple(features[1:]))


def train(losses, *, num_devices=None, steps=3, dtype=jnp.float64):
    """States (from the first, untrained one) and metrics of some real training steps of a small network."""
    axis_name = None if num_devices is None else AXIS
    network = LinenNetwork(SmallNetwork(dtype))
    objective = Objective.create(losses, num_classes=NUM_CLASSES, axis_name=axis_name, num_examples=NUM_EXAMPLES)
    optimizer = sgd(StepSchedule(0.1), momentum=0.9, weight_decay=1e-4)
    step = make_whole_step(network, objective, optimizer, teacher=network, axis_name=axis_name)

    def init(key):
        teacher, output = init_network(network, jax.random.fold_in(key, 1), IMAGE)
        return init_state(key, network, objective, optimizer, IMAGE, output), teacher

    state, teacher_variables = jax.jit(init)(jax.random.PRNGKey(0))
    if num_devices is None:
        step = jax.jit(step)
    else:
        devices = jax.devices()[:num_devices]
        step = jax.pmap(step, AXIS, in_axes=(None, None, 0, None), out_axes=(None, None), devices=devices)
        # Already where the step will leave them: else the second call compiles again.
        state, teacher_variables = Devices(devices).replicate((state, teacher_variables))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(NUM_EXAMPLES, *IMAGE)).astype(dtype)
    labels = rng.integers(0, NUM_CLASSES, NUM_EXAMPLES, np.int32)
    order = rng.permutation(NUM_EXAMPLES).astype(np.int32)
    states, metrics = [state], []
    for i in range(steps):
        index = np.take(order, np.arange(i * BATCH, (i + 1) * BATCH), mode="wrap")
        batch = {"image": images[index], "label": labels[index], "index": index}
        if num_devices is not None:
            batch = {name: x.reshape(num_devices, -1, *x.shape[1:]) for name, x in batch.items()}
        # Fake devices share one pool of threads: two steps in flight can wait for each other for ever.
        state, values = jax.block_until_ready(step(state, teacher_variables, batch, jax.random.PRNGKey(1)))
        states.append(state)
        metrics.append(values)
    return states, metrics
