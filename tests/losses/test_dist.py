"""DIST against plain loops, on degenerate batches, and over several devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, dist_loss
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
loss_and_gradients = jax.jit(
    jax.value_and_grad(dist_loss, (0, 1), has_aux=True), static_argnames=("beta", "gamma", "temperature")
)


def softmax(logits, temperature):
    exponentials = np.exp(np.asarray(logits, np.float64) / temperature)
    return exponentials / exponentials.sum(1, keepdims=True)


def pearson(a, b):
    a, b = a - sum(a) / len(a), b - sum(b) / len(b)
    return sum(a * b) / (math.sqrt(sum(a * a) * sum(b * b)) + 1e-8)


def oracle(student, teacher, beta=1.0, gamma=1.0, temperature=4.0):
    """(value, inter, intra)."""
    p, q = softmax(student, temperature), softmax(teacher, temperature)
    inter = intra = 1.0
    for i in range(p.shape[0]):
        inter -= pearson(p[i], q[i]) / p.shape[0]
    for c in range(p.shape[1]):
        intra -= pearson(p[:, c], q[:, c]) / p.shape[1]
    return temperature**2 * (beta * inter + gamma * intra), inter, intra


def logits(dtype=np.float64):
    return make_output(1, dtype=dtype).logits, make_output(2, dtype=dtype).logits


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, {"beta": 2.0, "gamma": 0.5, "temperature": 1.0}])
def test_values(options):
    value, terms = dist_loss(*logits(), **options)
    expected, inter, intra = oracle(*logits(), **options)
    assert_close({"value": value, **terms}, {"value": expected, "inter": inter, "intra": intra}, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"beta": 0.0}, {"temperature": 1.0}])
def test_gradient(options):
    student, teacher = logits()
    _, (gradient, of_teacher) = loss_and_gradients(student, teacher, **options)
    assert_close(gradient, finite_differences(lambda x: oracle(x, teacher, **options)[0], student), 1e-6)
    assert not of_teacher.any()


def test_equal_logits_give_zero():
    student, _ = logits(np.float32)
    np.testing.assert_allclose(dist_loss(student, student)[0], 0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@any_number_of_devices
def test_any_number_of_devices(devices):
    inputs = make_inputs()
    method, variables = create(LOSSES["dist"], inputs)
    assert_same_on_devices(method, variables, inputs, devices)


def test_method_reads_the_logits():
    inputs = make_inputs(dtype=np.float32)
    method, variables = create(LOSSES["dist"], inputs, beta=2.0, gamma=3.0, temperature=2.0)
    expected = oracle(inputs.student.logits, inputs.teacher.logits, 2.0, 3.0, 2.0)[0]
    np.testing.assert_allclose(evaluate(method, variables, inputs)[0]["value"], expected, rtol=1e-4)


@pytest.mark.parametrize("fill", [np.zeros(5), np.full(5, 1e4), np.array([1e4, 0, 0, 0, -1e4])])
def test_degenerate_logits_are_finite(fill):
    _, teacher = logits(np.float32)
    student = np.tile(fill.astype(np.float32), (8, 1))
    for arguments in ((student, teacher), (teacher, student), (student, student)):
        assert_finite(loss_and_gradients(*arguments))


@pytest.mark.parametrize(("batch_size", "classes"), [(64, 10), (64, 100), (12, 7)])
@pytest.mark.parametrize("value", [0, 0.1, -3e4])
def test_a_classifier_that_starts_constant_has_no_gradient(value, batch_size, classes):
    """The mean of equal numbers is rounded; what is left must not become a direction."""
    teacher = np.random.default_rng(0).normal(size=(batch_size, classes)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: dist_loss(x, teacher)[0]))(jnp.full_like(teacher, value))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_bfloat16_is_computed_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in logits()]
    value, _ = dist_loss(*half)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, dist_loss(*(x.astype(jnp.float32) for x in half))[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "options", "text"),
    [
        (((1, 3), (1, 3)), {}, "it needs at least 2 in the global batch, got 1"),
        (((4, 1), (4, 1)), {}, "dist_loss correlates classes: it needs at least 2, got 1"),
        (((4, 3), (4, 2)), {}, r"shapes must be equal, got student_logits \(4, 3\), teacher_logits \(4, 2\)"),
        (((4, 3), (4, 3)), {"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
    ],
)
def test_wrong_values(shapes, options, text):
    with pytest.raises(ValueError, match=text):
        dist_loss(*(np.ones(shape, np.float32) for shape in shapes), **options)


def test_wrong_type():
    with pytest.raises(TypeError, match="student_logits must have a floating-point dtype, got int32"):
        dist_loss(np.ones((4, 3), np.int32), np.ones((4, 3), np.float32))
