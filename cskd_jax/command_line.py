"""What the programs share: recipe and overrides of a command line, one line for an error, exit codes."""

import gc
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from cskd_jax import config as config_lib
from cskd_jax.errors import UserError, run_command


class CommandLine(NamedTuple):
    """The parts of a command line.

    Attributes:
      recipe: FILE[:WORD] of --config; empty where there is none.
      overrides: the arguments --config.KEY=VALUE.
      values: of the program's own flags.
      rest: arguments that are no flags.
    """

    recipe: str
    overrides: list[str]
    values: flags.FlagValues
    rest: list[str]


def run_program(program: Callable[[list[str]], None], documentation: str, argv: list[str]) -> int:
    """Runs `program(argv)` and returns the exit code; an error of the user's is shown as one line."""
    if {"-h", "--help"} & set(argv):
        print(documentation)
        return 0
    return run_command(program, argv)


def parse(argv: list[str], values: flags.FlagValues) -> CommandLine:
    """Splits a command line; `values` holds the definitions of the program's own flags.

    Raises:
      UserError: a flag is unknown or wrong.
    """
    recipe, overrides, own = "", [], []
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            recipe = value
        elif argument.startswith("-") and name.startswith("config."):
            overrides.append(argument)
        else:
            own.append(argument)
    return CommandLine(recipe, overrides, values, _parse_flags(values, [argv[0], *own])[1:])


def refuse_rest(command: CommandLine) -> None:
    """Raises UserError if there is an argument that is no flag."""
    if command.rest:
        raise UserError(f"arguments are given as --NAME=VALUE; got {' '.join(command.rest)}")


def load_recipe(recipe: str, overrides: list[str]) -> ml_collections.ConfigDict:
    """The configuration of FILE[:WORD] with --config.KEY=VALUE arguments applied.

    Raises:
      UserError: there is no such recipe, or a key or value does not fit.
    """
    file = recipe_file(recipe)
    # A recipe may import its neighbours, wherever the command is run.
    if str(file.absolute().parent.parent) not in sys.path:
        sys.path.append(str(file.absolute().parent.parent))
    config = _read_recipe(recipe, [])
    if not isinstance(config, ml_collections.ConfigDict) or not {"method", "seed"} <= set(config):
        raise UserError(f"get_config of {file} must return a ConfigDict with all the keys of configs/digits.py")
    _check_overrides(overrides, config_lib.flatten(config))
    return _read_recipe(recipe, overrides)


def recipe_file(recipe: str) -> pathlib.Path:
    """FILE of FILE[:WORD]; raises UserError unless it exists."""
    file = pathlib.Path(recipe.split(":")[0])
    if not recipe or not file.is_file():
        raise UserError(f"--config=RECIPE must name a file such as configs/digits.py; got {recipe or 'none'}")
    return file


def override(config: ml_collections.ConfigDict, overrides: list[str]) -> ml_collections.ConfigDict:
    """A configuration with --config.KEY=VALUE arguments applied; raises UserError where they do not fit."""
    _check_overrides(overrides, config_lib.flatten(config))
    argv, values = ["cskd_jax", *overrides], flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, "Configuration.", values, sys_argv=argv)
    _parse_flags(values, argv)
    return values["config"].value


def override_key(argument: str) -> str:
    """KEY of --config.KEY=VALUE."""
    return argument.lstrip("-").partition("=")[0].removeprefix("config.")


def set_up_jax() -> None:
    """Deterministic operations, and compiled programs kept on disk; to be called before devices are used."""
    # cuDNN and XLA would otherwise sum in an order that changes from run to run.
    os.environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true " + os.environ.get("XLA_FLAGS", "")
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "cskd_jax"))
    # Many small programs add up at start: keep them all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Tracing makes millions of objects that stay: searching them for cycles so often took a quarter of its time.
    gc.set_threshold(100_000)


def _read_recipe(recipe, overrides):
    argv, values = ["cskd_jax", f"--config={recipe}", *overrides], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Recipe, FILE[:METHOD].", values, lock_config=True, sys_argv=argv)
    _parse_flags(values, argv)
    return values["config"].value


def _check_overrides(overrides, known):
    for key in map(override_key, overrides):
        if key == "method":
            raise UserError("the method is chosen behind the recipe, --config=RECIPE:METHOD, not by --config.method")
        if key not in known:
            raise config_lib.unknown_key(key, known)


def _parse_flags(values, argv):
    try:
        return values(argv)
    except flags.Error as error:
        # The last line is the message; what comes before it is a traceback through the recipe.
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    except Exception as error:  # A recipe is code: it may raise anything.
        raise UserError(f"{' '.join(argv[1:2])}: {type(error).__name__}: {str(error).strip()}") from None
