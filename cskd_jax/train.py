"""A run: a teacher phase (unless a checkpoint is given), a student phase, and the results."""

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import pathlib
import platform
import time
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from cskd_jax import config as config_lib
from cskd_jax import parallel
from cskd_jax.checkpoint import FOLDER, load_variables
from cskd_jax.data import ImageDataset
from cskd_jax.errors import UserError
from cskd_jax.files import refuse_links, write_json, write_text
from cskd_jax.lock import locked
from cskd_jax.logging import say
from cskd_jax.loop import Evaluation, Network, Phase, Progress
from cskd_jax.metrics import Task, task_of
from cskd_jax.models import count_parameters
from cskd_jax.objective import needs_teacher
from cskd_jax.signals import StopRequest
from cskd_jax.trained import TEACHER_DIGEST, check_fits, load_data, read_json

RESULTS = "results.json"
# What a run writes into its workdir, beside its lock.
_WRITTEN = (RESULTS, "config.json", "metrics.jsonl", "confusion_matrix.csv", "tensorboard", "teacher", "student")
# Packages whose versions decide the numbers.
_PACKAGES = ("cskd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Runs `config` in `workdir` to the end, from wherever an earlier start left it.

    Raises:
      UserError: what the user can mend; InterruptedRun and DivergedError among them.
    """
    config_lib.validate(config)
    parallel.check_batch_size("batch_size", config.batch_size)
    identity, given_teacher = config_lib.plain(config), None
    if needs_teacher(config.losses) and config.teacher.checkpoint is not None:
        given_teacher = parallel.on_first(GivenTeacher.load, config)
        # A resumed run must not go on with another teacher.
        identity[TEACHER_DIGEST] = given_teacher.record["digest"]
    with contextlib.ExitStack() as held:

        def is_done():
            check_workdir(workdir, identity)
            if (workdir / RESULTS).exists():
                return True
            held.enter_context(locked(workdir / "lock", f"another job runs in workdir {workdir}"))
            # The workdir may be a link of the user's; what a folder from elsewhere brings along leads to their files.
            refuse_links(workdir / name for name in _WRITTEN)
            return False

        if parallel.on_first(is_done):
            say(f"already done: {workdir / RESULTS}")
        else:
            _run(config, workdir, identity, given_teacher)


def _run(config, workdir, identity, given_teacher):
    start, versions, devices = time.monotonic(), read_versions(), parallel.describe_devices()
    # Several processes would prepare the same files at once.
    dataset = parallel.first_then_all(lambda: load_data(config))
    # All phases are made before the first runs: what does not fit in the last should not show hours later.
    student = Network.create(config.student, dataset.num_classes, config.dtype)
    teacher = teacher_phase = None
    if needs_teacher(config.losses):
        teacher = Network.create(config.teacher, dataset.num_classes, config.dtype)
        if given_teacher is None:
            losses = {task_of(dataset.multilabel).supervision: {"weight": 1.0}}
            teacher_phase = Phase("teacher", config, teacher, losses, config.teacher.epochs, dataset, workdir)
        else:
            given_teacher.check_fits(config, dataset)
    student_phase = Phase("student", config, student, config.losses, config.epochs, dataset, workdir, teacher)
    parallel.on_first(claim, workdir, identity)
    say(
        f"{dataset.name}: {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images, "
        f"{dataset.num_classes} categories; {devices['count']} x {devices['kind']}; workdir {workdir}"
    )
    teacher_variables = teacher_result = None
    with StopRequest() as stop:
        if teacher_phase is not None:
            variables, progress = teacher_phase.run(stop)
            teacher_variables, teacher_result = parallel.replicate(variables), describe(teacher, variables, progress)
        elif given_teacher is not None:
            teacher_variables, teacher_result = given_teacher.evaluate(teacher, config, dataset)
        variables, progress = student_phase.run(stop, teacher_variables)
    scores, confusions = student_phase.by_category(variables)
    results = {
        "method": config.method,
        "seed": config.seed,
        "teacher": teacher_result,
        "student": describe(student, variables, progress) | {"by_category": scores},
        "dataset": describe_dataset(dataset),
        "devices": devices,
        "versions": versions,
        "config": config_lib.plain(config),
    }
    parallel.on_first(write_results, workdir, results, dataset.categories, confusions)
    say_results(results, task_of(dataset.multilabel), workdir / RESULTS, time.monotonic() - start)


@dataclasses.dataclass(frozen=True)
class GivenTeacher:
    """A teacher from `config.teacher.checkpoint`.

    Attributes:
      path: folder of its phase.
      variables: of the network, numpy arrays.
      record: saved with them.
    """

    path: str
    variables: Any
    record: dict[str, Any]

    @classmethod
    def load(cls, config: ml_collections.ConfigDict):
        """Reads it; raises UserError unless it is the network that the configuration names, trained to the end."""
        config_lib.check_teacher_exists(config)
        path = pathlib.Path(config.teacher.checkpoint).expanduser()
        # Of a run's workdir, its teacher is meant.
        path = str(path / "teacher" if (path / "teacher" / FOLDER).is_dir() else path)
        variables, record = load_variables(path)
        wanted = {"name": config.teacher.name, "width": float(config.teacher.width)}
        if record["network"] != wanted:
            raise UserError(f"teacher.checkpoint {path} holds {record['network']}, the configuration asks for {wanted}")
        if not record["finished"]:
            raise UserError(f"teacher.checkpoint {path} is not trained to its end: run its own command again first")
        return cls(path, variables, record)

    def check_fits(self, config: ml_collections.ConfigDict, dataset: ImageDataset) -> None:
        """Raises UserError unless it was trained on such images, such labels, and the same categories."""
        check_fits(f"teacher.checkpoint {self.path}", self.variables, self.record, config, dataset)

    def evaluate(self, network: Network, config: ml_collections.ConfigDict, dataset: ImageDataset):
        """Its variables on every device, and its entry in results.json."""
        variables = parallel.replicate(self.variables)
        values = Evaluation(network, config, dataset)(variables)
        say(
            f"teacher: {network.name}, width {network.width:g}, from {self.path}, "
            f"{task_of(dataset.multilabel).describe(values)}"
        )
        entry = describe(network, variables, Progress({"last": values}))
        source = {"checkpoint": self.path, "step": self.record["step"], "digest": self.record["digest"]}
        return variables, entry | source


def read_versions() -> dict[str, str]:
    """Of Python and the packages that decide the numbers."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def describe(network: Network, variables: Any, progress: Progress) -> dict[str, Any]:
    """The entry of a network in results.json."""
    return {
        "model": network.name,
        "width": network.width,
        "parameters": count_parameters(variables["params"]),
        **progress.evaluations,
        "images_per_second": progress.images_per_second,
    }


def describe_dataset(dataset: ImageDataset) -> dict[str, Any]:
    """The entry of the data in results.json."""
    return {
        "name": dataset.name,
        "categories": dataset.num_classes,
        "train_examples": len(dataset.train.labels),
        "test_examples": len(dataset.test.labels),
    }


def write_results(
    workdir: pathlib.Path, results: dict[str, Any], categories: Sequence[str], confusions: np.ndarray | None
) -> None:
    """Writes the confusion matrix, where there is one, and last results.json: a run without it is not done."""
    if confusions is not None:
        write_confusions(workdir / "confusion_matrix.csv", categories, confusions)
    write_json(workdir / RESULTS, results)


def write_confusions(path: pathlib.Path, categories: Sequence[str], confusions: np.ndarray) -> None:
    """Writes the matrix with the categories as header and as first column."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["category \\ taken for", *categories])
    writer.writerows([category, *row] for category, row in zip(categories, confusions.tolist(), strict=True))
    write_text(path, table.getvalue())


def say_results(results: dict[str, Any], task: Task, path: pathlib.Path, seconds: float) -> None:
    """Prints the end of a run."""
    score, score_name = task.score, task.names[task.score]
    for name in ("teacher", "student"):
        if results[name] is not None:
            entry = results[name]
            best = entry.get("best")
            best = f" (best {best[score]:.4f}, epoch {best['epoch']}, chosen on the test split)" if best else ""
            size = f"{entry['model']}, width {entry['width']:g}, {entry['parameters']:,} parameters"
            say(f"{name}: {size}, last {score_name} {entry['last'][score]:.4f}{best}")
    say(f"done in {seconds:.0f} s: {path}")


def check_workdir(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
    """Raises UserError if the workdir holds checkpoints of another configuration, or cannot be one."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = read_json(path) if path.exists() else identity
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror}") from None
    # Where digests say which teacher it is, its folder may have moved.
    moved = {"teacher.checkpoint"} if TEACHER_DIGEST in found.keys() & identity.keys() else set()
    different = [
        f"{key} {found.get(key)!r} != {identity.get(key)!r}"
        for key in sorted((found.keys() | identity.keys()) - moved - set(config_lib.INDIFFERENT))
        if found.get(key) != identity.get(key)
    ]
    if different and any(workdir.glob(f"*/{FOLDER}/*")):
        raise UserError(
            f"workdir {workdir} holds a run of another configuration ({', '.join(different)}); use another --workdir"
        )


def claim(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
    """Makes the workdir this configuration's, dropping what one that never came to a checkpoint has logged."""
    if not any(workdir.glob(f"*/{FOLDER}/*")):
        (workdir / "metrics.jsonl").unlink(missing_ok=True)
    write_json(workdir / "config.json", identity)
