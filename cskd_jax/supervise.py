"""`python -m cskd_jax.supervise`: see cskd_jax/commands/supervise.py."""

from cskd_jax.commands import command_line
from cskd_jax.commands.supervise import main

if __name__ == "__main__":
    command_line.start(main)
