"""Runs a grid of methods and seeds that share one teacher, each run a process of its own.

python -m cskd_jax.sweep --config=RECIPE --methods=ce,kd,cskd --seeds=0,1,2 [--workdir=DIR] [--jobs=N]
                         [--config.KEY=VALUE ...]

  --config       a file of configs/, such as configs/digits.py
  --methods      words that may stand behind the recipe: methods, or networks and a method (R152_0.5/R34_0.25/kd)
  --seeds        of the runs
  --workdir      folder of the sweep; default: runs/sweep/RECIPE. A run is in METHOD-seedSEED, with its output in
                 log.txt. The same command again goes on: what is finished is skipped, what was cut off resumes.
  --jobs         runs at the same time; default 1. Of several GPUs, listed in CUDA_VISIBLE_DEVICES, each run takes one.
  --config.KEY   overrides a key of every run; config.losses.NAME only of the methods that have NAME

The teacher is trained once, with cross-entropy and the seed of the recipe (--config.seed), in teacher-NETWORK, one for
each network that the runs name as teacher; --config.teacher.checkpoint=DIR brings one along instead.

Exit codes: 0 all done; 1 runs failed, which the summary names, and the others are done; 2 something to mend in the
command, the configuration or the data; 75 stopped by a signal, with everything saved: the same command goes on.
"""

import collections
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import ml_collections
from absl import flags

from cskd_jax import command_line
from cskd_jax import config as config_lib
from cskd_jax.children import die_with_parent
from cskd_jax.errors import InterruptedRun, UserError, printable
from cskd_jax.files import open_append, refuse_link
from cskd_jax.lock import locked
from cskd_jax.logging import say
from cskd_jax.losses import LOSSES
from cskd_jax.metrics import task_that_measured
from cskd_jax.objective import needs_teacher
from cskd_jax.signals import StopRequest
from cskd_jax.train import check_workdir
from cskd_jax.trained import TEACHER_DIGEST, load_data, read_json

_POLL_SECONDS = 0.2
_SUPERVISED = {False: "ce", True: "bce"}  # the word of a teacher's training, of one category per image or of several


class FailedRunsError(UserError):
    """Some runs of a sweep failed; the others are done."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
      sweep: folder of the sweep.
      name: of the run, and of its folder in that of the sweep.
      recipe: FILE:WORD.
      overrides: arguments --config.KEY=VALUE.
      teacher: the run that trains the teacher, or None.
    """

    sweep: pathlib.Path
    name: str
    recipe: str
    overrides: tuple[str, ...]
    teacher: "Run | None" = None

    @property
    def workdir(self) -> pathlib.Path:
        """Folder of the run."""
        return self.sweep / self.name

    @property
    def arguments(self) -> list[str]:
        """Of `cskd_jax.main`."""
        return [f"--config={self.recipe}", *self.overrides, f"--workdir={self.workdir}"]

    @property
    def config(self) -> ml_collections.ConfigDict:
        """Of the run, not validated."""
        return command_line.load_recipe(self.recipe, list(self.overrides))

    @property
    def done(self) -> bool:
        """Whether it has results."""
        return (self.workdir / "results.json").exists()


def main(argv: list[str]) -> int:
    """Parses the command line, runs the grid, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    values = flags.FlagValues()
    flags.DEFINE_list("methods", None, "Words behind the recipe.", values)
    flags.DEFINE_list("seeds", ["0"], "Seeds.", values)
    flags.DEFINE_string("workdir", None, "Folder of the sweep.", values)
    flags.DEFINE_integer("jobs", 1, "Runs at the same time.", lower_bound=1, flag_values=values)
    command = command_line.parse(argv, values)
    command_line.refuse_rest(command)
    file = command_line.recipe_file(command.recipe)
    if ":" in command.recipe:
        raise UserError(f"--config={command.recipe}: the methods of a sweep are given by --methods")
    workdir = pathlib.Path(values.workdir or pathlib.Path("runs") / "sweep" / file.stem)
    runs = make_grid(str(file), _methods(values.methods), _seeds(values.seeds), workdir, command.overrides)
    check(runs)
    with locked(workdir / "sweep.lock", f"another sweep is at work in {workdir}"):
        sweep(runs, values.jobs)


def _methods(words):
    if not words:
        raise UserError("--methods must name at least one method, such as --methods=ce,kd,cskd")
    return _each_once("--methods", words)


def _seeds(words):
    if not words or not all(word.isdecimal() for word in words):
        raise UserError(f"--seeds is {','.join(words)}; it must be integers of at least 0, such as 0,1,2")
    return _each_once("--seeds", [int(word) for word in words])


def _each_once(name, values):
    if len(set(values)) < len(values):
        raise UserError(f"{name} names {collections.Counter(values).most_common(1)[0][0]} twice")
    return values


def make_grid(
    file: str, methods: Sequence[str], seeds: Sequence[int], workdir: pathlib.Path, overrides: Sequence[str]
) -> list[Run]:
    """The runs of a grid, seed by seed, each after the one that trains its teacher.

    Args:
      file: recipe without a word.
      methods: words behind it.
      seeds: of the runs.
      workdir: of the sweep.
      overrides: arguments --config.KEY=VALUE.

    Raises:
      UserError: a method or an override is unknown.
    """
    configs = {word: command_line.load_recipe(f"{file}:{word}", []) for word in methods}
    known = {key for config in configs.values() for key in config_lib.flatten(config)}
    for argument in overrides:
        key = command_line.override_key(argument)
        if key not in known and key != "method":
            raise config_lib.unknown_key(key, known)
    own = {word: [o for o in overrides if _concerns(o, config)] for word, config in configs.items()}
    teachers: dict[str, Run] = {}
    runs = []
    for seed in seeds:
        for word in methods:
            config = command_line.load_recipe(f"{file}:{word}", own[word])
            settings, teacher = [*own[word], f"--config.seed={seed}"], None
            if needs_teacher(config.losses) and config.teacher.checkpoint is None and config.teacher.name:
                teacher = _teacher_run(file, config, overrides, workdir)
                # In the runs' configurations, and with it in what they may be compared by, stands the same path.
                settings.append(f"--config.teacher.checkpoint={teacher.workdir / 'student'}")
                teachers.setdefault(teacher.name, teacher)
            runs.append(Run(workdir, f"{word}-seed{seed}", f"{file}:{word}", tuple(settings), teacher))
    return [*teachers.values(), *runs]


def _concerns(override, config):
    """Whether a method has the key: overrides of losses are for those that have the loss."""
    key = command_line.override_key(override)
    return not key.startswith("losses.") or key in config_lib.flatten(config)


def _teacher_run(file, config, overrides, workdir):
    """The run that trains the teacher of `config`: as any network is trained from labels alone."""
    word = _SUPERVISED[any(LOSSES[name].multilabel for name in config.losses)]
    teacher = config.teacher
    replaced = ("losses.", "student.", "teacher.")
    kept = [o for o in overrides if not (command_line.override_key(o) + ".").startswith((*replaced, "epochs."))]
    network = [f"--config.student.name={teacher.name}", f"--config.student.width={teacher.width}"]
    name = f"teacher-{teacher.name}_{teacher.width:g}"
    return Run(workdir, name, f"{file}:{word}", (*kept, *network, f"--config.epochs={teacher.epochs}"))


def check(runs: Sequence[Run]) -> None:
    """Raises UserError if a configuration or the data are wrong, or a workdir holds another run or is a link."""
    data = {}
    for run in runs:
        config = run.config
        config_lib.validate(config)
        if run.teacher is None:
            config_lib.check_teacher_exists(config)
        name = pathlib.PurePath(run.name)
        for folder in (name, *name.parents[:-1]):
            refuse_link(run.sweep / folder)
        path = run.workdir / "config.json"
        if path.exists():
            identity, digest = config_lib.plain(config), read_json(path).get(TEACHER_DIGEST)
            check_workdir(run.workdir, identity if digest is None else identity | {TEACHER_DIGEST: digest})
        if not run.done:
            data[str(config.dataset)] = config
    # Also prepares them: two runs that start together would get into each other's way.
    for config in data.values():
        load_data(config)


def sweep(runs: Sequence[Run], jobs: int) -> None:
    """Runs what is not done, `jobs` at a time, with a line for each that ends.

    Raises:
      FailedRunsError: some failed; all the others are done.
      InterruptedRun: a signal came; the runs have saved their state.
    """
    waiting, total = [run for run in runs if not run.done], len(runs)
    say(f"{total} runs, {total - len(waiting)} done, {len(waiting)} to go, {jobs} at a time")
    failed: dict[Run, str] = {}
    running: dict[int, tuple[Run, subprocess.Popen, float]] = {}

    def report(run, outcome):
        over = sum(r.done for r in runs) + len(failed)
        say(f"[{over}/{total}] {run.name}: {outcome}")

    with StopRequest() as stop:
        while waiting or running:
            if stop.requested:
                _stop(running, stop)
            for slot in set(range(jobs)) - running.keys():
                run = next(_ready(waiting, failed), None)
                if run is not None:
                    waiting.remove(run)
                    running[slot] = run, _start(run, device_variables(slot, jobs, os.environ)), time.monotonic()
            time.sleep(_POLL_SECONDS)
            for slot, (run, process, start) in list(running.items()):
                if process.poll() is not None and not stop.requested:
                    del running[slot]
                    if not run.done:
                        failed[run] = _failure(run, process.returncode)
                    report(run, failed.get(run) or f"{_score(run)}, {time.monotonic() - start:.0f} s")
            for run in [run for run in waiting if run.teacher in failed]:
                waiting.remove(run)
                failed[run] = f"not started: {run.teacher.name} failed"
                report(run, failed[run])
    if failed:
        names = ", ".join(run.name for run in failed)
        raise FailedRunsError(f"{len(failed)} of {total} runs failed: {names}; the same command tries them again")
    say(f"all {total} runs done: python -m cskd_jax.report {runs[0].sweep}")


def device_variables(slot: int, jobs: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that give the run in `slot` of `jobs` its share of the GPUs."""
    if jobs == 1:
        return {}
    # Each process would otherwise take three quarters of a GPU's memory when it starts.
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false")}
    listed = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return variables | ({"CUDA_VISIBLE_DEVICES": listed[slot % len(listed)]} if listed else {})


def _ready(waiting, failed) -> Iterator[Run]:
    return (run for run in waiting if run.teacher not in failed and (run.teacher is None or run.teacher.done))


def _start(run, variables):
    """Starts a run; it ends when the sweep ends, however that is."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cskd_jax.main", *run.arguments]
    with open_append(run.workdir / "log.txt") as log:
        return subprocess.Popen(
            command,
            env=os.environ | variables,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            # A group of its own: Ctrl-C reaches it through the sweep alone, or it would come twice.
            process_group=0,
            # Killed with the sweep, not left behind to write where the next sweep does.
            preexec_fn=die_with_parent,
        )


def _stop(running, stop):
    for _, process, _ in running.values():
        process.terminate()
    for _, process, _ in running.values():
        process.wait()
    raise InterruptedRun(f"stopped by {stop.name}, {len(running)} runs are saved: the same command goes on")


def _failure(run, code):
    lines = (run.workdir / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"FAILED, {how}: {printable(lines[-1]) if lines else 'no output'} ({run.workdir / 'log.txt'})"


def _score(run):
    last = read_json(run.workdir / "results.json")["student"]["last"]
    return f"last {task_that_measured(last).describe(last)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
