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

import pathlib
import sys
from typing import Any

from absl import flags

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
    config = recipes.load_recipe(command.recipe, command.overrides)
    default = recipes.default_workdir(command.recipe, config)
    command_line.set_up_jax()
    # Imported late: mistakes in the command should not wait for everything.
    from cskd_jax.distributed import processes
    from cskd_jax.runs.run import train

    options: dict[str, Any] = {name: values[name].value for name in _PROCESSES}
    processes.initialize(**options)
    train(config, pathlib.Path(values.workdir or default))


if __name__ == "__main__":
    code = main(sys.argv)
    if "cskd_jax.distributed.processes" in sys.modules:
        sys.modules["cskd_jax.distributed.processes"].leave(code)
    sys.exit(code)
