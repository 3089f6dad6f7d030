"""Ranks, masks and ties of the classification metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.metrics import classification_sums


def sums(logits, labels, mask=None):
    logits = jnp.asarray(logits, jnp.float32)
    mask = np.ones(len(logits), bool) if mask is None else np.asarray(mask)
    return jax.device_get(classification_sums(logits, jnp.asarray(labels), mask))


@pytest.mark.parametrize(
    ("label", "top1", "top5"), [(6, 1, 1), (5, 0, 1), (2, 0, 1), (1, 0, 0), (0, 0, 0)], ids=lambda value: str(value)
)
def test_rank(label, top1, top5):
    result = sums([[0.0, 1, 2, 3, 4, 5, 6]], [label])
    assert (result["top1"], result["top5"]) == (top1, top5)


def test_sums_over_the_batch():
    logits = np.random.default_rng(0).normal(size=(40, 7))
    labels = np.random.default_rng(1).integers(0, 7, 40)
    result = sums(logits, labels)
    order = np.argsort(-logits, axis=1)
    assert result["count"] == 40
    assert result["top1"] == np.sum(order[:, 0] == labels)
    assert result["top5"] == np.sum(order[:, :5] == labels[:, None])
    expected = np.sum(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(40), labels])
    np.testing.assert_allclose(result["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(("label", "top1"), [(0, 0), (1, 1), (2, 0)])
def test_ties_go_to_the_first_category(label, top1):
    assert sums([[0.0, 1.0, 1.0]], [label])["top1"] == top1


def test_constant_logits_are_right_about_one_category_in_seven():
    result = sums(np.zeros((7, 7)), np.arange(7))
    assert (result["top1"], result["top5"]) == (1, 5)


def test_masked_samples_count_nowhere():
    logits = [[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]]
    result = sums(logits, [0, 1, 0], mask=[True, False, True])
    kept = sums([logits[0], logits[2]], [0, 0])
    assert result == kept
    assert result["count"] == 2


def test_masked_nan_does_not_reach_the_loss():
    result = sums([[2.0, 0, 0], [np.nan] * 3], [0, 1], mask=[True, False])
    assert result == sums([[2.0, 0, 0]], [0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [slice(None), 0, 3])
def test_nan_and_infinity_are_wrong(value, where):
    logits = np.zeros((1, 7))
    logits[0, where] = value
    result = sums(logits, [0])
    assert (result["count"], result["top1"], result["top5"]) == (1, 0, 0)
    assert not np.isfinite(result["loss"])


def test_fewer_than_five_categories_are_all_in_the_top_five():
    assert sums([[3.0, 2.0, 1.0]], [2])["top5"] == 1


def test_dtypes():
    result = classification_sums(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32), jnp.ones(2, bool))
    assert {name: value.dtype for name, value in result.items()} == {
        "count": jnp.int32, "top1": jnp.int32, "top5": jnp.int32, "loss": jnp.float32
    }  # fmt: skip


def test_no_jit():
    with jax.disable_jit():
        assert sums([[0.0, 1.0]], [1])["top1"] == 1


def test_nan_is_wrong_with_few_categories():
    assert sums([[np.nan] * 3], [0])["top5"] == 0
