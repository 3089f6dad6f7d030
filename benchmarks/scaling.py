"""Measures the cost of several devices: bytes that a step moves between them, memory, and the time of the sums.

python benchmarks/scaling.py [--devices=1,2,8] [--sizes=1:64:100,1:128:100,1:128:1000] [--processes=1,2,4]
    [--json=FILE]

Bytes and memory are read from the compiled step and teacher pass of the CIFAR-100 recipe, for fake CPU devices: the
bytes that the all-reduces and all-gathers of the programs receive on each device, by their cause, and XLA's own account
of the memory of a device. Time is that of a sum of a million floats over fake devices of one process and over local
processes.
--teacher and --student (NAME:WIDTH) and --image take the place of the recipe's networks and images.
"""

import argparse
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import numpy as np
from jax import lax

from benchmarks.category_structure import describe_environment
from benchmarks.measuring import Part, milliseconds, render, save
from cskd_jax.data import ImageDataset, Split
from cskd_jax.distributed import processes
from cskd_jax.distributed.devices import AXIS, Devices
from cskd_jax.models.layers import normalize_by_batch
from cskd_jax.runs.build import describe_network, make_network, make_trainer
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training.teachers import Teacher

ROOT = pathlib.Path(__file__).resolve().parents[1]
_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "s64": 8, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
_COLLECTIVE = re.compile(r" = (?P<type>.*?) (?P<kind>all-reduce|all-gather)(?:-start)?\((?P<rest>.*)")
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")
_REPEATS = 30
# The purposes of collectives.
BATCH_NORM, LOSSES, STEP = "BatchNorm statistics", "losses", "gradients, metrics"


def collectives(program: str) -> Iterator[tuple[str, int, str]]:
    """Returns (all-reduce or all-gather, bytes received on a device, JAX's name) of each collective in a program."""
    for line in program.splitlines():
        if found := _COLLECTIVE.search(line):
            size = sum(
                _BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
                for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", found["type"])
            )
            if found["kind"] == "all-gather":
                # Its result is that of all devices of the group.
                listed, number = _GROUP.search(line).groups()
                size //= len(listed.split(",")) if listed else int(number)
            name = re.search(r'op_name="([^"]*)"', line)
            yield found["kind"], size, name[1] if name else ""


def cause(name: str) -> str:
    """Returns the purpose of a collective of this name."""
    if normalize_by_batch.__name__ in name:
        return BATCH_NORM
    # The names of sums within the losses contain the name of a method; those of the step itself do not.
    return LOSSES if re.search(r"jvp\(\w+\)", name) else STEP


def inspect(arguments: argparse.Namespace) -> dict[str, object]:
    """Measures bytes by cause, number of collectives and memory of the compiled step on this process's devices."""
    config = load_recipe("cifar100", [])
    config.batch_size = arguments.batch
    for network, given in ((config.teacher, arguments.teacher), (config.student, arguments.student)):
        if given:
            network.name, width = given.split(":")
            network.width = float(width)
    shape = (arguments.batch, arguments.image, arguments.image, 3)
    labels = np.arange(arguments.batch, dtype=np.int32) % arguments.categories
    split = Split(np.zeros(shape, np.uint8), labels)
    dataset = ImageDataset("none", split, split, tuple(map(str, range(arguments.categories))))
    teacher = Teacher(
        make_network(describe_network(config.teacher, dataset.image_shape), arguments.categories, config.dtype)
    )
    trainer = make_trainer("student", config, dataset, None, Devices(), [teacher])
    programs, teacher_pass = trainer.programs("student"), trainer.teacher_pass
    with ThreadPoolExecutor() as pool:
        teacher_pass.compile(arguments.batch, programs.reads, pool)
        # The optimizations of LLVM change neither.
        compiled = programs.lowered[0].compile(compiler_options={"xla_backend_optimization_level": 0})
    moved, count = {}, 0
    for program in compiled, teacher_pass.compiled(arguments.batch):
        for _, size, name in collectives(program.as_text()):
            moved[cause(name)] = moved.get(cause(name), 0) + size
            count += 1
    memory = compiled.memory_analysis()
    parameters = sum(x.size for x in jax.tree.leaves(programs.states[0].params))
    return {
        "moved": moved,
        "count": count,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "teacher pass": teacher_pass.memory(arguments.batch),
        "parameters": parameters,
        "side": arguments.image,
        "networks": " to ".join(f"{given.name}:{given.width:g}" for given in (config.teacher, config.student)),
    }


def time_sum(arguments: argparse.Namespace) -> float | None:
    """Returns the median milliseconds of a sum of `--floats` floats over all devices; None but on the first process."""
    processes.initialize(arguments.coordinator, arguments.processes, arguments.process)
    devices = Devices()
    mapped = devices.map_eval_step(lambda _, batch: lax.psum(batch["x"], AXIS))
    rows = devices.local_rows(devices.count)
    batch = devices.shard({"x": np.ones((rows.stop - rows.start, arguments.floats), np.float32)})
    times = [milliseconds(lambda: mapped(np.zeros(()), batch)) for _ in range(_REPEATS)]
    return statistics.median(times[_REPEATS // 3 :]) if processes.is_first() else None


def ask(devices: int, *arguments: str, processes: int = 1) -> object:
    """Returns the JSON output of a process with that many fake devices, whose number is fixed at its start."""
    # Combined collectives would lose their names.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_disable_hlo_passes=cpu-all-reduce-combiner"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cskd_jax.supervise", f"--processes={processes}", "--restarts=0", "--"]
    command += [sys.executable, str(pathlib.Path(__file__).resolve()), *arguments]
    output = subprocess.run(command, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith("OUTCOME "))[8:])


def measure_steps(sizes: list[tuple[int, int, int]], networks: list[str]) -> Part:
    """Measures bytes and memory for (devices, global batch, classes)."""
    rows = []
    for count, batch, categories in sizes:
        outcome = ask(count, "--ask=step", f"--batch={batch}", f"--categories={categories}", *networks)
        moved = {name: outcome["moved"].get(name, 0) for name in (STEP, LOSSES, BATCH_NORM)}
        if count > 1 and 0 in moved.values():
            raise RuntimeError(f"a step without collectives of one kind: {moved}; `cause` does not know their names")
        rows.append(
            {"devices": count, "batch": batch, "categories": categories}
            | {f"{name} kB": size / 1e3 for name, size in moved.items()}
            | {"collectives": outcome["count"]}
            | {f"{name} MB": outcome[name] / 1e6 for name in ("arguments", "temporary", "teacher pass")}
        )
        print(rows[-1], file=sys.stderr, flush=True)
    notes = [
        "kB: taken in by the collectives of one step on one device; a ring all-reduce of them sends and receives about "
        "twice as much. The collectives are counted before XLA combines neighbors.",
        "MB: on one device, by XLA's account for the CPU: state and batch of a step; what it needs besides; and all of "
        "the pass of the teacher, which may run at the same time.",
        f"{outcome['parameters']:,} trained parameters are {outcome['parameters'] * 4 / 1e3:,.0f} kB.",
    ]
    return Part(f"One training step: {outcome['networks']}, {outcome['side']}x{outcome['side']}", rows, notes)


def measure_time(floats: int, devices: list[int], processes: list[int]) -> Part:
    """Measures the time of a sum, with the same work on each device."""
    places = [(1, count) for count in devices] + [(count, 1) for count in processes if count > 1]
    rows = [
        {
            "processes": count,
            "devices of each": each,
            "sum ms": ask(each, "--ask=sum", f"--floats={floats}", processes=count),
        }
        for count, each in places
    ]
    notes = [f"Median of a sum of {floats:,} floats over all devices, which share {os.cpu_count()} cores."]
    return Part("A sum over the devices (weak scaling)", rows, notes)


def main() -> None:
    """Prints the tables, or the outcome of one measurement in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2,8")
    parser.add_argument("--sizes", default="1:64:100,1:128:100,1:128:1000", help="devices:batch:categories, ...")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--teacher", help="NAME:WIDTH")
    parser.add_argument("--student", help="NAME:WIDTH")
    parser.add_argument("--image", type=int, default=32, help="pixels of its side")
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    # Arguments of the processes that this one starts; the supervisor adds the last ones.
    hidden = {"help": argparse.SUPPRESS}
    parser.add_argument("--ask", choices=("step", "sum"), **hidden)
    parser.add_argument("--batch", type=int, default=128, **hidden)
    parser.add_argument("--categories", type=int, default=100, **hidden)
    parser.add_argument("--floats", type=int, default=1_000_000, **hidden)
    parser.add_argument("--coordinator", **hidden)
    parser.add_argument("--process", type=int, **hidden)
    arguments = parser.parse_args()
    if arguments.ask:
        several = arguments.coordinator is not None
        arguments.processes = int(arguments.processes) if several else None
        outcome = {"step": inspect, "sum": time_sum}[arguments.ask](arguments)
        if outcome is not None:
            print("OUTCOME", json.dumps(outcome), flush=True)
        return
    devices, processes = ([int(n) for n in text.split(",")] for text in (arguments.devices, arguments.processes))
    sizes = [(count, 128, 100) for count in devices]
    sizes += [tuple(map(int, size.split(":"))) for size in arguments.sizes.split(",") if size]
    networks = [f"--{name}={value}" for name in ("teacher", "student", "image") if (value := getattr(arguments, name))]
    parts = {"sum": measure_time(arguments.floats, devices, processes)}
    print("\n" + render(parts["sum"]), flush=True)
    parts["step"] = measure_steps(list(dict.fromkeys(sizes)), networks)
    print("\n" + render(parts["step"]), flush=True)
    save(arguments.json, describe_environment(with_torch=False), parts)


if __name__ == "__main__":
    main()
