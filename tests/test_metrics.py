"""Ranks, masks and ties of the classification metrics; mean average precision against scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from cskd_jax.losses import LOSSES
from cskd_jax.training.metrics import MULTI_LABEL, SINGLE_LABEL, classification_sums, mean_average_precision, task_of


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_no_jit():
    with jax.disable_jit():
        assert sums([[0.0, 1.0]], [1])["top1"] == 1


def test_nan_is_wrong_with_few_categories():
    assert sums([[np.nan] * 3], [0])["top5"] == 0


def average_precision(scores, labels):
    """By scikit-learn, category by category; those without samples are left out."""
    return np.mean([average_precision_score(y, s) for y, s in zip(labels.T, scores.T, strict=True) if y.any()])


@pytest.mark.parametrize("num_samples", [1, 2, 50])
@pytest.mark.usefixtures("x64")
def test_mean_average_precision_is_that_of_scikit_learn(num_samples):
    rng = np.random.default_rng(num_samples)
    scores = rng.normal(size=(num_samples, 8))
    scores[:, :4] = np.rint(2 * scores[:, :4])  # ties
    labels = rng.integers(0, 2, (num_samples, 8)).astype(np.float32)
    labels[:, 2], labels[:, 3], labels[0, 5] = 0, 1, 1
    value = jax.jit(mean_average_precision)(scores, labels)
    np.testing.assert_allclose(value, average_precision(scores, labels), rtol=1e-12)


@pytest.mark.slow
def test_equal_scores_share_a_threshold():
    assert mean_average_precision(jnp.zeros((4, 1)), jnp.array([[1.0], [0], [0], [0]])) == 0.25


def test_mean_average_precision_without_any_label_is_zero():
    assert mean_average_precision(jnp.zeros((4, 3)), jnp.zeros((4, 3))) == 0


@pytest.mark.parametrize("num_devices", [None, 1, 2, 8])
def test_multilabel_split_counts_every_image_once(num_devices):
    """Two batches of 16, the second with 5 images and padding that would change both metrics."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(32, 4)).astype(np.float32), rng.integers(0, 2, (32, 4)).astype(np.float32)
    logits[21:], labels[21:], mask = 50, 0, np.arange(32) < 21

    def measure(*batch, axis_name=None):
        return MULTI_LABEL.measure_batch(*batch, axis_name)

    if num_devices is not None:
        devices = jax.devices()[:num_devices]
        measure = jax.pmap(functools.partial(measure, axis_name="d"), "d", out_axes=None, devices=devices)
    measured = []
    for rows in (slice(16), slice(16, 32)):
        batch = logits[rows], labels[rows], mask[rows]
        if num_devices is not None:
            batch = [x.reshape(num_devices, -1, *x.shape[1:]) for x in batch]
        measured.append(jax.device_get(measure(*batch)))
    values = MULTI_LABEL.summarize(measured, labels[:21])
    assert values.keys() == {"mean_average_precision", "loss"}
    np.testing.assert_allclose(values["mean_average_precision"], average_precision(logits[:21], labels[:21]), rtol=1e-6)
    expected = np.log1p(np.exp(logits[:21])) - labels[:21] * logits[:21]
    np.testing.assert_allclose(values["loss"], expected.mean(), rtol=1e-5)


def test_multilabel_step_measures_the_global_batch():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(16, 4)).astype(np.float32), rng.integers(0, 2, (16, 4)).astype(np.float32)
    measure = jax.pmap(lambda *batch: MULTI_LABEL.measure_step(*batch, "d"), "d", devices=jax.devices()[:4])
    values = measure(scores.reshape(4, 4, 4), labels.reshape(4, 4, 4))[MULTI_LABEL.score]
    np.testing.assert_allclose(values, average_precision(scores, labels), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_multilabel_loss_of_a_diverged_network_is_not_finite(value):
    assert not np.isfinite(MULTI_LABEL.summarize([np.full((3, 2), value, np.float32)], np.eye(3, 2))["loss"])


@pytest.mark.parametrize("multilabel", [False, True])
def test_tasks_name_methods_and_metrics(multilabel):
    task = task_of(multilabel)
    assert LOSSES[task.supervision].multilabel is multilabel
    assert task.score in task.names
    logits, labels = jnp.eye(2, dtype=jnp.float32), jnp.eye(2) if multilabel else jnp.arange(2)
    assert task.measure_step(logits, labels, None).keys() == {task.score}, "a step is measured as a split is"
    assert task.describe(dict.fromkeys(task.names, 0.5)).endswith(" 0.5000")


def test_confusions_by_category():
    labels = np.array([0, 1, 1, 2, 1])
    batches = [({}, np.array([0, 1])), ({}, np.array([2, 0, 1, 0, 0]))]  # the last two are padding
    scores, matrix = SINGLE_LABEL.by_category(batches, labels, 4)
    assert matrix.tolist() == [[1, 0, 0, 0], [0, 2, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(scores, [1, 2 / 3, 0, 0])


def test_average_precision_by_category():
    scores, labels = np.array([[0.9, 0.1], [0.8, 0.7], [0.1, 0.2]], np.float32), np.array([[0, 1], [1, 1], [0, 0]])
    values, matrix = MULTI_LABEL.by_category([scores, scores], labels, 2)
    assert matrix is None
    np.testing.assert_allclose(values, [1 / 2, (1 + 2 / 3) / 2])
