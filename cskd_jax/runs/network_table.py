"""The table of networks in docs/networks.md, from the networks themselves.

python -m cskd_jax.runs.network_table
"""

import sys

from cskd_jax.models import MODELS

_COLUMNS = ("name", "images", "classes", "parameters", "million FLOPs", "stages: channels / reduction")
HEADER = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}\n"


def row(name: str) -> str:
    """Returns the line of a network of `MODELS`."""
    found = MODELS[name].describe()
    kind = "tokens: " if found.stages[0].kind == "tokens" else ""
    stages = ", ".join(f"{stage.channels} / {stage.reduction}" for stage in found.stages)
    size = f"{found.image_size}x{found.image_size}"
    cells = [f"`{name}`", size, found.num_classes, found.parameters, f"{found.flops / 1e6:.1f}", kind + stages]
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    sys.stdout.write(HEADER)
    for name in MODELS:
        sys.stdout.write(row(name))
        sys.stdout.flush()
