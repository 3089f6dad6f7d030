"""Benchmark of pairs of the standard table: `python benchmarks/pairs.py [--pairs=...] [--rounds=7] [--json=FILE]`.

A step of each method alone, and of all methods together with one forward pass of the teacher, against a step of each in
PyTorch: eager, channels-last, fused SGD. JAX also crops, mirrors and normalizes the images. All are measured in turn,
round after round, and ratios are medians of those within a round.

  --pairs    of the networks of benchmarks/torch_pairs.py; default: three pairs
  --methods  default: ce,kd,dkd,at,sp,pkt,rkd,cskd
  --devices  numbers of devices that share a batch, such as 1,2; default: 1
  --batch    images in a step; default: 64
"""

import argparse
import json
import pathlib
import statistics
import sys
from typing import Any

import jax

# The recipes and this folder are not installed with the package.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.accelerator import Pair, Students
from benchmarks.category_structure import describe_environment
from benchmarks.measuring import MISSING_TORCH, Part, has_torch, interleaved, median_ratio, render, save
from cskd_jax.commands.command_line import set_up_jax
from cskd_jax.distributed.devices import Devices, make_cores_devices

PAIRS = "resnet56/resnet20,resnet32x4/resnet8x4,wrn_40_2/wrn_16_2"
METHODS = "ce,kd,dkd,at,sp,pkt,rkd,cskd"


def measure(pair: str, methods: tuple[str, ...], counts: list[int], batch_size: int, rounds: int) -> Part:
    """Measures one pair: each method alone and all together, on each number of devices, and in PyTorch."""
    teacher, student = pair.split("/")
    described = Pair((teacher, 1.0), (student, 1.0), batch_size, 32)
    calls: dict[tuple[str, str], Any] = {}
    for method in methods if has_torch() else ():
        from benchmarks import torch_pairs

        calls[method, "PyTorch"] = torch_pairs.Step(teacher, student, method, batch_size)
    for count in counts:
        for chosen in (*((method,) for method in methods), methods):
            students = Students(described, "float32", "default", chosen, Devices(count))
            calls["+".join(chosen), _column(count)] = students.step
            print(f"{pair}: {'+'.join(chosen)} on {count} devices compiled", file=sys.stderr, flush=True)
    times = dict(zip(calls, interleaved(list(calls.values()), rounds, warm_up=2), strict=True))
    together = "+".join(methods)
    for column in {column for _, column in calls}:
        alone = [times[method, column] for method in methods]
        times["all, one by one", column] = [sum(values) for values in zip(*alone, strict=True)]
    rows = []
    for name in (*methods, "all, one by one", together):
        row: dict[str, Any] = {"method": name}
        for column in ("PyTorch", *map(_column, counts)):
            reference = times.get((name if name != together else "all, one by one", "PyTorch"))
            found = times.get((name, column))
            row[f"{column} ms"] = found and statistics.median(found)
            row[f"{column} min"] = found and min(found)
            if column != "PyTorch":
                row[f"{column}, times PyTorch"] = reference and found and median_ratio(found, reference)
                row[f"{column}, of one by one"] = (
                    median_ratio(found, times["all, one by one", column]) if name == together else None
                )
        rows.append(row)
    notes = [f"Batches of {batch_size}, {rounds} rounds."] + ([] if has_torch() else [MISSING_TORCH])
    return Part(f"{pair}: milliseconds of a training step", rows, notes)


def _column(count):
    return f"JAX/{count}"


def main(argv: list[str] | None = None) -> None:
    """Measures the pairs, prints and saves the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default=PAIRS)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--devices", default="1")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args(argv)
    set_up_jax()
    make_cores_devices()
    environment, parts = describe_environment(has_torch()), {}
    print(json.dumps(environment))
    counts = [int(count) for count in arguments.devices.split(",")]
    for pair in arguments.pairs.split(","):
        parts[pair] = measure(pair, tuple(arguments.methods.split(",")), counts, arguments.batch, arguments.rounds)
        print(f"\n{render(parts[pair])}", flush=True)
        save(arguments.json, environment, parts)
        jax.clear_caches()


if __name__ == "__main__":
    main()
