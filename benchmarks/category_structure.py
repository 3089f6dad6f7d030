"""Benchmark: `python benchmarks/category_structure.py [--json FILE] [--parts loss,step,loop,start] [--repeats N]`.

It prints one table for each part:
  loss   value and gradient of the category-structure loss, 100 and 20,000 categories, against PyTorch
  step   one training step of the CIFAR-100 recipe against PyTorch
  loop   time of the training loop beyond the compiled step
  start  seconds from starting a run to its first training step, without and with a compilation cache
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from typing import Any

# The recipes and this folder are not installed with the package.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import loop_part, loss_part, start_part, step_part
from benchmarks.measuring import MISSING_TORCH, has_torch, render, save
from cskd_jax.distributed.devices import Devices

PARTS = {"loss": loss_part.measure, "step": step_part.measure, "loop": loop_part.measure, "start": start_part.measure}
_PACKAGES = ("cskd_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def main(argv: list[str] | None = None) -> None:
    """Measures the parts that the command line names, prints and saves them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--repeats", type=int, default=20, help="calls per figure; long ones are repeated less")
    arguments = parser.parse_args(argv)
    names = arguments.parts.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown or arguments.repeats < 1:
        parser.error(f"unknown part {unknown[0]!r}" if unknown else "--repeats must be at least 1")
    with_torch = has_torch()
    environment, parts = describe_environment(with_torch), {}
    print(json.dumps(environment))
    for name in names:
        parts[name] = PARTS[name](arguments.repeats, with_torch)
        print(f"\n{render(parts[name])}", flush=True)
        save(arguments.json, environment, parts)


def describe_environment(with_torch: bool) -> dict[str, Any]:
    """Returns versions and devices."""
    packages = [*_PACKAGES, "torch"] if with_torch else _PACKAGES
    environment = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "jax_devices": Devices().describe(),
    }
    if not with_torch:
        return environment | {"torch": MISSING_TORCH}
    import torch

    from benchmarks import torch_reference

    torch.set_num_threads(os.cpu_count())
    device = torch_reference.pick_device(environment["jax_devices"]["platform"])
    return environment | {"torch": {"device": device, "threads": torch.get_num_threads()}}


if __name__ == "__main__":
    main()
