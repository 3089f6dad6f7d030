"""A run: a teacher (unless a checkpoint is given), a student, and the results."""

import contextlib
import pathlib
import time

import ml_collections

from cskd_jax.console import say
from cskd_jax.distributed import processes
from cskd_jax.distributed.devices import Devices
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.runs import schema
from cskd_jax.runs.build import load_data, make_evaluation, make_network, make_trainer
from cskd_jax.runs.results import (
    RESULTS,
    describe,
    describe_dataset,
    describe_result,
    read_versions,
    say_results,
    write_results,
)
from cskd_jax.runs.trained import check_fits, load_given_teacher
from cskd_jax.runs.workdir import check_workdir, claim, held, identify, is_done
from cskd_jax.training.metrics import task_of
from cskd_jax.training.objective import needs_teacher
from cskd_jax.training.trainer import Teacher


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Carries out a run to its end, from wherever an earlier start left it.

    Args:
      config: Configuration of the run. It may have more epochs than at an earlier start.
      workdir: Folder of the run.

    Raises:
      UserError: The user can mend something; InterruptedRun and DivergedError are among its kinds.
    """
    schema.validate(config)
    devices = Devices()
    devices.check_batch_size("batch_size", config.batch_size)
    given = None
    if needs_teacher(config.losses) and config.teacher.checkpoint is not None:
        given = processes.on_first(load_given_teacher, config)
    # A resumed run must not go on with another teacher.
    identity = identify(config, None if given is None else given[1].digest)
    with contextlib.ExitStack() as stack:

        def done_or_locked():
            check_workdir(workdir, identity)
            if is_done(workdir, config.epochs):
                return True
            stack.enter_context(held(workdir))
            return False

        if processes.on_first(done_or_locked):
            say(f"already done: {workdir / RESULTS}")
        else:
            _run(config, workdir, devices, identity, given)


def _run(config, workdir, devices, identity, given):
    start, versions = time.monotonic(), read_versions()
    # Several processes would prepare the same files at once.
    dataset = processes.first_then_all(lambda: load_data(config))
    # Both trainers are made before the first one starts: what does not fit should not show hours later.
    teacher = teacher_trainer = None
    if needs_teacher(config.losses):
        teacher = Teacher(make_network(config.teacher, dataset.num_classes, config.dtype))
        if given is None:
            teacher_trainer = make_trainer("teacher", config, dataset, workdir, devices)
        else:
            path, saved = given
            check_fits(f"teacher.checkpoint {path}", saved, config, dataset)
            teacher.variables = saved.variables
    trainer = make_trainer("student", config, dataset, workdir, devices, teacher)
    processes.on_first(claim, workdir, identity, dataset)
    used = devices.describe()
    say(
        f"{dataset.name}: {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images, "
        f"{dataset.num_classes} categories; {used['count']} x {used['kind']}; workdir {workdir}"
    )
    teacher_entry = None
    with StopRequest() as stop:
        if teacher_trainer is not None:
            result = teacher_trainer.fit(stop)["teacher"]
            teacher.variables, teacher_entry = result.variables, describe_result(_description(config.teacher), result)
        elif given is not None:
            teacher_entry = _evaluate_given(teacher, given, make_evaluation(teacher.network, config, dataset, devices))
        result = trainer.fit(stop)["student"]
    scores, confusions = trainer.evaluation("student").by_category(devices.replicate(result.variables))
    by_category = dict(zip(dataset.categories, scores.tolist(), strict=True))
    results = {
        "method": config.method,
        "seed": config.seed,
        "teacher": teacher_entry,
        "student": describe_result(_description(config.student), result) | {"by_category": by_category},
        "dataset": describe_dataset(dataset),
        "devices": used,
        "versions": versions,
        "config": schema.plain(config),
    }
    processes.on_first(write_results, workdir, results, dataset.categories, confusions)
    say_results(results, task_of(dataset.multilabel), workdir / RESULTS, time.monotonic() - start)


def _description(settings):
    """Returns what results say of the network that `config.teacher` or `config.student` describes."""
    return {"name": settings.name, "width": float(settings.width)}


def _evaluate_given(teacher, given, evaluation):
    """Evaluates a given teacher; returns its entry in results.json."""
    path, saved = given
    values = evaluation(evaluation.devices.replicate(teacher.variables))
    say(f"teacher: {saved.record.describe_network()}, from {path}, {evaluation.task.describe(values)}")
    source = {"checkpoint": path, "step": saved.step, "digest": saved.digest}
    return describe(saved.record.network, teacher.variables, {"last": values}) | source
