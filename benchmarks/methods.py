"""Measures what each method costs: `python benchmarks/methods.py [--pair=TEACHER/STUDENT] [--methods=...]`.

For every method, milliseconds of a training step, the ratio to a step of kd that is measured in turn with it, and the
memory that the compiled programs take. The step has the teacher's pass, augmentation and all weights of the cifar100
recipe; methods that train in phases are measured in their first.

  --pair     default: resnet32x4/resnet8x4
  --methods  default: all that learn from single labels and take any student
  --batch    images in a step; default: 64
  --devices  devices that share a step, on CPUs one for each core at most; default: 1
  --rounds   steps of each; default: 5
  --json     file for the figures
"""

import argparse
import pathlib
import statistics
import sys
from typing import Any

import jax

# The recipes and this folder are not installed with the package.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.accelerator import Pair, Students
from benchmarks.category_structure import describe_environment
from benchmarks.measuring import Part, interleaved, median_ratio, render, save
from cskd_jax.commands.command_line import set_up_jax
from cskd_jax.configs.methods import METHODS, TOKEN_METHODS
from cskd_jax.console import counted
from cskd_jax.distributed.devices import Devices, make_cores_devices


def measure(pair: Pair, methods: list[str], rounds: int, devices: Devices) -> Part:
    """Measures all methods, each beside kd."""
    reference, rows = Students(pair, "float32", "default", ("kd",), devices), []
    jax.block_until_ready(reference.step())
    for method in methods:
        students = Students(pair, "float32", "default", (method,), devices)
        jax.block_until_ready(students.step())
        kd, own = interleaved([reference.step, students.step], rounds, warm_up=0)
        row: dict[str, Any] = {"method": method, "ms": statistics.median(own), "of kd": median_ratio(own, kd)}
        rows.append(row | {"memory MB": students.memory() / 1e6})
        print(rows[-1], file=sys.stderr, flush=True)
        del students
        jax.clear_caches()
    title = f"{pair.teacher[0]} -> {pair.student[0]}, batches of {pair.batch_size}: a training step"
    return Part(title, rows, [f"{rounds} rounds, {counted(devices.count, 'device')}."])


def main(argv: list[str] | None = None) -> None:
    """Measures the methods, prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="resnet32x4/resnet8x4")
    parser.add_argument("--methods", default=",".join(sorted({*METHODS} - {*TOKEN_METHODS})))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args(argv)
    set_up_jax()
    make_cores_devices()
    teacher, student = arguments.pair.split("/")
    pair = Pair((teacher, 1.0), (student, 1.0), arguments.batch, arguments.side)
    part = measure(pair, arguments.methods.split(","), arguments.rounds, Devices(arguments.devices))
    print(render(part))
    save(arguments.json, describe_environment(with_torch=False), {"methods": part})


if __name__ == "__main__":
    main()
