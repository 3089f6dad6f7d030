"""The losses on multi-label logits against optax, the losses of two categories, and at extreme logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cskd_jax.losses import LOSSES, LossInputs, binary_cross_entropy_loss, binary_kd_loss, kd_loss
from cskd_jax.models import ModelOutput

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make_logits(dtype=np.float64):
    return 3 * np.random.default_rng(0).normal(size=(2, 6, 4)).astype(dtype)


def make_labels(dtype=np.float64):
    return np.random.default_rng(1).integers(0, 2, (6, 4)).astype(dtype)


@pytest.mark.usefixtures("x64")
def test_binary_cross_entropy_is_that_of_optax():
    logits, labels = make_logits()[0], make_labels()
    expected, expected_gradient = jax.value_and_grad(
        lambda z: jnp.mean(optax.sigmoid_binary_cross_entropy(z, jnp.asarray(labels)))
    )(logits)
    value, gradient = jax.value_and_grad(binary_cross_entropy_loss)(logits, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(binary_cross_entropy_loss(logits, labels > 0), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.usefixtures("x64")
def test_binary_kd_is_kd_with_two_categories(temperature):
    student, teacher = make_logits()

    def as_pairs(logits):
        return jnp.stack([logits.reshape(-1), jnp.zeros(logits.size)], axis=1)

    def expected(student):
        # The mean over all questions; the loss sums them over the four categories.
        return 4 * kd_loss(as_pairs(student), as_pairs(teacher), temperature=temperature)

    def actual(student):
        return binary_kd_loss(student, teacher, temperature=temperature)

    np.testing.assert_allclose(actual(student), expected(student), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(actual)(student), jax.grad(expected)(student), rtol=1e-10, atol=1e-14)


def test_binary_kd_of_equal_logits_is_zero_without_gradient():
    logits = make_logits(np.float32)[0]
    value, gradient = jax.value_and_grad(binary_kd_loss)(logits, logits)
    assert value == 0
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_teacher_gets_no_gradient():
    student, teacher = make_logits(np.float32)
    assert not jax.grad(lambda t: binary_kd_loss(student, t))(teacher).any()


def test_extreme_logits_are_finite():
    student = np.array([[1e4, -1e4, 1e4]], np.float32)
    teacher = np.array([[-1e4, -1e4, 0]], np.float32)
    labels = np.array([[0, 1, 1]], np.float32)
    for loss, other in ((binary_kd_loss, teacher), (binary_cross_entropy_loss, labels)):
        value, gradient = jax.value_and_grad(loss)(student, other)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_bfloat16_is_computed_in_float32():
    student, teacher = (jnp.asarray(z, jnp.bfloat16) for z in make_logits(np.float32))
    assert binary_kd_loss(student, teacher).dtype == jnp.float32
    assert binary_cross_entropy_loss(student, make_labels(np.float32)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda z, y: binary_cross_entropy_loss(z.astype(int), y), TypeError,
         "logits must have a floating-point dtype, got int"),
        (lambda z, y: binary_cross_entropy_loss(z, y.astype(np.int32)), TypeError,
         "multi-label labels must have a floating-point dtype or be bool, got int32"),
        (lambda z, y: binary_cross_entropy_loss(z, y[:, :3]), ValueError,
         "multi-label labels must have shape (6, 4) to match the batch, got (6, 3)"),
        (lambda z, y: binary_kd_loss(z, z[:3]), ValueError, "shapes must be equal"),
        (lambda z, y: binary_kd_loss(z[0], z[0]), ValueError, "student_logits must have 2 dimensions, got shape (4,)"),
        (lambda z, y: binary_kd_loss(z, z, temperature=0.0), ValueError, "temperature must be greater than 0, got 0.0"),
    ],
)  # fmt: skip
def test_errors(call, error, text):
    with pytest.raises(error, match="^" + re.escape(text)):
        call(make_logits(np.float32)[0], make_labels(np.float32))


def test_methods():
    student, teacher = (ModelOutput(z, (), None, ()) for z in make_logits(np.float32))
    inputs = LossInputs(student, teacher, make_labels(np.float32))
    value, _ = LOSSES["binary_cross_entropy"](num_classes=4).apply({}, inputs._replace(teacher=None))
    assert value == binary_cross_entropy_loss(student.logits, inputs.labels)
    value, _ = LOSSES["binary_kd"](num_classes=4, temperature=2.0).apply({}, inputs)
    assert value == binary_kd_loss(student.logits, teacher.logits, temperature=2.0)


def test_what_labels_methods_are_for():
    kinds = {kind: {name for name, method in LOSSES.items() if method.multilabel is kind} for kind in (True, False)}
    assert kinds[True] == {"binary_cross_entropy", "binary_kd", "multilabel_category_structure"}
    logits = {
        "dkd",
        "dml",
        "nkd",
        "ofa",
        "rld",
        "sdd_dkd",
        "sdd_kd",
        "sdd_nkd",
        "weighted_target",
        "wkd_l",
    }
    assert kinds[False] == {"category_structure", "cross_entropy", "crd", "kdgan"} | logits
    # These read no labels, but need images of one class all the same.
    softmax = {name for name, method in LOSSES.items() if method(num_classes=3).softmax}
    expected = {"abkd", "ctkd", "deit", "dist", "kd", "lskd", "luminet", "mlkd", "srd", "ttm", "vkd", "wttm"}
    assert softmax == expected
