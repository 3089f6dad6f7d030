"""Correlation congruence against plain loops, on degenerate batches, and over several devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, correlation_congruence_loss
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
loss_and_gradients = jax.jit(jax.value_and_grad(correlation_congruence_loss, (0, 1)))


def cosine(a, b):
    return sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b))


def oracle(student, teacher, gamma=0.4, order=2):
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            kernels = []
            for x in (student, teacher):
                c = cosine(x[i], x[j])
                terms = ((2 * gamma) ** p / math.factorial(p) * c**p for p in range(order + 1))
                kernels.append(math.exp(-2 * gamma) * sum(terms))
            total += (kernels[0] - kernels[1]) ** 2
    return total / len(student) ** 2


def embeddings(dtype=np.float64, **options):
    return make_output(1, dtype=dtype, **options).embedding, make_output(2, channels=(4, 6, 10), dtype=dtype).embedding


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (0.4, 1), (1.5, 5)])
def test_value(gamma, order):
    value = correlation_congruence_loss(*embeddings(), gamma=gamma, order=order)
    np.testing.assert_allclose(value, oracle(*embeddings(), gamma, order), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_defaults_are_those_of_the_paper():
    np.testing.assert_allclose(correlation_congruence_loss(*embeddings()), oracle(*embeddings()), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_high_order_is_the_gaussian_kernel():
    student, teacher = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in embeddings())
    kernels = [np.exp(-0.4 * ((x[:, None] - x[None]) ** 2).sum(2)) for x in (student, teacher)]
    value = correlation_congruence_loss(student, teacher, order=20)
    np.testing.assert_allclose(value, np.mean((kernels[0] - kernels[1]) ** 2), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_gradient():
    student, teacher = embeddings()
    _, (gradient, of_teacher) = loss_and_gradients(student, teacher)
    assert_close(gradient, finite_differences(lambda x: oracle(x, teacher), student), 1e-6)
    assert not of_teacher.any()


@pytest.mark.usefixtures("x64")
@any_number_of_devices
def test_any_number_of_devices(devices):
    inputs = make_inputs()
    method, variables = create(LOSSES["cckd"], inputs)
    assert_same_on_devices(method, variables, inputs, devices)


def test_method_reads_the_embeddings():
    inputs = make_inputs(dtype=np.float32)
    method, variables = create(LOSSES["cckd"], inputs, gamma=0.7, order=3)
    expected = oracle(inputs.student.embedding, inputs.teacher.embedding, 0.7, 3)
    np.testing.assert_allclose(evaluate(method, variables, inputs)[0]["value"], expected, rtol=1e-4)


def test_equal_embeddings_give_zero():
    student, _ = embeddings(np.float32)
    assert correlation_congruence_loss(student, student) == 0


@pytest.mark.parametrize("fill", [0.0, 1e-20, 1.0, 1e15])
def test_degenerate_embeddings_are_finite(fill):
    _, teacher = embeddings(np.float32)
    student = np.full((8, 6), fill, np.float32)
    assert_finite(loss_and_gradients(student, teacher[:, :6]))
    assert_finite(loss_and_gradients(teacher[:, :6], student))


def test_zero_embedding_has_cosine_zero():
    student, teacher = np.zeros((2, 3), np.float32), np.eye(2, dtype=np.float32)
    value = correlation_congruence_loss(student, teacher)
    # The teacher's kernel exceeds the student's by its terms above the constant, on the diagonal alone.
    np.testing.assert_allclose(value, (math.exp(-0.8) * (0.8 + 0.32)) ** 2 / 2, rtol=1e-6)


def test_bfloat16_is_computed_in_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in embeddings()]
    value = correlation_congruence_loss(*half)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, correlation_congruence_loss(*(x.astype(jnp.float32) for x in half)), rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "options", "text"),
    [
        (((1, 3), (1, 3)), {}, "it needs at least 2 in the global batch, got 1"),
        (((4, 3), (5, 3)), {}, r"must be equal, got student_embedding \(4, 3\), teacher_embedding \(5, 3\)"),
        (((4, 3, 2), (4, 3)), {}, r"student_embedding must have 2 dimensions, got shape \(4, 3, 2\)"),
        (((4, 3), (4, 3)), {"gamma": 0.0}, "gamma must be greater than 0, got 0.0"),
        (((4, 3), (4, 3)), {"order": 0}, "order must be at least 1, got 0"),
    ],
)
def test_wrong_values(shapes, options, text):
    with pytest.raises(ValueError, match=text):
        correlation_congruence_loss(*(np.ones(shape, np.float32) for shape in shapes), **options)


def test_wrong_type():
    with pytest.raises(TypeError, match="teacher_embedding must have a floating-point dtype, got int32"):
        correlation_congruence_loss(np.ones((4, 3), np.float32), np.ones((4, 3), np.int32))
