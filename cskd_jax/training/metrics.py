"""Metrics of classification: with one class per image, and with any number of them (multi-label)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from cskd_jax.data import ImageDataset
from cskd_jax.errors import UserError
from cskd_jax.inputs import is_number
from cskd_jax.losses import gather_batch, sum_batch

# With this many classes or fewer, top-5 accuracy is meaningless: the top five are half of the classes or more.
_FEW_CATEGORIES = 10


def classification_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns sums over a batch, from which the accuracies and the mean loss of a split are computed.

    Args:
      logits: float [B, C].
      labels: int [B].
      mask: bool [B]; False for padding, which is ignored.

    Returns:
      `count`, `top1`, `top5` (int32; a sample counts for top-k if fewer than k classes score higher than its own,
      with ties in the order of the classes), and `loss`, the summed cross-entropy.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1], dtype=labels.dtype) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=1)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # Comparisons with NaN are False, so without this a diverged network would seem right about every image.
    rank = jnp.where(jnp.isfinite(loss), rank, jnp.iinfo(rank.dtype).max)
    return {
        "count": jnp.sum(mask, dtype=jnp.int32),
        "top1": jnp.sum(mask & (rank < 1), dtype=jnp.int32),
        "top5": jnp.sum(mask & (rank < 5), dtype=jnp.int32),
        "loss": jnp.sum(jnp.where(mask, loss, 0)),
    }


def mean_average_precision(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean of `average_precision` over the classes that have samples, in [0, 1]; 0 if none has."""
    has_samples = jnp.any(labels > 0, axis=0)
    values = average_precision(scores, labels)
    return jnp.sum(values) / jnp.maximum(jnp.sum(has_samples), 1).astype(values.dtype)


def average_precision(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the average precision of each class when the samples are ranked by its score.

    The value of a class is the mean, over its samples j, of the precision among the samples that score at least as
    high as j, as in scikit-learn's average_precision_score. It takes O(N C log N) time and O(N C) memory.

    Args:
      scores: float [N, C], higher for a more confident yes.
      labels: [N, C], above 0 if a sample belongs to a class.

    Returns:
      [C] in [0, 1], at least float32; 0 for a class without samples.
    """
    order = jnp.argsort(-scores, axis=0)
    scores = jnp.take_along_axis(scores, order, axis=0)
    positive = jnp.take_along_axis(labels > 0, order, axis=0)
    # Samples with equal scores share a threshold, so all samples up to the last of them count.
    position = jnp.arange(len(scores), dtype=jnp.int32)[:, None]
    is_last = jnp.concatenate([scores[:-1] != scores[1:], jnp.ones_like(positive[:1])])
    last = lax.cummin(jnp.where(is_last, position, len(scores) - 1), axis=0, reverse=True)
    hits = jnp.take_along_axis(jnp.cumsum(positive, axis=0, dtype=jnp.int32), last, axis=0)
    dtype = np.promote_types(scores.dtype, np.float32)
    precision = hits.astype(dtype) / (last + 1).astype(dtype)
    count = jnp.sum(positive, axis=0).astype(dtype)
    return jnp.sum(jnp.where(positive, precision, 0), axis=0) / jnp.maximum(count, 1)


class Task(NamedTuple):
    """A kind of labels: how a network learns from them alone, and how it is evaluated.

    Attributes:
      supervision: Loss of `LOSSES` that a teacher is trained with.
      score: Metric of a split that decides which epoch is best; greater is better.
      names: {metric of a split: its human-readable name}, without the loss; top-5 is only measured with more than ten
        categories.
      measure_step: (logits, labels, axis_name) -> {`score`: scalar}; the mean over devices is that of the global batch.
      measure_batch: (logits, labels, mask, axis_name) -> the input of `summarize` for a batch, equal on all devices.
      summarize: (the results of `measure_batch` for each batch of a split, in order, on the host; the labels of the
        split) -> {metric: value}, including `loss`.
      by_category: (the same two arguments, C) -> the score of each class, float [C], and the confusion matrix, int
        [C, C], which counts the images by true class (row) and predicted class (column); None where it has no
        meaning.
    """

    supervision: str
    score: str
    names: dict[str, str]
    measure_step: Callable[[jax.Array, jax.Array, str | None], dict[str, jax.Array]]
    measure_batch: Callable[[jax.Array, jax.Array, jax.Array, str | None], Any]
    summarize: Callable[[Sequence[Any], np.ndarray], dict[str, float]]
    by_category: Callable[[Sequence[Any], np.ndarray, int], tuple[np.ndarray, np.ndarray | None]]

    def describe(self, values: Mapping[str, Any]) -> str:
        """Returns the metrics of a split as readable text, without the loss."""
        return ", ".join(f"{name} {values[metric]:.4f}" for metric, name in self.names.items() if metric in values)


def task_of(multilabel: bool) -> Task:
    """Returns the task of a data set whose images have one class each, or several."""
    return MULTI_LABEL if multilabel else SINGLE_LABEL


def training_task_of(data: ImageDataset) -> Task:
    """Returns the task of the training split of a data set; without labels, its steps measure nothing."""
    task = task_of(data.multilabel)
    return task._replace(measure_step=_nothing) if data.unlabeled else task


def task_that_measured(values: dict[str, float]) -> Task:
    """Returns the task that produced these metrics of a split."""
    return task_of(MULTI_LABEL.score in values)


def check_measured(network: str, values: Mapping[str, float]) -> None:
    """Raises UserError if a metric of a network on the test split is not a number that results.json can hold.

    Args:
      network: Which network it is, for the message.
      values: Metrics of the split.
    """
    for name, value in values.items():
        if not is_number(value):
            raise UserError(
                f"{network}: its {name} is {value:g} on the test split; it must be a finite number below 1e30: the "
                "weights are damaged, or are those of another model"
            )


def _nothing(logits, labels, axis_name):
    del logits, labels, axis_name
    return {}


def _batch_top1(logits, labels, axis_name):
    del axis_name
    return {"top1": jnp.mean(jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels)}


def _classification_sums(logits, labels, mask, axis_name):
    sums = classification_sums(logits, labels, mask)
    if logits.shape[1] <= _FEW_CATEGORIES:
        del sums["top5"]
    predicted = gather_batch(jnp.argmax(logits, axis=-1).astype(jnp.int32), axis_name)
    return sum_batch(sums, axis_name), predicted


def _divide_sums(batches, labels):
    del labels
    totals = {name: sum(sums[name] for sums, _ in batches) for name in batches[0][0]}
    count = int(totals.pop("count"))
    return {name: float(total) / count for name, total in totals.items()}


def _confusions(batches, labels, num_classes):
    # Padding comes after the last image of the split.
    predicted = np.concatenate([of_batch for _, of_batch in batches])[: len(labels)]
    matrix = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    return np.diagonal(matrix) / np.maximum(matrix.sum(axis=1), 1), matrix


def _batch_average_precision(logits, labels, axis_name):
    logits, labels = (gather_batch(x, axis_name) for x in (lax.stop_gradient(logits), labels))
    return {"mean_average_precision": mean_average_precision(logits, labels)}


def _logits(logits, labels, mask, axis_name):
    del labels, mask
    return gather_batch(logits, axis_name)


def _summarize_logits(batches, labels):
    # Padding comes after the last image of the split.
    return jax.tree.map(float, _multilabel_metrics(np.concatenate(batches)[: len(labels)], labels))


def _average_precisions(batches, labels, num_classes):
    del num_classes
    scores: Any = np.concatenate(batches)[: len(labels)]
    return np.asarray(average_precision(scores, labels)), None


@jax.jit
def _multilabel_metrics(logits, labels):
    loss = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)))
    return {"mean_average_precision": mean_average_precision(logits, labels), "loss": loss}


SINGLE_LABEL = Task(
    supervision="cross_entropy",
    score="top1",
    names={"top1": "top-1", "top5": "top-5"},
    measure_step=_batch_top1,
    measure_batch=_classification_sums,
    summarize=_divide_sums,
    by_category=_confusions,
)
MULTI_LABEL = Task(
    supervision="binary_cross_entropy",
    score="mean_average_precision",
    names={"mean_average_precision": "mean average precision"},
    measure_step=_batch_average_precision,
    measure_batch=_logits,
    summarize=_summarize_logits,
    by_category=_average_precisions,
)
