"""Deviations: settings in which runs differ from their recipes, or from the other runs of a comparison."""

import collections
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from cskd_jax.console import counted
from cskd_jax.errors import UserError, printable
from cskd_jax.report.runs import Comparison, Run
from cskd_jax.runs import recipes, schema
from cskd_jax.runs.keys import indifferent

# Keys that do not change results, and keys whose values the title, the rows and the number of seeds already show.
_STATED = {"method", "seed", "dataset.name", "teacher.name", "teacher.width", "teacher.checkpoint", "teacher.others",
           "student.name", "student.width", *indifferent()}  # fmt: skip
MEANING = (
    "A row without a note follows the packaged recipe of its data set and method, and has the settings of most other "
    "rows. A note names the settings that differ; the value of the recipe, or of most other rows, is in parentheses."
)


class Marks(NamedTuple):
    """Notes on the rows of a comparison.

    Attributes:
      of_row: {row label or "teacher": its marks, such as "1, 3", or an empty string}.
      notes: Explanations of the marks, in order.
    """

    of_row: dict[str, str]
    notes: tuple[str, ...]


def mark(comparison: Comparison) -> Marks:
    """Returns the notes on deviations, one for each set of rows that share them."""
    deviations = find(comparison)
    rows_with: dict[str, list[str]] = {}
    for label, texts in deviations.items():
        for text in texts:
            rows_with.setdefault(text, []).append(label)
    texts_of: dict[tuple[str, ...], list[str]] = {}
    for text, labels in rows_with.items():
        texts_of.setdefault(tuple(labels), []).append(text)
    of_row = {
        label: ", ".join(str(number) for number, labels in enumerate(texts_of, 1) if label in labels)
        for label in deviations
    }
    return Marks(
        of_row, tuple(f"Note {number}: {'; '.join(texts)}." for number, texts in enumerate(texts_of.values(), 1))
    )


def find(comparison: Comparison) -> dict[str, list[str]]:
    """Returns the deviations, such as "epochs 6 (recipe 30)", by row label or "teacher"."""
    found = {}
    if comparison.distilled:
        texts = [text for run in comparison.distilled for text in _of_teacher(run)]
        found["teacher"] = list(dict.fromkeys(texts))
    usual = _usual(_student_settings(row.runs[0]) for row in comparison.rows)
    for row in comparison.rows:
        found[row.label] = list(_of_student(row.runs[0], usual))
    return found


def _of_student(run: Run, usual: Mapping[str, Any]) -> Iterator[str]:
    settings, recipe = _student_settings(run), _recipe(run)
    different = []
    if recipe is None:
        yield _no_recipe(run)
    else:
        expected = {key: value for key, value in recipe.items() if key not in _STATED}
        if "teacher.epochs" not in settings:
            del expected["teacher.epochs"]
        different = _differences(settings, expected)
        yield from (_text(key, settings, "recipe", expected) for key in different)
    for key in settings:
        if key in usual and key not in different and settings[key] != usual[key]:
            yield _text(key, settings, "other rows", usual)


def _of_teacher(run: Run) -> Iterator[str]:
    """Yields the deviations of the teacher of a run, using the names that the keys have in the student's run."""
    if run.teacher_run is not None and run.teacher_role == "teacher":
        yield from _of_teacher(run.teacher_run)
        return
    if run.given_teacher and run.teacher_run is None:
        yield _unknown_teacher(run)
        return
    if run.teacher_run is not None and run.teacher_was_extended:
        since = run.teacher_run.config["epochs"]
        yield f"its run {run.teacher_run.folder.name} was trained further afterwards, to {counted(since, 'epoch')}"
    trained = run.teacher_run or run
    recipe = _recipe(trained)
    if recipe is None:
        yield _no_recipe(trained)
        return
    settings, expected = ({k: v for k, v in c.items() if k not in _STATED} for c in (trained.config, recipe))
    if run.teacher_run is not None:
        settings["teacher.epochs"] = run.teacher_epochs
    else:  # The losses are the student's; the teacher learned from the labels alone.
        settings, expected = ({k: v for k, v in c.items() if _loss(k) is None} for c in (settings, expected))
    for key in _differences(settings, expected):
        if key != "epochs":
            yield _text(key, settings, "recipe", expected)


def _unknown_teacher(run: Run) -> str:
    """Returns why it is not known how a given teacher was trained."""
    if "import" in run.results["teacher"]:
        return "how it was trained is not known: it was imported"
    unfinished = run.unfinished_teacher_run
    if unfinished is None:
        return "how it was trained is not known: its run is not among these"
    return f"how it was trained is not known: its run {printable(unfinished.name)} is not finished"


def _no_recipe(run: Run) -> str:
    return f"there is no packaged recipe of {run.config['dataset.name']} with this method to compare with"


def _student_settings(run: Run) -> dict[str, Any]:
    """Returns the settings that decide a student's results; an unknown teacher's own settings are left out."""
    settings = {key: value for key, value in run.config.items() if key not in _STATED}
    if run.teacher_run is not None:
        settings["teacher.epochs"] = run.teacher_epochs
    elif run.given_teacher != "":
        settings.pop("teacher.epochs", None)
    return settings


def _recipe(run: Run) -> Mapping[str, Any] | None:
    """Returns the configuration of the packaged recipe nearest to a run; None if no recipe has its method."""
    config = run.config
    pair = [(config[f"{role}.name"], config[f"{role}.width"]) for role in ("teacher", "student")]
    found = _packaged(config["dataset.name"], config["method"], *pair)
    return min(found, key=lambda recipe: len(_differences(config, recipe)), default=None)


@functools.cache
def _packaged(
    dataset: str, method: str, teacher: tuple[str | None, float], student: tuple[str, float]
) -> list[Mapping[str, Any]]:
    """Returns the configurations of the packaged recipes for a data set and a method."""
    pair = "/".join(f"{name}_{width}" if width != 1 else str(name) for name, width in (teacher, student))
    found = []
    for name in recipes.packaged_recipes():
        for word in (f"{pair}/{method}", method):
            try:
                config = schema.complete(schema.plain(recipes.packaged_recipe(name, word)))
            except UserError:
                continue  # A recipe for other methods or networks.
            if (config["dataset.name"], config["method"]) == (dataset, method):
                found.append(config)
    return found


def _usual(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the most frequent value of each setting that does not belong to a loss."""
    values: dict[str, list[Any]] = {}
    for settings in rows:
        for key, value in settings.items():
            if not key.startswith("losses."):
                values.setdefault(key, []).append(value)
    # Lists are not hashable, so their string representations are counted.
    return {key: found[_position_of_mode([repr(v) for v in found])] for key, found in values.items()}


def _position_of_mode(texts):
    return texts.index(collections.Counter(texts).most_common(1)[0][0])


def _differences(settings: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Returns the keys whose values differ; a loss that only one side has is represented by its weight alone."""
    alone = _losses(settings) ^ _losses(expected)
    details = {key for key in [*settings, *expected] if _loss(key) in alone and not key.endswith(".weight")}
    missing = object()
    keys = dict.fromkeys([*expected, *settings])
    return [k for k in keys if k not in details and settings.get(k, missing) != expected.get(k, missing)]


def _losses(settings):
    return {_loss(key) for key in settings} - {None}


def _loss(key):
    """Returns the name of the loss that a key belongs to; None if it belongs to none."""
    return key.split(".")[1] if key.startswith("losses.") else None


def _text(key, settings, source, expected):
    return f"{key} {_value(settings, key)} ({source} {_value(expected, key)})"


def _value(settings, key):
    value = settings.get(key)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
