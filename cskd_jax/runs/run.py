"""A run: a teacher phase (unless a checkpoint is given), a student phase, and the results."""

import contextlib
import pathlib
import time

import ml_collections

from cskd_jax.console import say
from cskd_jax.distributed import devices, processes
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.runs import schema
from cskd_jax.runs.build import load_data
from cskd_jax.runs.lock import locked
from cskd_jax.runs.results import RESULTS, describe, describe_dataset, read_versions, say_results, write_results
from cskd_jax.runs.trained import GivenTeacher
from cskd_jax.runs.workdir import check_workdir, claim, identify, is_done
from cskd_jax.training.metrics import task_of
from cskd_jax.training.networks import Network
from cskd_jax.training.objective import needs_teacher
from cskd_jax.training.trainer import Phase


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Carries out a run to its end, from wherever an earlier start left it.

    Args:
      config: Configuration of the run. It may have more epochs than at an earlier start.
      workdir: Folder of the run.

    Raises:
      UserError: The user can mend something; InterruptedRun and DivergedError are among its kinds.
    """
    schema.validate(config)
    devices.check_batch_size("batch_size", config.batch_size)
    given_teacher = None
    if needs_teacher(config.losses) and config.teacher.checkpoint is not None:
        given_teacher = processes.on_first(GivenTeacher.load, config)
    # A resumed run must not go on with another teacher.
    identity = identify(config, None if given_teacher is None else given_teacher.record["digest"])
    with contextlib.ExitStack() as held:

        def done_or_locked():
            check_workdir(workdir, identity)
            if is_done(workdir, config.epochs):
                return True
            held.enter_context(locked(workdir / "lock", f"another job runs in workdir {workdir}"))
            return False

        if processes.on_first(done_or_locked):
            say(f"already done: {workdir / RESULTS}")
        else:
            _run(config, workdir, identity, given_teacher)


def _run(config, workdir, identity, given_teacher):
    start, versions, used = time.monotonic(), read_versions(), devices.describe_devices()
    # Several processes would prepare the same files at once.
    dataset = processes.first_then_all(lambda: load_data(config))
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
    processes.on_first(claim, workdir, identity, dataset)
    say(
        f"{dataset.name}: {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images, "
        f"{dataset.num_classes} categories; {used['count']} x {used['kind']}; workdir {workdir}"
    )
    teacher_variables = teacher_result = None
    with StopRequest() as stop:
        if teacher_phase is not None:
            variables, progress = teacher_phase.run(stop)
            teacher_variables, teacher_result = devices.replicate(variables), describe(teacher, variables, progress)
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
        "devices": used,
        "versions": versions,
        "config": schema.plain(config),
    }
    processes.on_first(write_results, workdir, results, dataset.categories, confusions)
    say_results(results, task_of(dataset.multilabel), workdir / RESULTS, time.monotonic() - start)
