"""A run: a teacher (unless a checkpoint is given), a student, and the results; or several that share a teacher."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections

from cskd_jax import console
from cskd_jax.data import ImageDataset
from cskd_jax.distributed import processes
from cskd_jax.distributed.devices import Devices
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import UserError, kept_error
from cskd_jax.runs import schema
from cskd_jax.runs.build import Run, batch_sizes, build, load_data, precision
from cskd_jax.runs.results import (
    RESULTS,
    describe_dataset,
    describe_result,
    describe_teachers,
    read_score,
    read_versions,
    say_results,
    write_results,
)
from cskd_jax.runs.trained import Given, identity_of_teachers, load_given_teachers, load_start
from cskd_jax.runs.workdir import (
    DEVICES,
    STUDENT_DIGEST,
    TEACHER_DIGEST,
    check_data,
    check_workdir,
    claim,
    devices_of,
    held,
    identify,
    is_done,
    kept_values,
    names_same_data,
)
from cskd_jax.training.callbacks import Callback, Console
from cskd_jax.training.metrics import check_measured, task_of
from cskd_jax.training.objective import needs_teacher
from cskd_jax.training.teachers import variables_of
from cskd_jax.training.trainer import Result, fit_together


@dataclasses.dataclass(eq=False)
class Job:
    """A run that is to be carried out.

    Attributes:
      config: Configuration of the run. It may have more epochs than at an earlier start.
      workdir: Folder of the run.
      say: Function that shows a line of text.
      callbacks: Callbacks of the training.
      error: Error that ended the run while the others continued; None if there was none.
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    say: Callable[[str], None] = console.say
    callbacks: Sequence[Callback] = dataclasses.field(default_factory=lambda: (Console(),))
    error: UserError | None = None


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path, adapt_devices: bool = False) -> None:
    """Runs the training to its end, resuming where an earlier start stopped.

    Args:
      config: Configuration of the run. It may have more epochs than at an earlier start.
      workdir: Folder of the run.
      adapt_devices: See `train_together`.

    Raises:
      UserError: Something is wrong that the user can fix. InterruptedRun and DivergedError are subclasses.
    """
    job = Job(config, workdir)
    train_together([job], adapt_devices)
    if job.error is not None:
        raise job.error


def train_together(jobs: Sequence[Job], adapt_devices: bool = False) -> None:
    """Carries out several runs at once, each as `train` does, with one pass of their teacher for all.

    An error of one run is kept in its job, and the others continue.

    Args:
      jobs: Runs that agree in everything that determines the batches and the teacher; only a run on its own trains its
        teacher itself.
      adapt_devices: Whether to use as many CPU devices as at an earlier start or, if there was none, as many as the
        batches are divisible by. If False, all devices are used.

    Raises:
      InterruptedRun: A signal arrived; the states are saved.
    """
    start = time.monotonic()
    counts = set()
    for job in jobs:
        with kept_error(job):
            schema.validate(job.config)
            counts.add(devices_of(job.workdir) if adapt_devices else None)
    valid = [job for job in jobs if job.error is None]
    if not valid:
        return
    begun = min(counts - {None}, default=None)
    with console.pause("starting the devices"):
        devices = Devices()
    adapt_devices = adapt_devices and devices.describe()["platform"] == "cpu"
    with contextlib.ExitStack() as stack, precision(valid[0].config):
        started = _Started(devices, adapt_devices, begun, stack)
        for job in valid:
            with kept_error(job):
                started.add(job)
        with StopRequest() as stop:
            _train(started, stop, start)


class _Started:
    """Runs whose folders are held and whose objects are made, with the data and the teacher of the first run.

    Args:
      devices: Devices of the machine.
      adapt_devices: See `train_together`.
      begun: Number of devices on which the runs that have begun compute; None if none has.
      stack: Exit stack that releases the folders.
    """

    def __init__(self, devices: Devices, adapt_devices: bool, begun: int | None, stack: contextlib.ExitStack):
        self.devices, self._adapt_devices, self._begun, self._stack = devices, adapt_devices, begun, stack
        self.runs: dict[Job, Run] = {}
        self.given: Any = ()
        self._dataset: ImageDataset | None = None
        self._kept: dict[str, Any] = {}

    def add(self, job: Job) -> None:
        """Holds the folder of a run and makes its objects, unless it is done."""
        workdir, kept = job.workdir, processes.on_first(kept_values, job.workdir, job.config)
        for key, value in kept.items():
            job.say(f"{key} is {value}, as in the version of cskd_jax that started this workdir")
        if self.runs and kept != self._kept:
            raise UserError(f"{workdir} was started by another version of cskd_jax: train it alone, with --together=1")
        self._kept = kept
        config = job.config = schema.with_values(job.config, kept)
        if not self._adapt_devices:
            self.devices.check_batch_size("batch_size", config.batch_size)
        given, start, digest = (), None, None
        if needs_teacher(config.losses) and config.teacher.checkpoint is not None:
            self.given = given = self.given or load_given_teachers(config)
            digest = identity_of_teachers(given, config)
        if config.student.checkpoint is not None:
            start = processes.on_first(load_start, config)
        # A resumed run must not continue with another teacher.
        digests = {TEACHER_DIGEST: digest, STUDENT_DIGEST: None if start is None else start.saved.digest}
        identity = identify(config, digests)

        def done_or_locked():
            check_workdir(workdir, identity)
            if is_done(workdir, config.epochs):
                if not names_same_data(workdir, identity):
                    check_data(workdir, identity, load_data(config))
                return True
            self._stack.enter_context(held(workdir))
            return False

        if processes.on_first(done_or_locked):
            job.say(f"already done, {processes.on_first(read_score, workdir / RESULTS)}: {workdir / RESULTS}")
            return
        if self._dataset is None:
            # Otherwise several processes would prepare the same files at once.
            self._dataset = processes.first_then_all(lambda: load_data(config))
            if self._adapt_devices:
                self.devices = self._choose_devices(config, self._dataset)
        if self._adapt_devices and devices_of(workdir) not in (None, self._begun):
            raise UserError(f"{workdir} uses a different number of devices: train it alone, with --together=1")
        beside = next((run for run in self.runs.values() if run.teachers), None)
        run = build(config, workdir, self.devices, self._dataset, given, job.callbacks, beside, start)
        processes.on_first(claim, workdir, identity | {DEVICES: self.devices.count}, self._dataset)
        used, data = self.devices.describe(), self._dataset
        job.say(
            f"{data.name}: {len(data.train.labels):,} training and {len(data.test.labels):,} test images, "
            f"{data.num_classes} classes; {used['count']} x {used['kind']}"
        )
        self.runs[job] = run

    def _choose_devices(self, config, dataset):
        count = self._begun
        if count is None or count > self.devices.count:
            count = self.devices.how_many_divide(*batch_sizes(config, dataset))
        return self.devices.first(count)


def _train(started, stop, start):
    """Trains the runs that have started, and writes the results of each run when it is done."""
    teacher_entry = None
    if not started.runs:
        return
    for job, run in started.runs.items():
        if run.teacher_trainer is not None:
            with kept_error(job):
                result = run.teacher_trainer.fit(stop)["teacher"]
                run.teachers[0].variables = result.variables
                teacher_entry = describe_result(run.teacher_trainer.describe("teacher"), result)
        elif run.teachers and teacher_entry is None:
            with kept_error(job):
                teacher_entry = _evaluate_given(started.given, run, job.config.teacher.combine, job.say)
    jobs = {run.trainer: job for job, run in started.runs.items() if job.error is None}

    def on_done(trainer, _, outcome):
        job = jobs[trainer]
        if isinstance(outcome, UserError):
            job.error = outcome
        else:
            run = started.runs[job]
            with kept_error(job):
                _finish(job, run, outcome, teacher_entry if run.teachers else None, started.devices, start)

    if jobs:
        fit_together(list(jobs), stop, on_done)


def _finish(job: Job, run: Run, result: Result, teacher: Any, devices: Devices, start: float) -> None:
    """Writes and shows the results of a run."""
    dataset = run.dataset
    with console.pause("student: evaluating"):
        scores, confusions = run.trainer.evaluation("student").by_category(devices.replicate(result.variables))
    by_category = dict(zip(dataset.categories, scores.tolist(), strict=True))
    results = {
        "method": job.config.method,
        "seed": job.config.seed,
        "teacher": teacher,
        "student": describe_result(run.trainer.describe("student"), result) | {"by_category": by_category},
        "dataset": describe_dataset(dataset),
        "devices": devices.describe(),
        "versions": read_versions(),
        "config": schema.plain(job.config),
    }
    processes.on_first(write_results, job.workdir, results, dataset.categories, confusions)
    task, seconds = task_of(dataset.multilabel), time.monotonic() - start
    say_results(results, task, job.workdir / RESULTS, seconds, job.say)


def _evaluate_given(given: Sequence[Given], run: Run, combine: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Evaluates given teachers, several of them as one, and returns their entry in results.json.

    Teachers with other classes than the data are not evaluated.

    Raises:
      UserError: A metric is not finite, which is better found before the student is trained.
    """
    evaluation, values, measured = run.teacher_evaluation, None, "of other classes"
    if evaluation is not None:
        with console.pause("teacher: compiling and running the evaluation"):
            values = evaluation(evaluation.devices.replicate(variables_of(run.teachers)))
        check_measured("teacher " + " + ".join(one.path for one in given), values)
        measured = evaluation.task.describe(values)
    for number, (path, saved) in enumerate((one.path, one.saved) for one in given):
        name = "teacher" if len(given) == 1 else f"teacher {number}"
        of_one = f", {measured}" if len(given) == 1 else ""
        say(f"{name}: {saved.record.describe_network()}, from {path}{of_one}")
    if len(given) > 1 and evaluation is not None:
        say(f"all {len(given)} teachers combined: {measured}")
    weights = [teacher.weight for teacher in run.teachers]
    return describe_teachers(given, weights, combine, values)
