"""Instance relationship graph against plain loops, on degenerate batches, and over several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, irg_loss
from tests.method_checks import (
    any_number_of_devices,
    assert_close,
    assert_finite,
    assert_same_on_devices,
    create,
    evaluate,
    finite_differences,
    make_inputs,
    make_output,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
loss = jax.jit(irg_loss)
loss_and_gradients = jax.jit(jax.value_and_grad(irg_loss, tuple(range(6)), has_aux=True))


def edges(x):
    distances = np.array([[np.sum((a - b) ** 2) for b in x] for a in x])
    return distances / distances.max()


def cells(length, size):
    return [slice(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]


def pool(x, shape):
    """Means over cells of [H, W, D]."""
    result = np.empty(shape)
    for position in np.ndindex(shape):
        result[position] = x[tuple(cells(n, m)[k] for n, m, k in zip(x.shape, shape, position, strict=True))].mean()
    return result


def movements(lower, upper):
    shape = tuple(np.minimum(lower.shape[1:], upper.shape[1:]))
    distances = np.array([np.sum((pool(a, shape) - pool(b, shape)) ** 2) for a, b in zip(lower, upper, strict=True)])
    return distances / distances.max()


def oracle(arguments):
    """Terms, of the arguments of `irg_loss`."""
    zs, zt, (lower_s, upper_s), (lower_t, upper_t), es, et = arguments
    pairs = ((lower_s, lower_t), (upper_s, upper_t), (es, et))
    return {
        "vertex": np.mean((zs - zt) ** 2),
        "edge": np.mean([np.mean((edges(s) - edges(t)) ** 2) for s, t in pairs]),
        "transformation": np.mean((movements(lower_s, upper_s) - movements(lower_t, upper_t)) ** 2),
    }


def total(terms, weights=(0.1, 5.0, 5.0)):
    return sum(w * terms[name] for w, name in zip(weights, ("vertex", "edge", "transformation"), strict=True))


def make_arguments(dtype=np.float64, batch=8):
    student, teacher = make_output(1, batch, (3, 4, 6), dtype), make_output(2, batch, (4, 6, 10), dtype)
    maps = student.features[1:], teacher.features[1:]
    return student.logits, teacher.logits, *maps, student.embedding, teacher.embedding


@pytest.mark.usefixtures("x64")
def test_values():
    expected = oracle(make_arguments())
    value, terms = loss(*make_arguments())
    assert_close(terms, expected, 1e-12)
    np.testing.assert_allclose(value, total(expected), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_weights():
    weights = {"vertex_weight": 2.0, "edge_weight": 3.0, "transformation_weight": 4.0}
    value, _ = loss(*make_arguments(), **weights)
    np.testing.assert_allclose(value, total(oracle(make_arguments()), weights.values()), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_sizes_that_do_not_divide():
    arguments = list(make_arguments(batch=3))
    rng = np.random.default_rng(0)
    arguments[2] = rng.normal(size=(3, 5, 4, 3)), rng.normal(size=(3, 3, 3, 2))
    arguments[3] = rng.normal(size=(3, 4, 3, 7)), rng.normal(size=(3, 6, 1, 5))
    assert_close(loss(*arguments)[1], oracle(arguments), 1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_gradients():
    arguments = make_arguments(batch=3)

    _, gradients = loss_and_gradients(*arguments)
    leaves, structure = jax.tree.flatten(arguments)
    for i, gradient in enumerate(jax.tree.leaves(gradients)):

        def value(x, i=i):
            return total(oracle(jax.tree.unflatten(structure, [*leaves[:i], x, *leaves[i + 1 :]])))

        # Student and teacher come in turns, the maps two by two.
        if i in (0, 2, 3, 6):
            assert_close(gradient, finite_differences(value, leaves[i]), 1e-6)
        else:
            assert not gradient.any()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@any_number_of_devices
def test_any_number_of_devices(devices):
    inputs = make_inputs()
    method, variables = create(LOSSES["irg"], inputs)
    assert_same_on_devices(method, variables, inputs, devices)


def test_method_reads_the_second_and_third_stage():
    inputs = make_inputs(dtype=np.float32)
    method, variables = create(LOSSES["irg"], inputs)
    student, teacher = inputs.student, inputs.teacher
    maps = student.features[1:], teacher.features[1:]
    expected = oracle((student.logits, teacher.logits, *maps, student.embedding, teacher.embedding))
    np.testing.assert_allclose(evaluate(method, variables, inputs)[0]["value"], total(expected), rtol=1e-4)


@pytest.mark.parametrize("stages", [(0, 1), (2, 2), (3, 2), (2, 4)])
def test_method_refuses_stages_that_are_not_there(stages):
    inputs = make_inputs(dtype=np.float32)
    text = f"lower_stage {stages[0]} and upper_stage {stages[1]} must be two stages, in order, of both networks"
    with pytest.raises(ValueError, match=text):
        create(LOSSES["irg"], inputs, lower_stage=stages[0], upper_stage=stages[1])


def test_method_refuses_different_numbers_of_stages():
    inputs = make_inputs(dtype=np.float32)
    teacher = inputs.teacher._replace(features=(inputs.teacher.features[0], *inputs.teacher.features))
    with pytest.raises(ValueError, match="student has 3 stages and teacher 4: stages are paired one to one"):
        create(LOSSES["irg"], inputs._replace(teacher=teacher))


@pytest.mark.parametrize("value", [0.0, 0.3, 1e4])
def test_samples_that_coincide_have_no_relations(value):
    arguments = make_arguments(np.float32)
    student = jax.tree.map(lambda x: np.full_like(x, value), (arguments[0], arguments[2], arguments[4]))
    student = student[0], arguments[1], student[1], arguments[3], student[2], arguments[5]
    (_, terms), gradients = loss_and_gradients(*student)
    assert_finite((terms, gradients))
    teacher_edges = [edges(x.astype(np.float64)) for x in (*arguments[3], arguments[5])]
    np.testing.assert_allclose(terms["edge"], np.mean([np.mean(e**2) for e in teacher_edges]), rtol=1e-4)
    assert not any(leaf.any() for leaf in jax.tree.leaves((gradients[2], gradients[4])))


def test_coinciding_samples_away_from_the_origin():
    arguments = list(make_arguments(np.float32))
    rows = np.float32(100) + np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32)
    arguments[4] = np.tile(rows, (8, 1))
    assert not loss_and_gradients(*arguments)[1][4].any()


def test_bfloat16_is_computed_in_float32():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_arguments())
    value, _ = loss(*half)
    assert value.dtype == jnp.float32
    expected, _ = loss(*jax.tree.map(lambda x: x.astype(jnp.float32), half))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_batch_of_one():
    with pytest.raises(ValueError, match="it needs at least 2 in the global batch, got 1"):
        irg_loss(*make_arguments(np.float32, batch=1))


def test_different_batches():
    arguments = list(make_arguments(np.float32))
    arguments[5] = arguments[5][:4]
    with pytest.raises(ValueError, match=r"must be equal, .*teacher embedding \(4, 10\)"):
        irg_loss(*arguments)


def test_three_maps():
    arguments = list(make_arguments(np.float32))
    arguments[2] = (*arguments[2], arguments[2][0])
    with pytest.raises(ValueError, match="student_maps must hold the lower and the upper map, got 3 maps"):
        irg_loss(*arguments)


def test_wrong_type():
    arguments = list(make_arguments(np.float32))
    arguments[3] = (arguments[3][0], arguments[3][1].astype(np.int32))
    with pytest.raises(TypeError, match=r"teacher_maps\[1\] must have a floating-point dtype, got int32"):
        irg_loss(*arguments)
