"""Finished runs, read from their folders, and which of them may be compared with which."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from cskd_jax.config import INDIFFERENT
from cskd_jax.errors import UserError
from cskd_jax.metrics import Task, task_that_measured
from cskd_jax.report.published import network_label
from cskd_jax.report.statistics import Summary, summarize
from cskd_jax.trained import read_json

# Settings that do not change what is compared; the seed is what is averaged over.
_BOOKKEEPING = ("seed", "log_every", "keep_checkpoints", "teacher.checkpoint", "dataset.data_dir", "dataset.path",
                *INDIFFERENT)  # fmt: skip
# Settings that runs of one table have in common. The others may go with the method, such as those of its losses.
_COMMON = ("dataset.name", "dataset.train_examples", "dataset.image_size", "epochs", "teacher.name", "teacher.width",
           "student.name", "student.width")  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run.

    Attributes:
      folder: its workdir.
      results: results.json.
      teacher_run: the run that trained its teacher, where it is among those read.
    """

    folder: pathlib.Path
    results: dict[str, Any]
    teacher_run: "Run | None" = None

    @property
    def config(self) -> dict[str, Any]:
        """{key: value}."""
        return self.results["config"]

    @property
    def task(self) -> Task:
        """Says what the score is."""
        return task_that_measured(self.results["student"]["last"])

    def score(self, epoch: str) -> float:
        """Of the student, in percent, after the "last" or the "best" epoch."""
        return 100 * self.results["student"][epoch][self.task.score]

    def teacher_score(self, epoch: str) -> float | None:
        """Of the teacher, likewise; None where it is not known, as the best epoch of a teacher brought along."""
        entry = self.results["teacher"]
        if epoch not in entry and self.teacher_run is not None:
            return self.teacher_run.score(epoch)
        return 100 * entry[epoch][self.task.score] if epoch in entry else None

    def curve(self) -> list[tuple[int, float]]:
        """(epoch, score of the student in percent) of every evaluation."""
        path = self.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        wanted = [row for row in rows if (row["phase"], row["split"]) == ("student", "test")]
        return [(row["epoch"], 100 * row[self.task.score]) for row in wanted]

    @property
    def teacher_folder(self) -> pathlib.Path | None:
        """Where the checkpoints of its teacher are; None without a teacher."""
        if self.results["teacher"] is None:
            return None
        given = self.results["teacher"].get("checkpoint")
        return self.folder / "teacher" if given is None else pathlib.Path(given)


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone.

    Attributes:
      label: the method, and the settings in which the row differs from another one of the same method.
      method: of all runs.
      runs: by seed.
    """

    label: str
    method: str
    runs: tuple[Run, ...]

    def scores(self, epoch: str) -> dict[int, float]:
        """{seed: `Run.score`}."""
        return {run.results["seed"]: run.score(epoch) for run in self.runs}

    def summary(self, epoch: str) -> Summary:
        """Of the scores."""
        return summarize(list(self.scores(epoch).values()))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs on one data set with one pair of networks, equally long.

    Attributes:
      dataset: name.
      teacher: label as in the published tables.
      student: likewise.
      rows: ce and kd first, where they are there.
    """

    dataset: str
    teacher: str
    student: str
    rows: tuple[Row, ...]

    @property
    def runs(self) -> list[Run]:
        """Of all rows."""
        return [run for row in self.rows for run in row.runs]

    @property
    def title(self) -> str:
        """Data set and networks."""
        return f"{self.dataset}: {self.teacher} → {self.student}"

    def row(self, method: str) -> Row | None:
        """The first row of a method."""
        return next((row for row in self.rows if row.method == method), None)

    @property
    def distilled(self) -> list[Run]:
        """The runs with a teacher, one for each teacher that there is."""
        teachers = {}
        for run in self.runs:
            if run.results["teacher"] is not None:
                teachers.setdefault(run.results["teacher"].get("digest", str(run.folder)), run)
        return list(teachers.values())


def find_runs(folders: Iterable[pathlib.Path]) -> list[Run]:
    """The runs in these folders and the folders in them; not those whose network is the teacher of others.

    Raises:
      UserError: a folder holds no finished run, or one that is damaged.
    """
    runs = {}
    for folder in folders:
        paths = sorted(folder.rglob("results.json"))
        if not paths:
            raise UserError(f"{folder} holds no finished run: there is no results.json in it or below")
        runs |= {path.resolve(): Run(path.parent, _read_results(path)) for path in paths}
    # By the last two parts: a sweep's folder may have moved since.
    trained = {(run.folder.resolve().name, "student"): run for run in runs.values()}
    teachers = {run: trained.get(run.teacher_folder.parts[-2:]) for run in runs.values() if run.teacher_folder}
    others = [run for run in runs.values() if run not in teachers.values()]
    return [dataclasses.replace(run, teacher_run=teachers.get(run)) for run in others]


def _read_results(path):
    results = read_json(path)
    missing = {"method", "seed", "teacher", "student", "dataset", "config"} - results.keys()
    if missing:
        raise UserError(f"{path} is no result of a run: it lacks {', '.join(sorted(missing))}")
    return results


def compare(runs: Iterable[Run]) -> list[Comparison]:
    """Sorts runs into comparisons.

    Raises:
      UserError: the same seed of the same configuration is there twice.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run.config.get(key) for key in _COMMON]), []).append(run)
    return [_comparison(groups[key]) for key in sorted(groups)]


def _comparison(runs: Sequence[Run]) -> Comparison:
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.config.items() if key not in _BOOKKEEPING}
        kinds.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    rows = []
    for key, same in kinds.items():
        same.sort(key=lambda run: run.results["seed"])
        for first, second in itertools.pairwise(same):
            if first.results["seed"] == second.results["seed"]:
                raise UserError(f"{first.folder} and {second.folder} are the same run; name one of them")
        method = same[0].results["method"]
        others = [json.loads(other) for other in kinds if other != key and json.loads(other)["method"] == method]
        rows.append(Row(_label(method, json.loads(key), others), method, tuple(same)))
    rows.sort(key=lambda row: ({"ce": 0, "bce": 0, "kd": 1, "bkd": 1}.get(row.method, 2), row.label))
    config = runs[0].config
    teacher, student = (network_label(config[f"{n}.name"], config[f"{n}.width"]) for n in ("teacher", "student"))
    return Comparison(config["dataset.name"], teacher, student, tuple(rows))


def _label(method, settings, others):
    different = [key for key in settings if any(other.get(key) != settings[key] for other in others)]
    return ", ".join([method, *(f"{key} {settings[key]}" for key in different)])
