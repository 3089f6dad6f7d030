"""Runs a grid of methods and seeds that share one teacher, each run a process of its own.

python -m cskd_jax.sweep --config=RECIPE --methods=ce,kd,cskd --seeds=0,1,2 [--workdir=DIR] [--jobs=N]
                         [--config.KEY=VALUE ...]

  --config       a packaged recipe such as digits, or a file such as configs/digits.py
  --methods      words that may stand behind the recipe: methods, or networks and a method (R152_0.5/R34_0.25/kd)
  --seeds        of the runs
  --workdir      folder of the sweep; default: runs/sweep/RECIPE. A run is in METHOD-seedSEED, with its output in
                 log.txt. The same command again goes on: what is finished is skipped, what was cut off resumes.
  --jobs         runs at the same time; default 1. Of several GPUs, listed in CUDA_VISIBLE_DEVICES, each run takes one.
  --config.KEY   overrides a key (docs/configuration.md) of every run; config.losses.NAME only of methods that have NAME

The teacher is trained once, with cross-entropy and the seed of the recipe (--config.seed), in teacher-NETWORK, one for
each network that the runs name as teacher; --config.teacher.checkpoint=DIR brings one along instead.

Exit codes: 0 all done; 1 runs failed, which the summary names, and the others are done; 2 something to mend in the
command, the configuration or the data; 75 stopped by a signal, with everything saved: the same command goes on.
"""

import collections
import pathlib

from absl import flags

from cskd_jax.commands import command_line
from cskd_jax.errors import UserError
from cskd_jax.runs import recipes
from cskd_jax.runs.grid import check, make_grid
from cskd_jax.runs.lock import locked
from cskd_jax.runs.sweep import sweep


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
    file = recipes.recipe_file(command.recipe)
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
