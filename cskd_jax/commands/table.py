"""The table of the commands and their modules, which are imported only when they are used."""

import importlib
import sys
from typing import NamedTuple

from cskd_jax.errors import UserError, close_to


class Command(NamedTuple):
    """An entry of the table of commands.

    Attributes:
      module: Module whose `main(argv)` runs the command.
      summary: One sentence for the list of commands.
    """

    module: str
    summary: str


COMMANDS = {
    "train": Command("cskd_jax.commands.train", "Trains a teacher and distills a student."),
    "sweep": Command("cskd_jax.commands.sweep", "Trains several methods with several seeds and one teacher."),
    "report": Command("cskd_jax.report.__main__", "Compares finished runs with each other and with published results."),
    "evaluate": Command("cskd_jax.evaluate.__main__", "Measures trained networks: scores, size, FLOPs, latency."),
    "export": Command("cskd_jax.interop.export", "Exports a trained network to PyTorch and to jax.export."),
    "import-torch": Command("cskd_jax.interop.import_torch", "Makes a teacher from a PyTorch file."),
    "supervise": Command("cskd_jax.commands.supervise", "Runs a command and restarts it when it dies."),
    "config": Command("cskd_jax.commands.config", "Shows the configuration of a recipe, and what every key means."),
}

# Modules that `python -m` may start; those on the second line are not meant for users.
_STARTED = ("main", "sweep", "report", "evaluate", "supervise", "interop.export", "interop.import_torch")
_INTERNAL = ("runs.document", "runs.network_table", "commands.together")
_MODULES = {"cskd_jax", *(f"cskd_jax.{name}" for name in (*_STARTED, *_INTERNAL))}
# Names that users may try as commands; none of them exists.
_MEANT = {
    "main": "train",
    "distill": "train",
    "distillation": "train",
    "run": "train",
    "import_torch": "import-torch",
    "show": "config show",
    "keys": "config keys",
    "help": "--help",
    "version": "--version",
}


def describe_commands() -> str:
    """Returns the list of the commands as text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "cskd-jax COMMAND ...",
            "python -m cskd_jax COMMAND ...",
            "",
            *lines,
            "",
            "cskd-jax COMMAND --help explains the arguments of a command; cskd-jax --version prints the version.",
        ]
    )


def run_command(name: str, arguments: list[str]) -> int:
    """Runs a command and returns its exit code.

    Args:
      name: Name of the command.
      arguments: Arguments that follow the name.

    Raises:
      UserError: There is no such command.
    """
    if name.startswith("-"):
        command = next((word for word in arguments if word in COMMANDS), "train" if name.startswith("--config") else "")
        if command:
            others = [word for word in (name, *arguments) if word != command]
            raise UserError(f"put the command first, such as cskd-jax {' '.join([command, *others])}")
        raise UserError(f"{name} is given in place of a command; the commands are {', '.join(COMMANDS)}")
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; {_hint(name)}")
    return importlib.import_module(COMMANDS[name].module).main([f"cskd-jax {name}", *arguments])


def check_module(module: str) -> None:
    """Ends a `python -m cskd_jax.NAME` that is not a command, which would otherwise do nothing and succeed.

    Args:
      module: Name that follows -m.
    """
    if module.partition(".")[0] == "cskd_jax" and module.removesuffix(".__main__") not in _MODULES:
        print(f"error: {module} is not a command; {_hint(module.rpartition('.')[2])}", file=sys.stderr)
        sys.exit(UserError.exit_code)


def _hint(name: str) -> str:
    from cskd_jax.runs.recipes import packaged_recipes

    if name.partition(":")[0] in packaged_recipes():
        return f"did you mean cskd-jax train {name}?"
    close = dict.fromkeys(_MEANT.get(found, found) for found in close_to(name, [*COMMANDS, *_MEANT]))
    if close:
        return f"did you mean {' or '.join(f'cskd-jax {found}' for found in close)}?"
    return f"the commands are {', '.join(COMMANDS)}"
