"""`python -m cskd_jax.sweep`: see cskd_jax/commands/sweep.py."""

import sys

from cskd_jax.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main(sys.argv))
