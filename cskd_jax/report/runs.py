"""Finished runs, read from their folders and grouped into those that can be compared."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cskd_jax.configs import networks
from cskd_jax.errors import UserError, printable
from cskd_jax.files import entries_below
from cskd_jax.inputs import is_number, is_text, read_json, unsound
from cskd_jax.losses import LOSSES, Method
from cskd_jax.report.published import network_label, standard_position
from cskd_jax.report.statistics import Summary, summarize
from cskd_jax.runs import schema
from cskd_jax.runs.grid import TEACHER_FOLDER
from cskd_jax.runs.keys import indifferent
from cskd_jax.runs.results import RESULTS, read_results
from cskd_jax.runs.sweep import read_error
from cskd_jax.runs.workdir import DATA_FINGERPRINT
from cskd_jax.training.metrics import Task, task_that_measured
from cskd_jax.training.records import read_rows

# Settings that do not change what is compared; the seed is what is averaged over.
_BOOKKEEPING = {"seed", "teacher.checkpoint", "teacher.others", *indifferent()}
# Settings that the runs of one table share. The others, such as those of the losses, may vary with the method.
_COMMON = (
    "dataset.name", "dataset.train_examples", "dataset.validation_examples", "dataset.image_size", "epochs",
    "teacher.name", "teacher.width", "student.name", "student.width",
)  # fmt: skip
_EMBEDDING = {"knn": is_number, "probe": is_number, "within": is_number, "between": lambda v: is_number(v) and v > 0}
# No training run has this many epochs, and no chart shows this many points.
_MAX_POINTS = 20_000
# Characters of a row's label; the settings of a method are named in a few hundred.
_MAX_LABEL = 1_000


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
      folder: Workdir of the run.
      results: Content of results.json, with all strings made `printable`.
      teacher_run: Run that trained its teacher, if it is among the runs that were read.
      teacher_role: Which network of that run is its teacher, "student" or "teacher".
    """

    folder: pathlib.Path
    results: dict[str, Any]
    teacher_run: "Run | None" = None
    teacher_role: str = "student"

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Returns {key: value}; keys newer than the run have the values that it implied."""
        return schema.complete(self.results["config"])

    @functools.cached_property
    def data(self) -> str:
        """Returns the fingerprint of its data; "" if it was not recorded, or cannot be read."""
        try:
            found = read_json(self.folder / "config.json").get(DATA_FINGERPRINT)
        except (UserError, OSError):
            return ""
        return printable(str(found)) if is_text(found) else ""

    @property
    def task(self) -> Task:
        """Returns the task, which defines the score."""
        return task_that_measured(self.results["student"]["last"])

    @property
    def chosen_on(self) -> str:
        """Returns the split that chose the best epoch, "test" or "validation"."""
        return self.results["student"].get("chosen_on", "test")

    def score(self, epoch: str) -> float:
        """Returns the score of the student, in percent, after the "last" or the "best" epoch."""
        return 100 * self.results["student"][epoch][self.task.score]

    def teacher_score(self, epoch: str) -> float | None:
        """Returns the same score of the teacher; None if unknown, as for the best epoch of a given teacher."""
        entry = self.results["teacher"]
        if "last" not in entry:  # Its classes are not those of the data.
            return None
        if epoch not in entry and self.teacher_run is not None and not self.teacher_was_extended:
            trained = self.teacher_run
            return trained.teacher_score(epoch) if self.teacher_role == "teacher" else trained.score(epoch)
        return 100 * entry[epoch][self.task.score] if epoch in entry else None

    def curve(self) -> list[tuple[int, float]]:
        """Returns (epoch, score of the student in percent on the split `chosen_on`) of every epoch."""
        path, wanted, score = self.folder / "metrics.jsonl", ("student", self.chosen_on), self.task.score
        points = []
        for row in read_rows(path, evaluations=True):
            if (row["phase"], row["split"]) == wanted and 0 <= row.get(score, -1) <= 1:
                points.append((row["epoch"], 100 * row[score]))
            if len(points) > _MAX_POINTS:
                raise UserError(f"{path} has evaluations of more than {_MAX_POINTS:,} epochs")
        return points

    @property
    def given_teacher(self) -> str | None:
        """Returns the digest of a given teacher; "" if the run trained its teacher; None without one."""
        entry = self.results["teacher"]
        return None if entry is None else entry.get("digest", "")

    @functools.cached_property
    def teacher_epochs(self) -> int | None:
        """Returns how many epochs its teacher was trained; None without a teacher, or if that is not known."""
        if self.given_teacher == "":
            return self.config["teacher.epochs"]
        if self.teacher_run is None:
            return None
        if self.teacher_role == "teacher":
            return self.teacher_run.teacher_epochs
        # The run of the teacher may have been extended since. Its rows also count the epochs of a first phase.
        rows = read_rows(self.teacher_run.folder / "metrics.jsonl", evaluations=True)
        before = self.teacher_run.config["first_phase.epochs"]
        epochs = {row["step"]: row["epoch"] - before for row in rows if row["phase"] == "student"}
        return epochs.get(self.results["teacher"].get("step"), self.teacher_run.config["epochs"])

    @property
    def teacher_was_extended(self) -> bool:
        """Returns whether the run of its teacher was extended to more epochs after this run."""
        if self.teacher_run is None or self.teacher_role == "teacher":
            return False
        return self.teacher_epochs != self.teacher_run.config["epochs"]

    @property
    def unfinished_teacher_run(self) -> pathlib.Path | None:
        """Returns the folder of a run that trained its teacher but is not finished, or not any more; None otherwise."""
        folders = [folder.parent for folder in self.teacher_folders] if self.given_teacher else []
        is_run = ((folder / "config.json").is_file() and not (folder / RESULTS).exists() for folder in folders)
        return next((folder for folder, found in zip(folders, is_run, strict=True) if found), None)

    @functools.cached_property
    def embedding(self) -> dict[str, float] | None:
        """Returns what `evaluate --embedding` measured of the student after the last epoch; None if it did not."""
        return self._measured([self.folder / "student"], "student")

    @functools.cached_property
    def teacher_embedding(self) -> dict[str, float] | None:
        """Returns what `evaluate --embedding` measured of the teacher; None if it did not."""
        return self._measured(self.teacher_folders, "teacher", self.results["teacher"].get("step"))

    def _measured(self, folders, phase, step=None):
        """Returns what `evaluate` measured of the network in a folder at a step, by default the last one of a phase.

        What it measured on other data is left out.
        """
        for data, entry in itertools.chain.from_iterable(map(_evaluations, folders)):
            step = self._last_step(phase) if step is None else step
            if entry.get("step") == step and len({data, self.data} - {""}) < 2:
                return entry["embedding"]
        return None

    def _last_step(self, phase):
        rows = read_rows(self.folder / "metrics.jsonl", evaluations=True)
        return max((row["step"] for row in rows if row["phase"] == phase), default=-1)

    @property
    def has_several_teachers(self) -> bool:
        """Returns whether several teachers taught the student together."""
        return bool(self.results["teacher"] and self.results["teacher"].get("members"))

    @property
    def teacher_folders(self) -> list[pathlib.Path]:
        """Returns the folders that may hold the teacher's checkpoints, likeliest first; empty unless there is one."""
        if self.results["teacher"] is None or self.has_several_teachers:
            return []
        if self.given_teacher == "":
            return [self.folder / "teacher"]
        return self._near(self.results["teacher"]["checkpoint"])

    @property
    def folders_of_teachers(self) -> list[list[pathlib.Path]]:
        """Returns the folders that may hold the checkpoints of each of the teachers, likeliest first."""
        if self.has_several_teachers:
            return [self._near(member["checkpoint"]) for member in self.results["teacher"]["members"]]
        return [self.teacher_folders]

    def _near(self, checkpoint):
        """Returns the folders in which a checkpoint may lie, likeliest first."""
        given = pathlib.Path(checkpoint)
        # Folders near the run come first: its sweep may have been moved, and another sweep may have taken its place.
        near = [parent.joinpath(*given.parts[-2:]) for parent in _real(self.folder).parents]
        return [*near, given]


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ only in their seeds.

    Attributes:
      label: Name of the method, and the settings that distinguish the row from others of the same method.
      method: Method of all runs.
      runs: Runs in the order of their seeds.
    """

    label: str
    method: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> dict[str, Any]:
        """Returns the configuration of the first run."""
        return self.runs[0].config

    @property
    def has_teacher(self) -> bool:
        """Returns whether the runs have a teacher."""
        return self.runs[0].results["teacher"] is not None

    @property
    def losses(self) -> dict[str, type[Method]]:
        """Returns the losses of the method by name; an unknown one is treated as a plain `Method`."""
        names = {key.split(".")[1] for key in self.config if key.startswith("losses.")}
        return {name: LOSSES.get(name, Method) for name in sorted(names)}

    @property
    def is_baseline(self) -> bool:
        """Returns whether the only loss that uses a teacher declares itself a baseline."""
        distilling = [loss for loss in self.losses.values() if loss.needs_teacher]
        return self.has_teacher and len(distilling) == 1 and distilling[0].baseline

    @property
    def learns_from_labels(self) -> bool:
        """Returns whether the runs learn from the labels alone."""
        return all(loss.supervises for loss in self.losses.values())

    def scores(self, epoch: str) -> dict[int, float]:
        """Returns {seed: `Run.score`}."""
        return {run.results["seed"]: run.score(epoch) for run in self.runs}

    def summary(self, epoch: str) -> Summary:
        """Returns the summary of the scores."""
        return summarize(list(self.scores(epoch).values()))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs on the same data with the same networks, the same number of epochs, and the same given teacher, if any.

    Attributes:
      dataset: Name of the data set.
      data: Fingerprint of the data if there are comparisons of different data with this name; otherwise empty.
      teacher: Name of the teacher as in the published tables; empty if the recipe names none.
      student: Name of the student as in the published tables.
      rows: Methods without a teacher, then methods with one, each group sorted by mean score after the last epoch, best
        first.
      given_teacher: Prefix of the digest of the teacher if there are comparisons for several teachers; otherwise empty.
    """

    dataset: str
    data: str
    teacher: str
    student: str
    rows: tuple[Row, ...]
    given_teacher: str

    @property
    def runs(self) -> list[Run]:
        """Returns the runs of all rows."""
        return [run for row in self.rows for run in row.runs]

    @property
    def title(self) -> str:
        """Returns the data set and the networks, and digests of the data and of the teacher if they are ambiguous."""
        data = f" with fingerprint {self.data}" if self.data else ""
        which = f", teacher {self.given_teacher}" if self.given_teacher else ""
        return f"{self.dataset}{data}: {f'{self.teacher} → ' if self.teacher else ''}{self.student}{which}"

    @property
    def data_fingerprint(self) -> str:
        """Returns the fingerprint of the data; empty if no run recorded it."""
        return max(run.data for run in self.runs)

    @property
    def teacher_digest(self) -> str:
        """Returns the prefix of the digest of the given teacher; empty if there is none."""
        return short_digest(self.distilled[0].given_teacher or "") if self.distilled else ""

    @property
    def references(self) -> list[Row]:
        """Returns the rows that others are compared with: one that learns from labels alone, and a baseline.

        Each is the best of those with the most seeds.
        """
        labels_alone = [row for row in self.rows if row.learns_from_labels]
        baselines = [row for row in self.rows if row.is_baseline]
        return [max(rows, key=lambda row: len(row.runs)) for rows in (labels_alone, baselines) if rows]

    @property
    def distilled(self) -> list[Run]:
        """Returns one run with a teacher for each distinct teacher."""
        teachers = {}
        for run in self.runs:
            if (teacher := run.results["teacher"]) is not None:
                # Runs with the same seed that train their teachers themselves train the same one.
                trained = json.dumps([run.results["seed"], teacher.get("last")])
                teachers.setdefault(teacher.get("digest", trained), run)
        return list(teachers.values())

    def teacher_summary(self, epoch: str) -> Summary | None:
        """Returns the summary of `Run.teacher_score` over the teachers; None if no score is known."""
        scores = [score for run in self.distilled if (score := run.teacher_score(epoch)) is not None]
        return summarize(scores) if scores else None


def find_runs(folders: Iterable[pathlib.Path]) -> list[Run]:
    """Returns the runs in and below folders, except those with which a sweep trained the teacher of its other runs.

    Raises:
      UserError: A folder holds no finished run, a damaged one, or folders that are nested too deeply.
    """
    runs = {}
    for folder in folders:
        entries = entries_below(folder, skip_unreadable=True)
        paths = sorted(pathlib.Path(entry.path) for entry in entries if entry.name == RESULTS)
        if not paths:
            raise UserError(f"{folder} holds no finished run: there is no {RESULTS} in it or below")
        runs |= {_real(path): Run(path.parent, _printable(read_results(path))) for path in paths}
    nothing = None, "student"
    trained: dict[pathlib.Path, Any] = {}
    for run in runs.values():
        roles = ("student", "teacher") if run.given_teacher == "" else ("student",)
        trained |= {_real(run.folder) / role: (run, role) for role in roles}

    def that_trained(folders, student):
        # A teacher in a different place may have a folder with the same name as its student's.
        found = (trained.get(_real(folder), nothing) for folder in folders)
        return next((entry for entry in found if entry[0] not in (None, student)), nothing)

    teachers = {run: [that_trained(folders, run) for folders in run.folders_of_teachers] for run in runs.values()}
    taught: set[Any] = {run for found in teachers.values() for run, role in found if role == "student"}
    kept = []
    for run in runs.values():
        teacher, role = nothing if run.has_several_teachers else teachers[run][0]
        if run not in taught or not run.folder.name.startswith(TEACHER_FOLDER):
            kept.append(dataclasses.replace(run, teacher_run=teacher, teacher_role=role))
    return kept


def find_unfinished(folders: Iterable[pathlib.Path]) -> list[tuple[pathlib.Path, str]]:
    """Returns the folders of runs without results, and why they have none, in the order of their names."""
    found = {}
    for folder in folders:
        for entry in entries_below(folder, skip_unreadable=True):
            run = pathlib.Path(entry.path).parent
            if entry.name == "config.json" and not (run / RESULTS).exists():
                error = read_error(run)
                found[_real(run)] = run, "not finished" if error is None else f"failed: {error}"
    return sorted(found.values())


def _evaluations(folder: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what `evaluate --embedding` wrote about the network in a folder, into this folder or that of its run.

    Each is (fingerprint of the data, or "" if it is not known; what was measured on them).
    """
    name = _real(folder).name
    for path in (folder.parent / "evaluation.json", folder / "evaluation.json"):
        content = read_json(path) if path.is_file() else {}
        networks, dataset = content.get("networks"), content.get("dataset")
        entry = networks.get(name) if isinstance(networks, dict) else None
        data = dataset.get("fingerprint") if isinstance(dataset, dict) else None
        if isinstance(entry, dict) and not unsound(entry.get("embedding"), _EMBEDDING):
            yield str(data) if is_text(data) else "", entry


def _printable(content: Any) -> Any:
    """Returns a JSON value with all strings made printable, since the runs may come from other people."""
    if isinstance(content, dict):
        return {printable(key): _printable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_printable(value) for value in content]
    return printable(content) if isinstance(content, str) else content


def compare(runs: Iterable[Run]) -> list[Comparison]:
    """Returns the comparisons: one for each data set and given teacher; runs without a teacher are part of each.

    Pairs of the standard table come last, in its order.

    Raises:
      UserError: Two runs with the same configuration and seed have different results.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.config.get(key) for key in _COMMON]), []).append(run)
    comparisons = []
    for key in sorted(groups):
        for data, same in _by_data(groups[key]).items():
            given = {run.given_teacher for run in same if run.given_teacher is not None}
            teachers: list[Any] = sorted(given) or [None]
            for teacher in teachers:
                which = (short_digest(teacher) or "of each run") if len(teachers) > 1 else ""
                comparisons.append(_comparison([r for r in same if r.given_teacher in (None, teacher)], data, which))
    return sorted(comparisons, key=_position)


def _by_data(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Returns {fingerprint: runs on these data}; {"": all runs} if all have the same data as far as is known.

    Runs with different settings of their data, such as the seed of the validation split, have different fingerprints.
    """
    data_of: dict[str, set[str]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key.startswith("dataset.")}
        key = json.dumps({key: value for key, value in settings.items() if key not in indifferent()}, sort_keys=True)
        data_of.setdefault(key, set()).update({run.data} - {""})
    if all(len(found) < 2 for found in data_of.values()):
        return {"": [*runs]}
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.data):
        found.setdefault(run.data or "unknown", []).append(run)
    return found


def short_digest(digest: str) -> str:
    """Returns the prefixes of the digests of one or several teachers."""
    return " + ".join(part[:12] for part in digest.split(" + "))


def _position(comparison: Comparison) -> int:
    """Returns the position of a pair in the standard table, placed after all pairs that are not in it."""
    found = standard_position(comparison.dataset, comparison.teacher, comparison.student)
    return -1 if found is None else found


def _comparison(runs: Sequence[Run], data: str, given_teacher: str) -> Comparison:
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in _BOOKKEEPING}
        kinds.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    settings_of = {key: json.loads(key) for key in kinds}
    differing = _differing_keys(settings_of.values())
    rows = []
    for key, same in kinds.items():
        by_seed: dict[int, Run] = {}
        for run in sorted(same, key=lambda run: run.results["seed"]):
            # Two sweeps with the same seeds contain the same runs without a teacher, with the same results.
            first = by_seed.setdefault(run.results["seed"], run)
            if first.results["student"]["last"] != run.results["student"]["last"]:
                raise UserError(
                    f"{first.folder} and {run.folder} are the same run with different scores; name only one of them"
                )
        method = networks.in_order(same[0].results["method"])
        label = _label(method, settings_of[key], differing[settings_of[key]["method"]])
        rows.append(Row(label, method, tuple(by_seed.values())))
    rows.sort(key=lambda row: (row.has_teacher, -row.summary("last").mean, row.label))
    config = runs[0].config
    teacher, student = (network_label(config[f"{n}.name"], config[f"{n}.width"]) for n in ("teacher", "student"))
    members = next((run.results["teacher"]["members"] for run in runs if run.has_several_teachers), ())
    teacher = " + ".join(network_label(member["model"], member["width"]) for member in members) or teacher
    return Comparison(config["dataset.name"], data, teacher, student, tuple(rows), given_teacher)


def _differing_keys(kinds: Iterable[dict[str, Any]]) -> dict[str, set[str]]:
    """Returns {method: keys that do not have the same value in all of its settings}."""
    of_method: dict[str, list[dict[str, Any]]] = {}
    for settings in kinds:
        of_method.setdefault(settings["method"], []).append(settings)
    return {
        method: {key for settings in same for key in settings if settings[key] != same[0].get(key)}
        | {key for settings in same for key in same[0].keys() - settings.keys() if same[0][key] is not None}
        for method, same in of_method.items()
    }


def _label(method, settings, different):
    text = ", ".join([method, *(f"{key} {value}" for key, value in settings.items() if key in different)])
    if len(text) <= _MAX_LABEL:
        return text
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]  # The beginnings may be the same.
    return f"{text[:_MAX_LABEL]}… ({digest})"


def _real(path: pathlib.Path) -> pathlib.Path:
    """Returns a path without links; unlike `Path.resolve`, it raises no error for links that lead to themselves."""
    return pathlib.Path(os.path.realpath(path))
