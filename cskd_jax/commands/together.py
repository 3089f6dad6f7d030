"""Trains runs of a sweep that share a teacher; `cskd-jax sweep` starts this.

python -m cskd_jax.commands.together < RUNS

  RUNS   a JSON list with [name, RECIPE:WORD, overrides --config.KEY=VALUE, folder] of each run

Exit codes: 0 all done; 1 a run failed; 75 stopped by a signal, with everything saved.
"""

import pathlib
import sys

from cskd_jax import console
from cskd_jax.commands import command_line
from cskd_jax.commands.streams import outlive_full_disk
from cskd_jax.errors import UserError
from cskd_jax.inputs import is_list, is_text, parse_json


def main(argv: list[str]) -> int:
    """Reads the runs from standard input, carries them out, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    del argv
    try:
        runs = parse_json(sys.stdin.read())
    except ValueError:
        runs = None
    if not runs or not is_list(_is_run)(runs):
        raise UserError("standard input must hold a JSON list of runs; cskd-jax sweep starts this command")
    outlive_full_disk()
    console.start()
    from cskd_jax.runs import recipes

    loaded = [
        (name, recipes.load_recipe(recipe, overrides), pathlib.Path(workdir))
        for name, recipe, overrides, workdir in runs
    ]
    command_line.set_up_jax()
    from cskd_jax.distributed.devices import make_cores_devices
    from cskd_jax.runs.together import carry_out

    return int(any(job.error is not None for job in carry_out(loaded, adapt_devices=make_cores_devices())))


def _is_run(value):
    """Returns whether a JSON value is [name, recipe, overrides, folder]."""
    tests = (is_text, is_text, is_list(is_text), is_text)
    return isinstance(value, list) and len(value) == len(tests) and all(t(v) for t, v in zip(tests, value, strict=True))


if __name__ == "__main__":
    command_line.start(main)
