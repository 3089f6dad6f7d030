"""The results of a run: what is measured, written and printed at its end."""

import functools
import importlib.metadata
import logging
import math
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cskd_jax.console import duration
from cskd_jax.data import ImageDataset
from cskd_jax.errors import UserError
from cskd_jax.files import csv_text, write_json, write_text
from cskd_jax.inputs import is_count, is_list, is_map, is_number, is_optional, is_text, read_json, unsound
from cskd_jax.models import count_parameters
from cskd_jax.runs import schema
from cskd_jax.runs.imports import read_origin
from cskd_jax.runs.trained import Given
from cskd_jax.training.metrics import Task, task_that_measured
from cskd_jax.training.prediction import parameters_of
from cskd_jax.training.trainer import Result

_logger = logging.getLogger(__name__)

RESULTS = "results.json"
_CONFUSIONS = "confusion_matrix.csv"
# File in the workdir of a `distill` call, which has no configuration.
DISTILLATION = "distillation.json"
# Files and folders that a run writes into its workdir, besides its lock.
FILES = (RESULTS, "config.json", "metrics.jsonl", _CONFUSIONS)
FOLDERS = ("tensorboard", "teacher", "student")
# Packages whose versions affect the numbers.
_PACKAGES = ("cskd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def _is_evaluation(value, keys=("epoch",)):
    """Returns whether a value has the metrics of a split, including a score that is a fraction."""
    if not is_map(is_number)(value) or not all(is_count(value.get(key)) for key in keys):
        return False
    score = value.get(task_that_measured(value).score)
    return score is not None and 0 <= score <= 1


# Keys of a configuration; the runs of this package have about a hundred.
_MAX_KEYS = 2_000
_MEMBER = {"model": is_text, "width": is_optional(is_number), "checkpoint": is_text, "digest": is_text}
_ENTRY = {
    "width": is_optional(is_number),
    "images_per_second": is_optional(is_number),
    "chosen_on": lambda value: value in ("test", "validation"),
    "by_category": is_map(is_optional(is_number)),
    "digest": is_text,
    "checkpoint": is_text,
    "step": is_count,
    "import": is_map(is_text),
    "best": _is_evaluation,
    "members": is_list(lambda value: not unsound(value, _MEMBER)),
}
_PARAMETERS = functools.partial(is_count, low=1)


def _is_student(value):
    needed = {"model": is_text, "parameters": _PARAMETERS, "last": _is_evaluation, "best": _is_evaluation}
    return not unsound(value, needed, _ENTRY)


def _is_teacher(value):
    """Returns whether a value describes a teacher; if the teacher was given, no epoch is known.

    A given teacher that has other classes than the data has no evaluation.
    """
    last = {"last": functools.partial(_is_evaluation, keys=())}
    given = isinstance(value, dict) and "digest" in value
    needed = {"parameters": _PARAMETERS} | ({"checkpoint": is_text} if given else last)
    return not unsound(value, needed, _ENTRY | last)


def _is_config(value):
    if not isinstance(value, dict) or len(value) > _MAX_KEYS:
        return False
    needed = {"method": is_text, "dataset.name": is_text, "student.name": is_text}
    return not unsound(value, needed) and not schema.wrong_types(value)


_COUNTS = ("categories", "train_examples", "test_examples")
_NEEDED = {
    "method": is_text,
    "seed": is_count,
    "teacher": is_optional(_is_teacher),
    "student": _is_student,
    "dataset": lambda value: not unsound(value, {"name": is_text} | dict.fromkeys(_COUNTS, is_count)),
    "devices": lambda value: not unsound(value, {"count": is_count, "kind": is_text}),
    "versions": lambda value: not unsound(value, {"cskd_jax": is_text}),
    "config": _is_config,
}


def read_results(path: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a results.json that a run wrote.

    Raises:
      UserError: It is damaged, or something is missing or has another type.
    """
    results = read_json(path)
    missing = sorted(_NEEDED.keys() - results.keys())
    if missing:
        refuse_distillation(path.parent)
        raise UserError(f"{path} is not the result of a run: it is missing {', '.join(missing)}")
    wrong = unsound(results, _NEEDED)
    if wrong:
        raise UserError(f"{path} is not a valid result of a run: something is missing or wrong in {', '.join(wrong)}")
    if not _is_of_one_task(results):
        raise UserError(f"{path} is not a valid result of a run: its evaluations have the metrics of different tasks")
    return results


def read_validation(path: pathlib.Path) -> dict[str, Any]:
    """Returns the metrics on the validation split after the last epoch; raises UserError like `read_results`."""
    validation = read_results(path)["student"].get("validation")
    if unsound(validation, {"last": functools.partial(_is_evaluation, keys=())}):
        raise UserError(f"{path} has no valid evaluation on a validation split")
    return validation["last"]


def _is_of_one_task(results):
    """Returns whether all evaluations of the networks, which have passed their tests, have the score of one task."""
    entries = [results["student"], results["teacher"] or {}]
    found = [entry[epoch] for entry in entries for epoch in ("last", "best") if epoch in entry]
    scores = {task_that_measured(values).score for values in found}
    return len(scores) == 1


def read_score(path: pathlib.Path) -> str:
    """Returns the score of the student, as in "last top-1 0.9804"; raises UserError like `read_results`."""
    last = read_results(path)["student"]["last"]
    return f"last {task_that_measured(last).describe(last)}"


def refuse_distillation(workdir: pathlib.Path) -> None:
    """Raises UserError for the workdir of a `distill` call, which commands cannot read."""
    if (workdir / DISTILLATION).is_file():
        several = "" if (workdir / "student").is_dir() else ", name=NAME"
        raise UserError(
            f"{workdir} holds a run of cskd_jax.distill, not of a recipe: cskd_jax.load_run({str(workdir)!r}, "
            f"student=MODULE{several}) reads it"
        )


def read_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def describe(network: Mapping[str, Any], variables: Any, evaluations: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entry of a network in results.json.

    Args:
      network: {"name", "width"}, or {"name"} of a network that is not part of this package.
      variables: Variables of the network.
      evaluations: {"last": {"epoch", metrics}, "best": ..., "images_per_second"}, or a part of it. If a validation
        split chose the best epoch, also {"chosen_on": "validation", "validation": {"last": ..., "best": ...}}.
    """
    return {
        "model": network["name"],
        "width": network.get("width"),
        "parameters": count_parameters(parameters_of(variables)),
        "images_per_second": None,
        **evaluations,
    }


def describe_teachers(
    teachers: Sequence[Given], weights: Sequence[float], combine: str, evaluation: Mapping[str, float] | None
) -> dict[str, Any]:
    """Returns the entry of given teachers in results.json; several form one entry that lists each of its "members".

    Args:
      teachers: The teachers.
      weights: Weight of each in the combination.
      combine: What the combination averages.
      evaluation: Metrics of the teacher, or of the combination, on the test split; None if it has other classes.
    """
    last = {} if evaluation is None else {"last": dict(evaluation)}
    entries = []
    for teacher in teachers:
        saved, origin = teacher.saved, read_origin(teacher.path)
        source = {"checkpoint": teacher.path, "step": saved.step, "digest": saved.digest}
        source |= {} if origin is None else {"import": origin}
        entries.append(describe(saved.record.network, saved.variables, source))
    if len(entries) == 1:
        return entries[0] | last
    members = [entry | {"weight": float(weight)} for entry, weight in zip(entries, weights, strict=True)]
    texts = {key: " + ".join(entry[key] for entry in entries) for key in ("model", "checkpoint", "digest")}
    texts["digest"] += f" ({combine} by {', '.join(f'{weight:g}' for weight in weights)})"
    parameters = sum(entry["parameters"] for entry in entries)
    one = {"width": None, "parameters": parameters, "images_per_second": None, **last}
    return {**texts, **one, "members": members}


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
    if dataset.official is not None:
        entry["official"] = dataset.official
    return entry


def write_results(
    workdir: pathlib.Path, results: dict[str, Any], categories: Sequence[str], confusions: np.ndarray | None
) -> None:
    """Writes the confusion matrix, if there is one, and then results.json, which marks the run as done."""
    if confusions is not None:
        try:
            write_confusions(workdir / _CONFUSIONS, categories, confusions)
        except (OSError, ValueError) as error:  # The run has taken long, and its results do not depend on this file.
            _logger.warning("%s was not written: %s", workdir / _CONFUSIONS, error)
    write_finite(workdir / RESULTS, results)


def write_finite(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes results as JSON; numbers that are not finite become null, with a warning, so that the rest is kept."""
    finite = _finite(results)
    if finite != results:
        _logger.warning("%s: numbers that are not finite are written as null", path)
    write_json(path, finite)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_finite(inner) for inner in value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_confusions(path: pathlib.Path, categories: Sequence[str], confusions: np.ndarray) -> None:
    """Writes the matrix as CSV, with the classes as header and first column."""
    rows = ([category, *row] for category, row in zip(categories, confusions.tolist(), strict=True))
    write_text(path, csv_text([["true class \\ predicted class", *categories], *rows], line_end="\r\n"))


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
            width = "" if entry["width"] is None else f", width {entry['width']:g}"
            size = f"{entry['model']}{width}, {entry['parameters']:,} parameters"
            last = f", last {score_name} {entry['last'][score]:.4f}" if "last" in entry else ""
            say(f"{name}: {size}{last}{best}")
    say(f"done in {duration(seconds)}: {path}")
