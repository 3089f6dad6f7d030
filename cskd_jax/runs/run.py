"""A run: a teacher (unless a checkpoint is given), a student, and the results."""

import contextlib
import pathlib
import time

import ml_collections

from cskd_jax.console import pause, say
from cskd_jax.distributed import processes
from cskd_jax.distributed.devices import Devices
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.runs import schema
from cskd_jax.runs.build import build, load_data
from cskd_jax.runs.results import (
    RESULTS,
    describe,
    describe_dataset,
    describe_result,
    read_versions,
    say_results,
    write_results,
)
from cskd_jax.runs.trained import identity_of_teacher, load_given_teacher
from cskd_jax.runs.workdir import check_data, check_workdir, claim, held, identify, is_done, names_same_data
from cskd_jax.training.metrics import task_of
from cskd_jax.training.objective import needs_teacher


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Runs the training to its end, resuming where an earlier start stopped.

    Args:
      config: Configuration of the run. It may have more epochs than that of an earlier start.
      workdir: Folder of the run.

    Raises:
      UserError: The user can fix something. InterruptedRun and DivergedError are subclasses.
    """
    schema.validate(config)
    with pause("starting the devices"):
        devices = Devices()
    devices.check_batch_size("batch_size", config.batch_size)
    given = None
    if needs_teacher(config.losses) and config.teacher.checkpoint is not None:
        given = processes.on_first(load_given_teacher, config)
    # A resumed run must not go on with another teacher.
    identity = identify(config, None if given is None else identity_of_teacher(*given, config))
    with contextlib.ExitStack() as stack:

        def done_or_locked():
            check_workdir(workdir, identity)
            if is_done(workdir, config.epochs):
                if not names_same_data(workdir, identity):
                    check_data(workdir, identity, load_data(config))
                return True
            stack.enter_context(held(workdir))
            return False

        if processes.on_first(done_or_locked):
            say(f"already done: {workdir / RESULTS}")
        else:
            _run(config, workdir, devices, identity, given)


def _run(config, workdir, devices, identity, given):
    start, versions = time.monotonic(), read_versions()
    run = build(config, workdir, devices, given)
    dataset = run.dataset
    processes.on_first(claim, workdir, identity, dataset)
    used = devices.describe()
    say(
        f"{dataset.name}: {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images, "
        f"{dataset.num_classes} categories; {used['count']} x {used['kind']}"
    )
    teacher_entry = None
    with StopRequest() as stop:
        if run.teacher_trainer is not None and run.teacher is not None:
            result = run.teacher_trainer.fit(stop)["teacher"]
            run.teacher.variables = result.variables
            teacher_entry = describe_result(run.teacher_trainer.describe("teacher"), result)
        elif given is not None:
            teacher_entry = _evaluate_given(given, run.teacher_evaluation)
        result = run.trainer.fit(stop)["student"]
    with pause("student: evaluating"):
        scores, confusions = run.trainer.evaluation("student").by_category(devices.replicate(result.variables))
    by_category = dict(zip(dataset.categories, scores.tolist(), strict=True))
    results = {
        "method": config.method,
        "seed": config.seed,
        "teacher": teacher_entry,
        "student": describe_result(run.trainer.describe("student"), result) | {"by_category": by_category},
        "dataset": describe_dataset(dataset),
        "devices": used,
        "versions": versions,
        "config": schema.plain(config),
    }
    processes.on_first(write_results, workdir, results, dataset.categories, confusions)
    say_results(results, task_of(dataset.multilabel), workdir / RESULTS, time.monotonic() - start)


def _evaluate_given(given, evaluation):
    """Evaluates a given teacher and returns its entry in results.json."""
    path, saved = given
    with pause("teacher: compiling and running the evaluation"):
        values = evaluation(evaluation.devices.replicate(saved.variables))
    say(f"teacher: {saved.record.describe_network()}, from {path}, {evaluation.task.describe(values)}")
    source = {"checkpoint": path, "step": saved.step, "digest": saved.digest}
    return describe(saved.record.network, saved.variables, {"last": values}) | source
