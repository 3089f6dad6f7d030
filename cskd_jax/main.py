"""Trains a teacher and distils a student.

python -m cskd_jax.main --config=RECIPE[:WORD] [--workdir=DIR] [--config.KEY=VALUE ...]

  --config       a packaged recipe such as digits, or a file such as configs/digits.py; WORD is a method of
                 docs/methods.md such as kd, or networks and a method such as R152_0.5/R34_0.25/kd
  --workdir      folder of the run; default: runs/RECIPE/WORD-seedSEED. The same command again resumes there, and
                 with a larger --config.epochs extends the run.
  --config.KEY   overrides a key, such as --config.epochs=10; docs/configuration.md explains all of them

  One of several processes, each with its part of every batch (README: several machines):
  --coordinator  HOST:PORT, where the first process listens
  --processes    how many there are
  --process      which of them this is, from 0
  --cluster      instead of the three: SLURM or the TPU pod knows; a SLURM step of several tasks needs no flag

Exit codes: 0 done; 2 something to mend in the command, the configuration or the data; 3 a loss or gradient is not
finite any more; 75 stopped by a signal with everything saved, and 1 a process that decodes images was killed: the same
command resumes.
"""

import os
import pathlib
import sys

from absl import flags

from cskd_jax import console

# Arguments of processes.initialize: how the flag is defined, and its default.
_PROCESSES = {
    "coordinator": (flags.DEFINE_string, None),
    "processes": (flags.DEFINE_integer, None),
    "process": (flags.DEFINE_integer, None),
    "cluster": (flags.DEFINE_boolean, False),
}


def main(argv: list[str]) -> int:
    """Parses the command line, runs, and returns the exit code."""
    # Imported here: the processes that decode images import this module too, and have no use for JAX.
    from cskd_jax.commands import command_line

    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    from cskd_jax.commands import command_line
    from cskd_jax.runs import recipes

    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run.", values)
    for name, (define, default) in _PROCESSES.items():
        define(name, default, "See processes.initialize.", flag_values=values)
    command = command_line.parse(argv, values)
    command_line.refuse_rest(command)
    name = recipes.recipe_file(command.recipe).stem
    console.start(speaks=_is_first(values.process))
    with console.pause(f"loading JAX to train {command.recipe}"):
        config = recipes.load_recipe(command.recipe, command.overrides)
        command_line.set_up_jax()
        from cskd_jax.distributed import processes
        from cskd_jax.runs.run import train

    workdir = pathlib.Path(values.workdir or recipes.default_workdir(command.recipe, config))
    word = command.recipe.partition(":")[2] or config.method
    console.say(f"{name}:{word}, seed {config.seed}, into {workdir}")
    processes.initialize(**{name: values[name].value for name in _PROCESSES})
    train(config, workdir)


def _is_first(process: int | None) -> bool:
    """Whether this is the first of several processes, or the only one: it alone speaks, from its first line on."""
    if process is not None:
        return process == 0
    # As SLURM and TPU pods number them.
    return (os.environ.get("SLURM_PROCID") or os.environ.get("TPU_WORKER_ID") or "0") == "0"


if __name__ == "__main__":
    code = main(sys.argv)
    if "cskd_jax.distributed.processes" in sys.modules:
        sys.modules["cskd_jax.distributed.processes"].leave(code)
    sys.exit(code)
