"""What is not finite in features or logits makes the value of a loss NaN, never finite or even perfect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import (
    abkd_loss,
    category_structure_loss,
    dist_loss,
    irg_loss,
    kd_loss,
    multilabel_category_structure_loss,
    ofd_loss,
    srd_difference_loss,
    standardize_logits,
    standardized_kd_loss,
)
from cskd_jax.losses._arrays import safe_rsqrt, safe_sqrt

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, SIZE = 6, 5
LABELS = np.array([0, 1, 1, 2, 2, 2], np.int32)


def _irg(student, teacher):
    logits = jnp.zeros((BATCH, 3))  # What is not finite shows in the edges and the transformation alone.
    maps = [(x[:, None, None, :], x[:, None, None, ::-1]) for x in (student, teacher)]
    return irg_loss(logits, logits, maps[0], maps[1], student, teacher)[0]


def _ofd(student, teacher):
    return ofd_loss([student[:, None, None]], [teacher[:, None, None]], [jnp.full(SIZE, -0.5)])


def _classes(student, teacher):
    return category_structure_loss(student, teacher, LABELS, num_classes=4)[0]


def _labels(student, teacher):
    return multilabel_category_structure_loss(student, teacher, np.eye(4, dtype=np.float32)[LABELS])[0]


def _standardized(student, teacher):
    return kd_loss(standardize_logits(student), standardize_logits(teacher))


LOSSES = {
    "abkd": lambda student, teacher: abkd_loss(student, teacher)[0],
    "abkd of logarithms": lambda student, teacher: abkd_loss(student, teacher, alpha=0.0, beta=0.0)[0],
    "category structure": _classes,
    "dist": lambda student, teacher: dist_loss(student, teacher)[0],
    "irg": _irg,
    "lskd": standardized_kd_loss,
    "multi-label category structure": _labels,
    "ofd": _ofd,
    "srd": srd_difference_loss,
    "standardized logits": _standardized,
}


@pytest.mark.parametrize("name", LOSSES)
def test_not_a_number(name):
    """In one element of one network, and in all of them."""
    loss = jax.jit(LOSSES[name])
    rng = np.random.default_rng(0)
    for role in range(2):
        for where in ((2, 1), slice(None)):
            arrays = [rng.normal(size=(BATCH, SIZE)).astype(np.float32) for _ in range(2)]
            assert np.isfinite(loss(*arrays))
            arrays[role][where] = np.nan
            assert np.isnan(loss(*arrays)), (role, where)


@pytest.mark.parametrize("name", LOSSES)
def test_infinity(name):
    loss, rng = jax.jit(LOSSES[name]), np.random.default_rng(0)
    for role in range(2):
        arrays = [rng.normal(size=(BATCH, SIZE)).astype(np.float32) for _ in range(2)]
        arrays[role][2, 1] = np.inf
        assert not np.isfinite(loss(*arrays)), role


@pytest.mark.parametrize("root", [safe_sqrt, safe_rsqrt])
def test_roots(root):
    value, gradient = jax.vmap(jax.value_and_grad(root))(jnp.array([0.0, np.nan, 4.0]))
    assert value[0] == gradient[0] == 0
    assert np.isnan(value[1])
    assert value[2] == {safe_sqrt: 2.0, safe_rsqrt: 0.5}[root]
