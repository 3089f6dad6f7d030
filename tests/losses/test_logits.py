"""Losses on logits against numpy."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, LossInputs, cross_entropy_loss, kd_loss, mse_logits_loss

LABELS = np.array([2, 0, 1, 2], np.int32)


def make_logits(dtype=np.float32):
    """(student, teacher), [4, 3] each."""
    logits = 3 * np.random.default_rng(0).normal(size=(2, 4, 3))
    return logits[0].astype(dtype), logits[1].astype(dtype)


def softmax(logits, temperature=1.0):
    exponentials = np.exp(np.asarray(logits, np.float64) / temperature)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def kd_oracle(student, teacher, temperature):
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return temperature**2 * np.mean(np.sum(p * np.log(p / q), axis=1))


def message(text):
    return "^" + re.escape(text)


def test_cross_entropy():
    logits, _ = make_logits()
    expected = -np.mean(np.log(softmax(logits)[np.arange(4), LABELS]))
    np.testing.assert_allclose(cross_entropy_loss(logits, LABELS), expected, rtol=1e-6)


def test_cross_entropy_gradient():
    logits, _ = make_logits()
    gradient = jax.grad(cross_entropy_loss)(logits, LABELS)
    np.testing.assert_allclose(gradient, (softmax(logits) - np.eye(3)[LABELS]) / 4, rtol=1e-5, atol=1e-7)


def test_cross_entropy_of_large_logits_is_finite():
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    value, gradient = jax.value_and_grad(cross_entropy_loss)(logits, np.array([1]))
    assert value == 1e4
    np.testing.assert_array_equal(gradient, [[1, -1, 0]])


def test_kd():
    student, teacher = make_logits()
    np.testing.assert_allclose(kd_loss(student, teacher, temperature=2.5), kd_oracle(student, teacher, 2.5), rtol=1e-5)


def test_kd_default_temperature_is_4():
    student, teacher = make_logits()
    np.testing.assert_allclose(kd_loss(student, teacher), kd_oracle(student, teacher, 4.0), rtol=1e-5)


def test_kd_gradient():
    student, teacher = make_logits()
    gradient = jax.grad(kd_loss)(student, teacher, temperature=2.5)
    expected = 2.5 * (softmax(student, 2.5) - softmax(teacher, 2.5)) / 4
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_kd_of_equal_logits_is_zero():
    student, _ = make_logits()
    assert kd_loss(student, student) == 0


def test_kd_of_large_logits_is_finite():
    student, teacher = np.array([[1e4, 0.0]], np.float32), np.array([[0.0, 1e4]], np.float32)
    value, gradient = jax.value_and_grad(kd_loss)(student, teacher, temperature=1.0)
    assert value == 1e4
    np.testing.assert_array_equal(gradient, [[1, -1]])


def test_mse():
    student, teacher = make_logits()
    expected = np.mean((student.astype(np.float64) - teacher) ** 2)
    np.testing.assert_allclose(mse_logits_loss(student, teacher), expected, rtol=1e-6)


def test_mse_gradient():
    student, teacher = make_logits()
    np.testing.assert_allclose(jax.grad(mse_logits_loss)(student, teacher), (student - teacher) / 6, rtol=1e-6)


@pytest.mark.parametrize("loss", [kd_loss, mse_logits_loss])
def test_teacher_gets_no_gradient(loss):
    assert not jax.grad(loss, argnums=1)(*make_logits()).any()


@pytest.mark.parametrize("loss", [kd_loss, mse_logits_loss])
def test_jit(loss):
    np.testing.assert_allclose(jax.jit(loss)(*make_logits()), loss(*make_logits()), rtol=1e-6)


@pytest.mark.parametrize("loss", [kd_loss, mse_logits_loss])
def test_bfloat16_is_computed_in_float32(loss):
    half = [jnp.asarray(logits, jnp.bfloat16) for logits in make_logits()]
    value = loss(*half)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(*(logits.astype(jnp.float32) for logits in half)), rtol=1e-6)


def test_bfloat16_cross_entropy_is_computed_in_float32():
    half = jnp.asarray(make_logits()[0], jnp.bfloat16)
    value = cross_entropy_loss(half, LABELS)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, cross_entropy_loss(half.astype(jnp.float32), LABELS), rtol=1e-6)


def test_float64_stays_float64(x64):
    student, teacher = make_logits(np.float64)
    for value in (cross_entropy_loss(student, LABELS), kd_loss(student, teacher), mse_logits_loss(student, teacher)):
        assert value.dtype == jnp.float64


@pytest.mark.parametrize(
    ("logits", "labels", "error", "text"),
    [
        (np.ones((4, 3), int), LABELS, TypeError, "logits must have a floating-point dtype, got int"),
        (np.ones(4, np.float32), LABELS, ValueError, "logits must have 2 dimensions, got shape (4,)"),
        (np.ones((4, 3), np.float32), np.ones(4), TypeError, "labels must have an integer dtype, got float"),
        (np.ones((4, 3), np.float32), LABELS[:3], ValueError,
         "labels must have shape (4,) to match the batch, got (3,)"),
        (np.ones((4, 3), np.float32), LABELS[:, None], ValueError,
         "labels must have shape (4,) to match the batch, got (4, 1)"),
    ],
)  # fmt: skip
def test_cross_entropy_errors(logits, labels, error, text):
    with pytest.raises(error, match=message(text)):
        cross_entropy_loss(logits, labels)


@pytest.mark.parametrize("given", [{"other_labels": LABELS}, {"share": np.full(4, 0.5, np.float32)}])
def test_the_other_labels_come_with_their_share(given):
    with pytest.raises(ValueError, match=message("other_labels and share must be given together")):
        cross_entropy_loss(make_logits()[0], LABELS, **given)


@pytest.mark.parametrize("loss", [kd_loss, mse_logits_loss])
@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({0: np.ones((4, 3), int)}, TypeError, "student_logits must have a floating-point dtype, got int"),
        ({1: np.ones((4, 3), int)}, TypeError, "teacher_logits must have a floating-point dtype, got int"),
        ({0: np.ones(4, np.float32)}, ValueError, "student_logits must have 2 dimensions, got shape (4,)"),
        ({1: np.ones(4, np.float32)}, ValueError, "teacher_logits must have 2 dimensions, got shape (4,)"),
        ({1: np.ones((4, 1), np.float32)}, ValueError,
         "shapes must be equal, got student_logits (4, 3), teacher_logits (4, 1)"),
    ],
)  # fmt: skip
def test_errors_of_losses_with_a_teacher(loss, changes, error, text):
    arguments = [changes.get(position, logits) for position, logits in enumerate(make_logits())]
    with pytest.raises(error, match=message(text)):
        loss(*arguments)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_kd_refuses_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ValueError, match=message(f"temperature must be greater than 0, got {temperature}")):
        kd_loss(*make_logits(), temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be greater than 0, got"):
        kd_loss(*make_logits(), temperature=jnp.float32(temperature))


@pytest.mark.parametrize(
    "temperature", [float("inf"), np.float32("inf"), jnp.float32("inf"), jnp.array([[1], [jnp.inf]])]
)
def test_kd_refuses_a_temperature_that_is_not_finite(temperature):
    with pytest.raises(ValueError, match="temperature must be finite, got"):
        kd_loss(*make_logits(), temperature=temperature)


def test_a_traced_temperature_is_not_checked():
    value = jax.jit(lambda temperature: kd_loss(*make_logits(), temperature=temperature))(jnp.float32(2.0))
    np.testing.assert_allclose(value, kd_loss(*make_logits(), temperature=jnp.float32(2.0)), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("cross_entropy", {}, lambda student, teacher: cross_entropy_loss(student, LABELS)),
        ("kd", {}, kd_loss),
        ("kd", {"temperature": 2.5}, lambda student, teacher: kd_loss(student, teacher, temperature=2.5)),
        ("mse_logits", {}, mse_logits_loss),
    ],
)
def test_methods_apply_their_loss(name, settings, expected):
    student, teacher = make_logits()
    inputs = LossInputs(types.SimpleNamespace(logits=student), types.SimpleNamespace(logits=teacher), LABELS)
    value, terms = LOSSES[name](num_classes=3, **settings).apply({}, inputs)
    assert value == expected(student, teacher)
    assert terms == {}


def test_cross_entropy_needs_no_teacher():
    student, _ = make_logits()
    method = LOSSES["cross_entropy"](num_classes=3)
    assert not method.needs_teacher
    value, _ = method.apply({}, LossInputs(types.SimpleNamespace(logits=student), None, LABELS))
    assert np.isfinite(value)
