"""Measurements of trained networks: scores, size, operations and latency."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cskd_jax.data import ImageDataset
from cskd_jax.data.fingerprint import fingerprint
from cskd_jax.distributed.devices import Devices
from cskd_jax.errors import printable
from cskd_jax.models import count_parameters
from cskd_jax.runs.build import TrainedNetwork, make_evaluation, make_normalize
from cskd_jax.runs.results import describe_dataset, read_versions
from cskd_jax.training.embedding import Tightness
from cskd_jax.training.metrics import check_measured
from cskd_jax.training.prediction import parameters_of

FLOPS_MEANING = (
    "floating-point operations of one image in evaluation mode, from XLA's cost analysis of the program before the "
    "compiler's changes, which is the same on every device: a multiplication and an addition count as two, products "
    "with padding are not counted; of a batch of config.batch_size, or of the test split if that is smaller, divided "
    "by its size"
)
LATENCY_MEANING = (
    "median time in ms from pixels on one device to logits, after compilation and a first run, without the transfer of "
    "the images"
)
_REPETITIONS, _SECONDS = 100, 5.0  # Limits for one timing.


def evaluate_all(
    networks: Mapping[str, TrainedNetwork],
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    devices: Devices,
    with_embedding: bool = False,
) -> dict[str, Any]:
    """Returns the content of evaluation.json.

    Args:
      networks: Networks by name.
      config: Configuration, which gives the normalization of the images and the batch size.
      dataset: Data set, whose test split is used.
      devices: Devices to compute on.
      with_embedding: Whether the embeddings are measured too; see `embedding.measure`.
    """
    meanings = {"flops_per_image": FLOPS_MEANING, "latency_ms": LATENCY_MEANING}
    if with_embedding:
        from cskd_jax.evaluate import embedding  # Its imports take a second.

        embedding.check(dataset)
    entries = {name: evaluate(name, network, config, dataset, devices) for name, network in networks.items()}
    if with_embedding:
        meanings["embedding"] = embedding.MEANING
        for name, network in networks.items():
            entries[name]["embedding"] = embedding.measure(network, dataset, make_normalize(config))
    return {
        "networks": entries,
        "dataset": describe_dataset(dataset)
        | {"path": config.dataset.path, "data_dir": config.dataset.data_dir, "fingerprint": fingerprint(dataset)},
        "batch_size": config.batch_size,
        **meanings,
        "devices": devices.describe(),
        "versions": read_versions(),
    }


def evaluate(
    name: str, trained: TrainedNetwork, config: ml_collections.ConfigDict, dataset: ImageDataset, devices: Devices
) -> dict[str, Any]:
    """Measures one network.

    Args:
      name: Name of the network, for messages.
      trained: Trained network.
      config: Configuration that gives the normalization of images and the batch size.
      dataset: Data set whose test split is used.
      devices: Devices that compute the scores.

    Returns:
      A dict {"model", "width", "step" of the checkpoint, "finished", "parameters", "flops_per_image", "latency_ms":
      {"batch SIZE": float}, the metrics of the task and "loss", "by_category": {class: score}}.

    Raises:
      UserError: A metric is not finite.
    """
    network, saved = trained.network, trained.saved
    evaluation, normalize = make_evaluation(network, config, dataset, devices), make_normalize(config)
    values, scores, _ = evaluation.all(devices.replicate(saved.variables))
    check_measured(name, values)

    def predict(variables, images):
        return network.apply(variables, normalize(images), train=False)[0].logits

    latencies, variables = {}, jax.device_put(saved.variables)
    largest = min(config.batch_size, len(dataset.test.labels))
    for size in sorted({1, largest}):
        images = jnp.asarray(np.resize(dataset.test.images[:size], (size, *dataset.image_shape)))
        lowered = jax.jit(predict).lower(variables, images)
        latencies[f"batch {size}"] = latency(lowered.compile(), variables, images)
    analysis: Any = lowered.cost_analysis()
    return {
        "model": saved.record.network["name"],
        "width": saved.record.network["width"],
        "step": saved.step,
        "finished": saved.record.finished,
        "parameters": count_parameters(parameters_of(saved.variables)),
        "flops_per_image": analysis["flops"] / largest,
        "latency_ms": latencies,
        **values,
        "by_category": dict(zip(dataset.categories, scores.tolist(), strict=True)),
    }


def latency(program: Callable[..., jax.Array], *arguments: Any) -> float:
    """Returns the median time of a call in ms.

    It is the median of at most 100 calls in about 5 seconds, after a first call that does not count.
    """
    program(*arguments).block_until_ready()
    times, end = [], time.perf_counter() + _SECONDS
    while len(times) < _REPETITIONS and (not times or time.perf_counter() < end):
        start = time.perf_counter()
        program(*arguments).block_until_ready()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def tables(evaluation: dict[str, Any], names: dict[str, str]) -> str:
    """Returns a line about the data and two human-readable tables: the networks, and their classes.

    Args:
      evaluation: Result of `evaluate_all`.
      names: Human-readable names of the metrics.
    """
    networks = evaluation["networks"]
    rows = {
        "network": [f"{n['model']}, width {n['width']:g}" for n in networks.values()],
        "step": [f"{n['step']:,}" + ("" if n["finished"] else " (unfinished)") for n in networks.values()],
    }
    for metric, name in names.items():
        if all(metric in n for n in networks.values()):
            rows[name] = [f"{n[metric]:.4f}" for n in networks.values()]
    if all("embedding" in n for n in networks.values()):
        rows["nearest neighbors"] = [f"{n['embedding']['knn']:.4f}" for n in networks.values()]
        rows["linear probe"] = [f"{n['embedding']['probe']:.4f}" for n in networks.values()]
        found = [Tightness(n["embedding"]["within"], n["embedding"]["between"]) for n in networks.values()]
        rows["within / between"] = [f"{one.ratio:.4f}" if one.between else "-" for one in found]
    rows["loss"] = [f"{n['loss']:.4f}" for n in networks.values()]
    rows["parameters"] = [f"{n['parameters']:,}" for n in networks.values()]
    rows["million FLOPs per image"] = [f"{n['flops_per_image'] / 1e6:,.2f}" for n in networks.values()]
    for size in next(iter(networks.values()))["latency_ms"]:
        rows[f"latency, {size}, ms"] = [f"{n['latency_ms'][size]:,.2f}" for n in networks.values()]
    first = _align([["", *networks], *([name, *cells] for name, cells in rows.items())])
    scores = [n["by_category"] for n in networks.values()]
    second = _align([["class", *networks], *([printable(c), *(f"{s[c]:.4f}" for s in scores)] for c in scores[0])])
    return f"{_describe_data(evaluation['dataset'])}\n\n{first}\n\n{second}"


def _describe_data(data: Mapping[str, Any]) -> str:
    """Describes the test images, such as "digits: 357 test images, data fingerprint 0123456789abcdef"."""
    folder = data["path"] or data["data_dir"]
    where = f" from {folder}" if folder else ""
    unofficial = ", not prepared from the official archive" if data.get("official") is False else ""
    text = f"{data['name']}{where}: {data['test_examples']:,} test images, data fingerprint {data['fingerprint']}"
    return printable(text + unofficial)


def _align(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as text in columns, the first flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
