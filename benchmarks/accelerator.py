"""Benchmark of the device that is here: `python benchmarks/accelerator.py [--json FILE] [--seconds N] [--small]`.

In at most N seconds (default 480) it measures, one table after the other, and saves the figures after each:
  steps    step time, images/s, memory and share of the peak of five pairs, each precision and bfloat16, alone (kd) and
           together (ce, kd, at and cskd with one pass of the teacher)
  checks   whether a step gives the same bits twice, and a resumed training those of an undisturbed one
  loop     time of the training loop beyond its steps, and images/s of the input
  torch    one step of the category-structure recipe in PyTorch, where PyTorch sees the device

What does not fit into the time is left out and named. --small measures the same with tiny networks, as a test.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

# The recipes and this folder are not installed with the package.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import loop_part, step_part
from benchmarks.category_structure import describe_environment
from benchmarks.measuring import Part, render, save
from cskd_jax.commands.command_line import set_up_jax
from cskd_jax.data import ImageDataset, Split
from cskd_jax.data.batches import read_steps
from cskd_jax.data.samplers import UniformSampler
from cskd_jax.distributed.devices import Devices
from cskd_jax.errors import InterruptedRun
from cskd_jax.runs.build import describe_network, make_network, make_trainer, precision
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training.arrays import digest_of
from cskd_jax.training.programs import Reads
from cskd_jax.training.state import init_network
from cskd_jax.training.teachers import Teacher

TOGETHER = ("ce", "kd", "at", "cskd")
NUM_CLASSES = 100
_PARTS = ("checks", "loop", "torch", "steps")
# Arithmetic of a device at its peak in FLOP/s, by a part of its kind: of float32 products by default, and of bfloat16.
# From the vendors' data sheets, dense.
PEAKS = {"H100": (494e12, 989e12), "H200": (494e12, 989e12), "A100": (156e12, 312e12), "v5 lite": (99e12, 197e12)}
TYPES = {"default": ("float32", "default"), "highest": ("float32", "highest"), "bfloat16": ("bfloat16", "default")}


class Pair(NamedTuple):
    """Teacher and student, each (name, width), the size of a batch, and the side of the images."""

    teacher: tuple[str, float]
    student: tuple[str, float]
    batch_size: int
    side: int


PAIRS = {
    "resnet56 -> resnet20": Pair(("resnet56", 1.0), ("resnet20", 1.0), 64, 32),
    "resnet32x4 -> resnet8x4": Pair(("resnet32x4", 1.0), ("resnet8x4", 1.0), 64, 32),
    "wrn_40_2 -> wrn_16_2": Pair(("wrn_40_2", 1.0), ("wrn_16_2", 1.0), 64, 32),
    "R101_0.5 -> R18_0.25": Pair(("resnet101", 0.5), ("resnet18", 0.25), 128, 32),
    "resnet34_224 -> resnet18_224": Pair(("resnet34_224", 1.0), ("resnet18_224", 1.0), 128, 224),
}
SMALL = {"resnet8 -> resnet8": Pair(("resnet8", 0.25), ("resnet8", 0.25), 8, 8)}


class Students:
    """Students of one teacher with their compiled programs, and a batch on the device.

    Args:
      pair: Networks and batch.
      dtype: Type that the networks compute with.
      products: Precision of float32 products.
      methods: Methods, one student for each.
      devices: Devices; None takes all.
    """

    def __init__(self, pair: Pair, dtype: str, products: str, methods: tuple[str, ...], devices: Devices | None = None):
        self._size, self._devices = pair.batch_size, devices or Devices()
        configs = [self._configure(pair, dtype, products, method) for method in methods]
        dataset = make_dataset(2 * pair.batch_size, pair.side)
        network = make_network(describe_network(configs[0].teacher, dataset.image_shape), NUM_CLASSES, dtype)
        with precision(configs[0]):
            variables = jax.jit(lambda key: init_network(network, key, dataset.image_shape)[0])(jax.random.PRNGKey(0))
            teacher, trainers = Teacher(network, jax.device_get(variables)), []
            for config in configs:
                beside = trainers[0] if trainers else None
                trainers.append(make_trainer("student", config, dataset, None, self._devices, [teacher], (), beside))
            self._programs = [trainer.programs("student") for trainer in trainers]
            self._pass = trainers[0].teacher_pass
            self._compile()
        variables = self._devices.replicate(teacher.variables)
        for programs in self._programs:
            programs.take_teacher(variables)
        self._variables = None if self._reads.teacher is None else variables
        self.states = [self._devices.replicate(programs.init()) for programs in self._programs]
        batch = {"image": dataset.train.images[: self._size], "label": dataset.train.labels[: self._size]}
        self._batch = self._devices.shard(batch | {"index": np.arange(self._size, dtype=np.int32)})

    def _configure(self, pair, dtype, products, method):
        config = load_recipe(f"cifar100:{method}", [])
        config.batch_size, config.dtype, config.precision, config.epochs = pair.batch_size, dtype, products, 1
        for settings, (name, width) in ((config.teacher, pair.teacher), (config.student, pair.student)):
            settings.name, settings.width = name, width
        return config

    def _compile(self):
        self._reads = Reads.union([programs.reads for programs in self._programs])
        with ThreadPoolExecutor() as pool:
            self._pass.compile(self._size, self._reads, pool)
            for programs in self._programs:
                programs.compile(0, self._size, pool)
                programs.compile_init(pool)

    def step(self) -> Any:
        """Dispatches one step of all students and returns their metrics."""
        prepared = self._pass(self._size, 0, self._variables, self._batch["image"])
        metrics = []
        for number, programs in enumerate(self._programs):
            self.states[number], found = programs.step(0, self._size, self.states[number], self._batch | prepared)
            metrics.append(found)
        return metrics

    def measure(self, steps: int) -> float:
        """Returns the milliseconds per step, the median of three runs of so many steps without a wait in between."""
        jax.block_until_ready(self.step())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(steps):
                metrics = self.step()
            jax.block_until_ready((metrics, self.states))
            times.append(1e3 * (time.perf_counter() - start) / steps)
        return statistics.median(times)

    def flops(self) -> float:
        """Returns the floating-point operations of a step by the compiler's account."""
        compiled = [self._pass.compiled(self._size), *(programs.compiled(0, self._size) for programs in self._programs)]
        analyses = [program.cost_analysis() for program in compiled]
        return sum((found[0] if isinstance(found, list) else found)["flops"] for found in analyses)

    def memory(self) -> int:
        """Returns the bytes that pass, states and the largest step take on a device by the compiler's account."""
        parts = [programs.memory(0, self._size) for programs in self._programs]
        return self._pass.memory(self._size) + sum(kept for kept, _ in parts) + max(more for _, more in parts)


def make_dataset(examples: int, side: int) -> ImageDataset:
    """Returns random images of all classes."""
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(examples, side, side, 3), dtype=np.uint8)
    split = Split(images, np.arange(examples, dtype=np.int32) % NUM_CLASSES)
    return ImageDataset("random", split, split, tuple(map(str, range(NUM_CLASSES))))


def measure_steps(pairs: dict[str, Pair], steps: int, deadline: float) -> Part:
    """Measures every pair with every type of numbers, alone and together, until the deadline."""
    rows, left_out = [], []
    kind = jax.devices()[0].device_kind
    peaks = next((peaks for name, peaks in PEAKS.items() if name in kind), None)
    # What matters most comes first.
    cases = [(pair, numbers, methods) for numbers in TYPES for methods in (("kd",), TOGETHER) for pair in pairs]
    for name, numbers, methods in cases:
        label = f"{name}, {numbers}, {len(methods)} together"
        if rows and time.monotonic() > deadline:
            left_out.append(label)
            continue
        students, pair = Students(pairs[name], *TYPES[numbers], methods), pairs[name]
        milliseconds, flops = students.measure(steps), students.flops()
        peak = None if peaks is None or numbers == "highest" else peaks[numbers == "bfloat16"]
        rows.append(
            {
                "pair": name,
                "numbers": numbers,
                "students": len(methods),
                "step ms": milliseconds,
                "images/s": 1e3 * pair.batch_size * len(methods) / milliseconds,
                "memory MB": students.memory() / 1e6,
                "share of peak %": None if peak is None else 1e5 * flops / milliseconds / peak,
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    notes = [
        "Alone: kd. Together: ce, kd, at and cskd, with one pass of the teacher; a step is one of each of them.",
        "Memory and operations are those of the compiled programs.",
    ]
    if left_out:
        notes.append(f"Left out for lack of time: {'; '.join(left_out)}.")
    return Part(f"Training steps on {kind}", rows, notes)


class _Stop:
    """Asks to stop after some steps."""

    name = "the benchmark"

    def __init__(self, steps: int):
        self._steps, self.requested = steps, False

    def reached(self) -> bool:
        """Returns whether to stop before the next step."""
        self.requested, self._steps = self._steps == 0, self._steps - 1
        return self.requested


def measure_checks(pair: Pair) -> Part:
    """Checks that a step gives the same bits twice, and that a resumed training gives those of an undisturbed one."""

    def states():
        students = Students(pair, "float32", "default", TOGETHER)
        for _ in range(3):
            students.step()
        return [digest_of(jax.device_get(state)) for state in students.states]

    def train(folder, stop=None):
        config = load_recipe("cifar100:kd", [])
        config.batch_size, config.epochs = pair.batch_size, 2
        for settings, (name, width) in ((config.teacher, pair.teacher), (config.student, pair.student)):
            settings.name, settings.width = name, width
        dataset = make_dataset(pair.batch_size * max(3, -(-NUM_CLASSES // pair.batch_size)), pair.side)
        network = make_network(describe_network(config.teacher, dataset.image_shape), NUM_CLASSES, config.dtype)
        variables = jax.jit(lambda key: init_network(network, key, dataset.image_shape)[0])(jax.random.PRNGKey(0))
        trainer = make_trainer("student", config, dataset, folder, Devices(), [Teacher(network, variables)])
        return digest_of(trainer.fit(stop)["student"].variables)

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "a").mkdir(), (folder / "b").mkdir()
        undisturbed = train(folder / "a")
        with contextlib.suppress(InterruptedRun):
            train(folder / "b", _Stop(2))
        resumed = train(folder / "b")
    rows = [
        {"check": "three steps, twice, give the same bits", "holds": str(states() == states())},
        {"check": "a resumed training gives the bits of an undisturbed one", "holds": str(undisturbed == resumed)},
    ]
    return Part("Checks", rows, ["GPUs need XLA_FLAGS=--xla_gpu_deterministic_ops=true, as the commands set it."])


def measure_loop(pair: Pair, steps: int) -> Part:
    """Measures the time of the loop beyond its steps, and the speed of the input."""
    loop, bare = map(statistics.median, loop_part.measure_case(*pair.student, pair.side, steps, rounds=3))
    devices, dataset = Devices(), make_dataset(max(NUM_CLASSES, 20 * pair.batch_size), pair.side)
    sampler = UniformSampler(len(dataset.train.labels), pair.batch_size, 0, True)
    start = time.perf_counter()
    for _, batch in read_steps(dataset.train, sampler, range(sampler.steps_per_epoch), np.arange):
        jax.block_until_ready(devices.shard(batch))
    speed = pair.batch_size * sampler.steps_per_epoch / (time.perf_counter() - start)
    row = {"bare ms": bare, "loop ms": loop, "overhead %": 100 * (loop / bare - 1), "input images/s": speed}
    return Part(f"The loop: {pair.student[0]}, width {pair.student[1]:g}", [row], ["Images in memory."])


def main(argv: list[str] | None = None) -> None:
    """Measures all parts that fit into the time, prints and saves them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", default=",".join(_PARTS), help=f"of {', '.join(_PARTS)}; default: all")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.seconds
    set_up_jax()
    pairs, steps = (SMALL, 3) if arguments.small else (PAIRS, 20)
    first = next(iter(pairs.values()))
    has_torch = _sees_device()
    environment, measured = describe_environment(has_torch), {}
    print(json.dumps(environment))
    parts = {
        "checks": lambda: measure_checks(first),
        "loop": lambda: measure_loop(first, steps),
        "torch": (lambda: step_part.measure(10, True)) if has_torch and not arguments.small else None,
        "steps": lambda: measure_steps(pairs, steps, deadline),
    }
    for name, measure in parts.items():
        if measure is None or name not in arguments.parts.split(","):
            continue
        measured[name] = measure()
        print(f"\n{render(measured[name])}", flush=True)
        save(arguments.json, environment, measured)


def _sees_device() -> bool:
    """Returns whether PyTorch is installed and can compute where JAX does."""
    try:
        import torch
    except ImportError:
        return False
    return jax.default_backend() == "cpu" or (jax.default_backend() == "gpu" and torch.cuda.is_available())


if __name__ == "__main__":
    main()
