"""Trains a teacher and distills a student.

cskd-jax train RECIPE[:WORD] [--workdir=DIR] [--config.KEY=VALUE ...]

  RECIPE         a packaged recipe such as digits, or a file such as configs/digits.py; --config=RECIPE is the same.
                 WORD is a method of docs/methods.md such as kd, several of them such as kd+at, or networks and a
                 method such as R152_0.5/R34_0.25/kd
  --workdir      folder of the run; default: runs/RECIPE/WORD-seedSEED, followed by what --config.KEY changes. The
                 same command resumes the run, and extends it if --config.epochs is larger (but not with a
                 cosine schedule).
  --config.KEY   overrides a key, such as --config.epochs=10; `cskd-jax config keys` explains all of them,
                 `cskd-jax config show RECIPE` shows their values

  One of several processes, each with its part of every batch (launch/ has scripts):
  --coordinator  HOST:PORT, where the first process listens
  --processes    number of processes
  --process      index of this process, from 0
  --cluster      instead of these three: SLURM or the TPU pod provides them; a SLURM step of several tasks needs none

A run continues when its terminal is closed or its connection is lost. `python -m cskd_jax.main` is the same command.

Exit codes: 0 done; 2 something to fix in the command, the configuration or the data; 3 a loss or gradient is no
longer finite; 75 stopped by a signal with everything saved; 1 a transient failure, such as running out of memory or
losing a process that decodes images. After 75 and 1, the same command resumes.
"""

import os

from cskd_jax.commands import command_line
from cskd_jax.commands.arguments import number
from cskd_jax.commands.streams import outlive_full_disk
from cskd_jax.files import local_folder


def main(argv: list[str]) -> int:
    """Parses the command line, runs, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    parser = command_line.Parser(takes_config=True, advice=command_line.ADVICE_FOR_ONE_RUN)
    parser.add_argument("--workdir", type=local_folder)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=number(int, 1, 10**6))
    parser.add_argument("--process", type=number(int, 0, 10**6))
    parser.add_argument("--cluster", action="store_true")
    values = parser.parse(argv)
    recipe = parser.recipe(values)
    from cskd_jax import console
    from cskd_jax.runs import recipes

    name = recipes.recipe_file(recipe).stem
    outlive_full_disk()
    console.start(speaks=_is_first(values.process))
    with console.pause(f"loading JAX to train {recipe}"):
        config = recipes.load_checked(recipe, values.overrides)
        command_line.set_up_jax()
        from cskd_jax.distributed import devices, processes
        from cskd_jax.runs.run import train
        from cskd_jax.runs.workdir import default_workdir

    workdir = values.workdir or local_folder(default_workdir(recipe, config))
    console.say(f"{name}:{recipe.partition(':')[2] or config.method}, seed {config.seed}, into {workdir}")
    changed = {recipes.override_key(override) for override in values.overrides}
    if config.optimizer.name == "adamw" and changed & {"optimizer.name"} and "optimizer.learning_rate" not in changed:
        rate = config.optimizer.learning_rate
        console.say(
            f"the learning rate stays at {rate:g}, which the recipe sets for sgd; adamw usually needs about 0.001"
        )
    if "dataset.image_size" in changed and config.augment.resize and "augment.resize" not in changed:
        console.say(
            f"augment.resize stays at {config.augment.resize}: images are enlarged to that size before squares of "
            f"{config.dataset.image_size} pixels are cropped from them"
        )
    processes.initialize(values.coordinator, values.processes, values.process, values.cluster)
    train(config, workdir, adapt_devices=not processes.is_distributed() and devices.make_cores_devices())


def _is_first(process: int | None) -> bool:
    """Returns whether this is the first or only process, the only one that prints, from its first line on."""
    if process is not None:
        return process == 0
    # Processes are numbered as SLURM and TPU pods number them.
    return (os.environ.get("SLURM_PROCID") or os.environ.get("TPU_WORKER_ID") or "0") == "0"
