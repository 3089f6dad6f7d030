"""Distillation of standardized logits against plain loops, and on degenerate logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, kd_loss, standardized_kd_loss
from cskd_jax.losses._logits import standardize_logits
from tests.method_checks import (
    assert_close,
    assert_finite,
    create,
    evaluate,
    finite_differences,
    make_inputs,
    make_output,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
loss_and_gradients = jax.jit(jax.value_and_grad(standardized_kd_loss, (0, 1)), static_argnames="temperature")


def oracle(student, teacher, temperature=2.0):
    total = 0.0
    for s, t in zip(np.asarray(student, np.float64), np.asarray(teacher, np.float64), strict=True):
        s, t = (z - sum(z) / len(z) for z in (s, t))
        s, t = (z / (np.sqrt(sum(z**2) / (len(z) - 1)) + 1e-7) for z in (s, t))
        p, q = (np.exp(z / temperature) / sum(np.exp(z / temperature)) for z in (s, t))
        total += sum(q * np.log(q / p))
    return temperature**2 * total / len(student)


def logits(dtype=np.float64):
    return make_output(1, dtype=dtype).logits, make_output(2, dtype=dtype).logits


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient(temperature):
    student, teacher = logits()
    value, (gradient, of_teacher) = loss_and_gradients(student, teacher, temperature=temperature)
    assert_close({"value": value}, {"value": oracle(student, teacher, temperature)}, 1e-12)
    assert_close(gradient, finite_differences(lambda x: oracle(x, teacher, temperature), student), 1e-6)
    assert not of_teacher.any()


@pytest.mark.usefixtures("x64")
def test_size_of_the_logits_does_not_matter():
    student, teacher = logits()
    expected = standardized_kd_loss(student, teacher)
    # But for what is added to the standard deviation.
    np.testing.assert_allclose(standardized_kd_loss(3 * student + 7, teacher), expected, rtol=1e-6)
    assert abs(kd_loss(3 * student, teacher) - kd_loss(student, teacher)) > 1e-3


def test_method_reads_the_logits():
    inputs = make_inputs(dtype=np.float32)
    method, variables = create(LOSSES["lskd"], inputs, temperature=3.0)
    expected = oracle(inputs.student.logits, inputs.teacher.logits, 3.0)
    np.testing.assert_allclose(evaluate(method, variables, inputs)[0]["value"], expected, rtol=1e-4)


@pytest.mark.parametrize("fill", [np.zeros(5), np.full(5, 1e4), np.array([1e4, 0, 0, 0, -1e4])])
def test_degenerate_logits_are_finite(fill):
    _, teacher = logits(np.float32)
    student = np.tile(fill.astype(np.float32), (8, 1))
    for arguments in ((student, teacher), (teacher, student), (student, student)):
        assert_finite(loss_and_gradients(*arguments))


@pytest.mark.parametrize("classes", [5, 10, 100, 200])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -3e4])
def test_equal_logits_become_zero_with_zero_gradient(value, classes):
    """The mean of equal numbers is rounded; what is left must not become a direction."""
    equal = jnp.full((4, classes), value, jnp.float32)
    weighted = jax.value_and_grad(lambda x: jnp.sum(standardize_logits(x) * jnp.arange(classes, dtype=x.dtype)))
    found, gradient = jax.jit(weighted)(equal)
    assert found == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_bfloat16_is_computed_in_float32():
    assert standardized_kd_loss(*(jnp.asarray(x, jnp.bfloat16) for x in logits())).dtype == jnp.float32


@pytest.mark.parametrize(
    ("shapes", "temperature", "text"),
    [
        (((4, 1), (4, 1)), 2.0, "needs at least 2 classes, got 1"),
        (((4, 3), (4, 2)), 2.0, r"shapes must be equal, got student_logits \(4, 3\), teacher_logits \(4, 2\)"),
        (((4, 3), (4, 3)), 0.0, "temperature must be greater than 0, got 0.0"),
    ],
)
def test_wrong_values(shapes, temperature, text):
    with pytest.raises(ValueError, match=text):
        standardized_kd_loss(*(np.ones(shape, np.float32) for shape in shapes), temperature=temperature)
