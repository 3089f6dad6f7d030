"""`python -m cskd_jax.supervise`: see cskd_jax/commands/supervise.py."""

import sys

from cskd_jax.commands.supervise import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
