"""The parts that commands with a recipe share: the recipe, its overrides, and one line for an error."""

import gc
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from cskd_jax.errors import UserError, run_command
from cskd_jax.runs.recipes import parse_flags


class CommandLine(NamedTuple):
    """The parts of a command line.

    Attributes:
      recipe: RECIPE or RECIPE:WORD of --config; empty if there is none.
      overrides: Arguments --config.KEY=VALUE.
      values: Values of the program's own flags.
      rest: Arguments that are no flags.
    """

    recipe: str
    overrides: list[str]
    values: flags.FlagValues
    rest: list[str]


def run_program(program: Callable[[list[str]], None], documentation: str | None, argv: list[str]) -> int:
    """Runs a program and returns its exit code; a mistake of the user is shown as one line.

    Args:
      program: Function that takes `argv`.
      documentation: Text that --help shows instead.
      argv: Command line, with the name of the program first.
    """
    if {"-h", "--help"} & set(argv):
        print(documentation)
        return 0
    return run_command(program, argv)


def parse(argv: list[str], values: flags.FlagValues) -> CommandLine:
    """Splits a command line into its parts.

    Args:
      argv: Command line, with the name of the program first.
      values: Definitions of the program's own flags, which get their values.

    Raises:
      UserError: A flag is unknown or wrong.
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
    return CommandLine(recipe, overrides, values, parse_flags(values, [argv[0], *own])[1:])


def refuse_rest(command: CommandLine) -> None:
    """Raises UserError if there is an argument that is no flag."""
    if command.rest:
        raise UserError(f"arguments are given as --NAME=VALUE; got {' '.join(command.rest)}")


def set_up_jax() -> None:
    """Makes operations deterministic and keeps compiled programs on disk; to be called before devices are used."""
    # cuDNN and XLA would otherwise sum in an order that changes from run to run.
    os.environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true " + os.environ.get("XLA_FLAGS", "")
    import jax

    options: Any = jax.config  # Its options are attributes, which type checkers do not see.
    if options.jax_compilation_cache_dir is None:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "cskd_jax"))
    # Compiling many small programs adds up: keep them all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Tracing makes millions of objects that stay: searching them for cycles so often took a quarter of its time.
    gc.set_threshold(100_000)
