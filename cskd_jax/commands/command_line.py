"""Shared parts of the commands: start and exit codes, flags and recipes, and one-line errors.

Modules that need JAX are imported where they are used, so that --help and most errors appear at once.
"""

import argparse
import gc
import logging
import os
import pathlib
import re
import sys
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from cskd_jax.commands.streams import outlive_console
from cskd_jax.errors import InterruptedRun, TransientError, UserError, as_message, close_to, describe_os_error, one_line
from cskd_jax.files import full_path

_logger = logging.getLogger(__name__)

Program = Callable[[list[str]], int | None]

# What people write in place of the dot of --config.KEY, too.
_CONFIG_PREFIX = re.compile(r"^config[.:_-]", re.IGNORECASE)
# Flags that people expect of a command that is about one run.
ADVICE_FOR_ONE_RUN = {"method": "a method follows the recipe, as in digits:kd"} | {
    name: f"only cskd-jax sweep takes it; {instead}"
    for name, instead in {
        "methods": "here one method follows the recipe, as in digits:kd",
        "seeds": "here --config.seed sets the only seed",
        "pairs": "here a pair of networks follows the recipe, as in digits:R34/R18/kd",
        "teacher_seeds": "here the teacher has the seed --config.seed",
        "grid": "here --config.KEY=VALUE sets one value",
    }.items()
}


def start(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command as the program of this process, and ends the process with its exit code."""
    outlive_console()
    code = main(sys.argv)
    processes = sys.modules.get("cskd_jax.distributed.processes")
    if processes is not None:
        processes.leave(code)
    sys.exit(code)


def run_program(program: Program, documentation: str | None, argv: list[str]) -> int:
    """Runs a program and returns its exit code; user errors are shown as one line.

    Args:
      program: Function that takes `argv`.
      documentation: Text that --help shows instead of running the program.
      argv: Command line, with the name of the program first.
    """
    # Everything after -- is another command with its own --help.
    if {"-h", "--help"} & set(argv[: argv.index("--")] if "--" in argv else argv):
        print(documentation)
        return 0
    return exit_code(program, argv)


def exit_code(program: Program, argv: list[str]) -> int:
    """Runs a program and returns its exit code, or 0; a UserError becomes one line on standard error."""
    try:
        return program(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ValueError as error:
        refused = _refused_by_jax(error)
        if not refused:
            raise
        print(f"error: {' and '.join(refused)}: JAX refuses the value ({one_line(error)})", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:  # Training that has begun saves first; everything else has nothing to save.
        print("stopped by Ctrl-C", file=sys.stderr)
        return InterruptedRun.exit_code
    except OSError as error:
        print(f"error: {as_message(describe_os_error(error))}", file=sys.stderr)
        return UserError.exit_code
    except MemoryError as error:
        print(f"error: out of memory: {one_line(error)}", file=sys.stderr)
        return TransientError.exit_code
    except RuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):  # an error of XLA
            raise
        remedy = "lower batch_size, raise optimizer.accumulation_steps, or train fewer runs together"
        print(f"error: out of memory on a device: {remedy} ({one_line(error)})", file=sys.stderr)
        return TransientError.exit_code


def _refused_by_jax(error: ValueError) -> list[str]:
    """Returns the environment variables for which importing JAX failed with an error; none if it did not fail."""
    text = str(error).lower()
    return [] if "jax" in sys.modules else [n for n in os.environ if n.startswith("JAX_") and n.lower() in text]


class _Once(argparse.Action):
    """Stores the value of a flag that is given at most once."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string is not None and self.dest in namespace.given:
            raise UserError(f"{option_string} is given twice: leave out one of them")
        namespace.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser of words and of --NAME=VALUE or --NAME VALUE flags, which raises UserError for mistakes.

    Args:
      takes_config: Whether the command takes a recipe, --config=RECIPE, and overrides, --config.KEY=VALUE.
      advice: {name: what to do} for flags that people expect, but that the command does not have.
    """

    def __init__(self, *, takes_config: bool = False, advice: Mapping[str, str] = types.MappingProxyType({})):
        super().__init__(add_help=False, allow_abbrev=False)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self._takes_config = takes_config
        self._advice = advice

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Returns the values of the flags, the names of those `given`, and, as `words`, the arguments without a flag.

        A command that takes a recipe also gets `config`, the text of --config or None, and `overrides`, every
        --config.KEY=VALUE.

        Args:
          argv: Command line, with the name of the program first.

        Raises:
          UserError: A flag is unknown or wrong.
        """
        own, given = list(argv[1:]), argparse.Namespace(given=set())
        if self._takes_config:
            recipes, given.overrides, own = _split_config(own)
            if len(recipes) > 1:
                raise UserError(f"--config is given twice: {' and '.join(recipes)}")
            given.config = recipes[0] if recipes else None
        end = own.index("--") if "--" in own else len(own)  # End of this command's own arguments.
        own[:end] = map(self._with_two_dashes, own[:end])
        values, words = self.parse_known_args(own, given)
        for position, word in enumerate(words):
            check_dashes(word)
            if word.startswith("-") or _lacks_dashes(word):
                raise UserError(self._explain(word, words[position + 1 :]))
        values.words = words
        return values

    def recipe(self, values: argparse.Namespace) -> str:
        """Returns the recipe, from --config or the only word, of a command without other words; "" if none.

        Raises:
          UserError: There are several words.
        """
        found = [values.config] if values.config is not None else []
        found += values.words
        if len(found) > 1:
            raise UserError(
                f"expected one recipe, got {' and '.join(found)}; a method follows a colon, as in digits:kd, and "
                "everything else is given as --NAME=VALUE, with commas between values"
            )
        return found[0] if found else ""

    def error(self, message: str) -> NoReturn:
        """Raises UserError; argparse calls this for invalid arguments."""
        message = message.removeprefix("argument ").replace(": expected one argument", " needs a value")
        message = message.replace(": ignored explicit argument", " takes no value, got")
        raise UserError(f"{message}; --help shows what is allowed")

    def _with_two_dashes(self, argument: str) -> str:
        """Returns a flag with two dashes if it was given with one, which is allowed."""
        name = f"-{argument.partition('=')[0]}"
        return f"-{argument}" if name.startswith("--") and name in self._option_string_actions else argument

    def _explain(self, argument: str, following: Sequence[str]) -> str:
        """Returns a message that says what to write instead of an unknown flag or a word without its dashes."""
        from cskd_jax.runs.recipes import packaged_recipes

        name, equals, value = argument.lstrip("-").partition("=")
        known = [option for action in self._actions for option in action.option_strings]
        known += ["--config"] if self._takes_config else []
        written = argument.partition("=")[0]
        problem = f"unknown flag {written}" if argument.startswith("-") else f"{argument} is missing its dashes"
        key = _CONFIG_PREFIX.sub("", name) if self._takes_config else name
        if self._takes_config and name in packaged_recipes():
            return f"{argument} is not a flag; did you mean {name}:{value or 'METHOD'}?"
        advice = self._advice.get(key.lower().replace("-", "_"))
        if advice is not None:
            return f"{problem}; {advice}"
        if f"--{name}" in known or (self._takes_config and name.startswith("config.")):
            meant = [f"--{argument}"]
        elif key != name:
            meant = []
        else:
            meant = [f"--{option}" for option in close_to(name, [option.lstrip("-") for option in known])]
        if not meant and self._takes_config:
            if not equals:
                value = next((after for after in following[:1] if not _is_flag(after)), "VALUE")
            meant = [f"--config.{key}={value}" for key in _keys_like(key)]
        if meant:
            return f"{problem}; did you mean {' or '.join(meant)}?"
        keys = "; cskd-jax config keys lists the keys of --config.KEY" if self._takes_config else ""
        return f"{problem}; the flags are {', '.join(known)}{keys}"


def check_dashes(word: str) -> None:
    """Raises UserError if a word begins with a dash of a text processor or web page, which only looks like a hyphen."""
    dash = re.match("-?[\u2010-\u2015\u2212]+-?", word)
    if dash is not None and not pathlib.Path(word).exists():
        raise UserError(f"{word} begins with {dash[0]} instead of --; write --{word[dash.end() :]}")


def _lacks_dashes(word: str) -> bool:
    """Returns whether a word, such as epochs=1, can only be meant as a flag."""
    return re.match(r"[\w.-]+=", word) is not None and not pathlib.Path(word.partition(":")[0]).exists()


def _split_config(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Returns the values of --config, every --config.KEY=VALUE, and all other arguments."""
    recipes, overrides, others = [], [], []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not f"{name}.".startswith("config."):
            others.append(argument)
            continue
        if not equals and left and not _is_flag(left[0]):
            value, equals = left.pop(0), "="
        if name != "config":
            overrides.append(f"--{name}{equals}{value}")
        elif equals:
            recipes.append(value)
        else:
            raise UserError("--config needs a value, such as --config=digits:kd")
    return recipes, overrides, others


def _is_flag(argument: str) -> bool:
    return argument.startswith("-") and not argument[1:2].isdecimal() and argument[1:2] != "."


def _keys_like(name: str) -> list[str]:
    """Returns the keys of a configuration that a flag may have meant."""
    from cskd_jax.losses import LOSSES
    from cskd_jax.runs import keys, schema
    from cskd_jax.runs.loss_keys import loss_keys

    name = name.lower().replace("-", "_")
    of_losses = [f"losses.{loss}.{setting}" for loss in LOSSES for setting in loss_keys(loss)]
    if "." in name or schema.same_keys(name, of_losses):
        return schema.close_keys(name, [*keys.KEYS, *of_losses])
    in_losses = [f"losses.NAME.{name}"] if any(path.endswith(f".{name}") for path in of_losses) else []
    return schema.close_keys(name, keys.KEYS) or in_losses


def _cache_folder() -> str | None:
    """Returns the folder of compiled programs; None, with a warning, if nothing can be written there.

    JAX would warn about every program that it cannot write.
    """
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cskd_jax"
    try:
        folder = full_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, UserError) as error:
        why = error.strerror if isinstance(error, OSError) else "no home folder"
        _logger.warning(
            "compiled programs are not cached in %s (%s); set XDG_CACHE_HOME to a writable folder", folder, why
        )
        return None
    return str(folder)


def set_up_jax() -> None:
    """Makes operations deterministic and caches compiled programs; must be called before devices are used."""
    # cuDNN and XLA would otherwise sum in an order that changes from run to run.
    os.environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true " + os.environ.get("XLA_FLAGS", "")
    import jax

    options: Any = jax.config  # Its options are attributes, which type checkers do not see.
    if options.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", _cache_folder())
    # Compiling many small programs adds up, so all of them are kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Tracing makes millions of long-lived objects; with the default threshold, searching them for cycles took a quarter
    # of its time.
    gc.set_threshold(100_000)
