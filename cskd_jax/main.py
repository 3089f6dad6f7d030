"""`python -m cskd_jax.main`: see cskd_jax/commands/train.py."""

from cskd_jax.commands import command_line
from cskd_jax.commands.train import main

if __name__ == "__main__":
    command_line.start(main)
