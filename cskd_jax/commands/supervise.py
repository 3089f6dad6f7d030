"""Runs a command as one or several processes on this machine, and restarts it when one of them dies.

cskd-jax supervise [--processes=N] [--restarts=N] [--grace=SECONDS] -- COMMAND ...

  --processes  how many to start; if more than one, each gets --coordinator, --processes and --process of
               cskd-jax train (default: 1)
  --restarts   how many times in a row to restart, after waiting 1, 2, 4, ... up to 60 seconds; the count begins anew
               after ten minutes without a failure (default: 5)
  --grace      seconds for saving after SIGTERM or Ctrl-C, before what is still running is killed (default: 120)

When a process dies the others are ended (SIGTERM, after three seconds SIGKILL) and all are restarted: cskd-jax train
resumes from the last intact checkpoint. SIGTERM and Ctrl-C are passed on to all; a second one kills them. A closed
terminal or a lost connection ends nothing. `python -m cskd_jax.supervise` is the same command.

Exit codes: 0 done; 2, 3 and 75 (stopped with everything saved, or before there was anything to save) are passed on
without a retry; 2 also if the command cannot be started; otherwise, when the restarts are used up or after a signal,
the code of the process that died, or 128 plus the number of the signal that killed it.
"""

import argparse
import shlex
import shutil

from cskd_jax.commands import command_line
from cskd_jax.commands.arguments import number
from cskd_jax.commands.streams import outlive_full_disk
from cskd_jax.commands.table import COMMANDS
from cskd_jax.errors import UserError


def main(argv: list[str]) -> int:
    """Parses the command line, runs, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    parser = command_line.Parser()
    parser.add_argument("--processes", type=number(int, 1, 1000), default=1)
    parser.add_argument("--restarts", type=number(int, 0, 1000), default=5)
    parser.add_argument("--grace", type=number(float, 0, 86400), default=120)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    values = parser.parse(argv)
    command = values.command[1:] if values.command[:1] == ["--"] else values.command
    command_line.check_dashes("".join(command[:1]))
    if not command:
        parser.error("-- COMMAND is missing")
    if command[0] in COMMANDS and shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not a program; did you mean cskd-jax supervise -- cskd-jax {shlex.join(command)}?"
        )
    # Imported late, since it is not needed for --help.
    from cskd_jax.distributed.supervisor import Supervisor

    outlive_full_disk()
    return Supervisor(command, values.processes, values.restarts, values.grace).run()
