"""Trains a teacher and distils a student.

python -m cskd_jax.main --config=RECIPE[:WORD] [--workdir=DIR] [--config.KEY=VALUE ...]

  --config       a file of configs/, such as configs/digits.py; WORD is a method of docs/methods.md such as
                 kd, or networks and a method such as R152_0.5/R34_0.25/kd
  --workdir      folder of the run; default: runs/RECIPE/WORD-seedSEED. The same command again resumes there.
  --config.KEY   overrides a key of the recipe, which explains each, such as --config.epochs=10

  One of several processes, each with its part of every batch (README: several machines):
  --coordinator  HOST:PORT, where the first process listens
  --processes    how many there are
  --process      which of them this is, from 0
  --cluster      instead of the three: SLURM or the TPU pod knows; a SLURM step of several tasks needs no flag

Exit codes: 0 done; 2 something to mend in the command, the configuration or the data; 3 a loss or gradient is not
finite any more; 75 stopped by a signal with everything saved: the same command resumes.
"""

import os
import pathlib
import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from cskd_jax import config as config_lib
from cskd_jax.errors import UserError

# Arguments of parallel.initialize: how the flag is defined, and its default.
_PROCESSES = {
    "coordinator": (flags.DEFINE_string, None),
    "processes": (flags.DEFINE_integer, None),
    "process": (flags.DEFINE_integer, None),
    "cluster": (flags.DEFINE_boolean, False),
}


def main(argv: list[str]) -> int:
    """Parses the command line, runs, and returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        config, workdir, processes = _parse(argv)
        _set_up_jax(processes)
        # Imported late: mistakes in the command should not wait for everything.
        from cskd_jax.train import train

        train(config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{place}", file=sys.stderr)
        return UserError.exit_code
    return 0


def _parse(argv):
    """(configuration, workdir, arguments of parallel.initialize) of a command line."""
    recipe = next((a.split("=", 1)[1] for a in argv if a.startswith(("--config=", "-config="))), "")
    file = pathlib.Path(recipe.split(":")[0])
    if not recipe or not file.is_file():
        raise UserError(f"--config=RECIPE must name a file such as configs/digits.py; got {recipe or 'none'}")
    # A recipe may import its neighbours, wherever the command is run.
    sys.path.append(str(file.absolute().parent.parent))
    config = _parse_flags([argv[0], f"--config={recipe}"])["config"].value
    if not isinstance(config, ml_collections.ConfigDict) or not {"method", "seed"} <= set(config):
        raise UserError(f"get_config of {file} must return a ConfigDict with all the keys of configs/digits.py")
    _check_overrides(argv, config_lib.flatten(config))
    values = _parse_flags(argv)
    config = values["config"].value
    word = recipe.partition(":")[2] or config.method
    default = pathlib.Path("runs") / file.stem / f"{word}-seed{config.seed}"
    processes = {name: values[name].value for name in _PROCESSES}
    return config, pathlib.Path(values["workdir"].value or default), processes


def _check_overrides(argv, known):
    for argument in argv[1:]:
        key = argument.lstrip("-").split("=")[0]
        if not key.startswith("config."):
            continue
        key = key.removeprefix("config.")
        if key == "method":
            raise UserError("the method is chosen behind the recipe, --config=RECIPE:METHOD, not by --config.method")
        if key not in known:
            raise config_lib.unknown_key(key, known)


def _parse_flags(argv):
    sys.argv = argv  # where config_flags looks for the overrides, whatever it is asked to parse
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Recipe, FILE[:METHOD].", values, lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run.", values)
    for name, (define, default) in _PROCESSES.items():
        define(name, default, "See parallel.initialize.", flag_values=values)
    try:
        rest = values(argv)
    except flags.Error as error:
        # The last line is the message; what comes before it is a traceback through the recipe.
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    except Exception as error:  # A recipe is code: it may raise anything.
        raise UserError(f"{argv[1]}: {type(error).__name__}: {str(error).strip()}") from None
    if rest[1:]:
        raise UserError(f"arguments are given as --NAME=VALUE; got {' '.join(rest[1:])}")
    return values


def _set_up_jax(processes):
    # cuDNN and XLA would otherwise sum in an order that changes from run to run.
    os.environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true " + os.environ.get("XLA_FLAGS", "")
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "cskd_jax"))
    # Many small programs add up at start: keep them all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from cskd_jax import parallel

    parallel.initialize(**processes)


if __name__ == "__main__":
    code = main(sys.argv)
    if "cskd_jax.parallel" in sys.modules:
        sys.modules["cskd_jax.parallel"].leave(code)
    sys.exit(code)
