"""`python -m cskd_jax.sweep`: see cskd_jax/commands/sweep.py."""

from cskd_jax.commands import command_line
from cskd_jax.commands.sweep import main

if __name__ == "__main__":
    command_line.start(main)
