"""The command `cskd-jax`, also available as `python -m cskd_jax`."""

import cskd_jax
from cskd_jax.commands import command_line, table


def main(argv: list[str]) -> int:
    """Runs the command that the first argument names, or lists the commands or the version; returns the exit code."""
    if not argv[1:] or argv[1] in ("-h", "--help"):
        print(table.describe_commands())
        return 0
    if argv[1] in ("-V", "--version"):
        print(f"cskd-jax {cskd_jax.__version__}")
        return 0
    return command_line.exit_code(lambda argv: table.run_command(argv[1], argv[2:]), argv)


def start() -> None:
    """Starts `main`; the entry point of the package."""
    command_line.start(main)


if __name__ == "__main__":
    start()
