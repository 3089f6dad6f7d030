"""The results of a run: what is measured, written and printed at its end."""

import csv
import importlib.metadata
import io
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cskd_jax.console import duration
from cskd_jax.data import ImageDataset
from cskd_jax.files import write_json, write_text
from cskd_jax.models import count_parameters
from cskd_jax.training.metrics import Task
from cskd_jax.training.trainer import Result

RESULTS = "results.json"
# Files that a run writes into its workdir, besides its lock.
WRITTEN = (RESULTS, "config.json", "metrics.jsonl", "confusion_matrix.csv", "tensorboard", "teacher", "student")
# Packages whose versions decide the numbers.
_PACKAGES = ("cskd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def read_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def describe(network: Mapping[str, Any], variables: Any, evaluations: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entry of a network in results.json.

    Args:
      network: {"name", "width"}, or {"name"} of a network that is not part of this package.
      variables: Variables of the network.
      evaluations: {"last": {"epoch", metrics}, "best": ..., "images_per_second"}, or a part of it. Where a validation
        split has chosen the best epoch, {"chosen_on": "validation", "validation": {"last": ..., "best": ...}} besides.
    """
    return {
        "model": network["name"],
        "width": network.get("width"),
        "parameters": count_parameters(variables["params"]),
        "images_per_second": None,
        **evaluations,
    }


def describe_result(network: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """Returns the entry of a network that was trained here in results.json."""
    evaluations = {"last": result.last, "best": result.best, "images_per_second": result.images_per_second}
    if result.validation:
        evaluations |= {"chosen_on": "validation", "validation": result.validation}
    return describe(network, result.variables, evaluations)


def describe_dataset(dataset: ImageDataset) -> dict[str, Any]:
    """Returns the entry of the data in results.json."""
    entry = {
        "name": dataset.name,
        "categories": dataset.num_classes,
        "train_examples": len(dataset.train.labels),
        "test_examples": len(dataset.test.labels),
    }
    if dataset.validation is not None:
        entry["validation_examples"] = len(dataset.validation.labels)
    return entry


def write_results(
    workdir: pathlib.Path, results: dict[str, Any], categories: Sequence[str], confusions: np.ndarray | None
) -> None:
    """Writes the confusion matrix, if there is one, and then results.json, which marks the run as done."""
    if confusions is not None:
        write_confusions(workdir / "confusion_matrix.csv", categories, confusions)
    write_json(workdir / RESULTS, results)


def write_confusions(path: pathlib.Path, categories: Sequence[str], confusions: np.ndarray) -> None:
    """Writes the matrix as CSV, with the categories as header and first column."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["category \\ taken for", *categories])
    writer.writerows([category, *row] for category, row in zip(categories, confusions.tolist(), strict=True))
    write_text(path, table.getvalue())


def say_results(
    results: dict[str, Any], task: Task, path: pathlib.Path, seconds: float, say: Callable[[str], None]
) -> None:
    """Shows the results at the end of a run."""
    score, score_name = task.score, task.names[task.score]
    for name in ("teacher", "student"):
        if results[name] is not None:
            entry = results[name]
            best = entry.get("best")
            chosen_on = f"chosen on the {entry.get('chosen_on', 'test')} split"
            best = f" (best {best[score]:.4f}, epoch {best['epoch']}, {chosen_on})" if best else ""
            size = f"{entry['model']}, width {entry['width']:g}, {entry['parameters']:,} parameters"
            say(f"{name}: {size}, last {score_name} {entry['last'][score]:.4f}{best}")
    say(f"done in {duration(seconds)}: {path}")
