"""Plain distances of embeddings: values, gradients, degenerate inputs, several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, cosine_embedding_loss, smooth_l1_loss
from tests.method_checks import any_number_of_devices, assert_finite, assert_same_on_devices, create, make_inputs

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(5, 7)), 3 * RNG.normal(size=(5, 7))


def test_cosine():
    cosines = [s @ t / np.linalg.norm(s) / np.linalg.norm(t) for s, t in zip(STUDENT, TEACHER, strict=True)]
    np.testing.assert_allclose(cosine_embedding_loss(STUDENT, TEACHER), 1 - np.mean(cosines), rtol=1e-6)
    assert cosine_embedding_loss(STUDENT, 5 * STUDENT) < 1e-6


def test_smooth_l1():
    distance = np.abs(STUDENT - TEACHER)
    assert (distance < 1).any()
    assert (distance > 1).any()
    expected = np.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
    np.testing.assert_allclose(smooth_l1_loss(STUDENT, TEACHER), expected, rtol=1e-6)


def test_a_dead_embedding_has_no_gradient():
    student = np.where(np.arange(5)[:, None] == 2, 0, STUDENT)
    gradient = jax.grad(cosine_embedding_loss)(jnp.asarray(student), jnp.asarray(TEACHER))
    assert not np.any(gradient[2])
    assert np.any(np.delete(gradient, 2, axis=0), axis=1).all()


@pytest.mark.parametrize("loss", [cosine_embedding_loss, smooth_l1_loss])
def test_only_the_student_is_differentiated(loss):
    student, teacher = jax.grad(loss, argnums=(0, 1))(jnp.asarray(STUDENT), jnp.asarray(TEACHER))
    assert np.any(student)
    assert not np.any(teacher)


@pytest.mark.parametrize("loss", [cosine_embedding_loss, smooth_l1_loss])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_degenerate_embeddings(loss, scale):
    student, teacher = (jnp.asarray(x * scale, jnp.float32) for x in (STUDENT, TEACHER))
    assert_finite(jax.value_and_grad(loss)(student, teacher))


@pytest.mark.parametrize("loss", [cosine_embedding_loss, smooth_l1_loss])
def test_wrong_arguments(loss):
    with pytest.raises(ValueError, match="student_embedding"):
        loss(STUDENT, TEACHER[:, :3])
    with pytest.raises(TypeError, match="teacher_embedding"):
        loss(STUDENT, TEACHER.astype(int))


@any_number_of_devices
@pytest.mark.parametrize("name", ["cosine", "smooth_l1"])
def test_devices_share_one_global_batch(name, devices, x64):
    inputs = make_inputs()
    assert_same_on_devices(*create(LOSSES[name], inputs), inputs, devices)
