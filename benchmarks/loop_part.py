"""Measures the time of the training loop beyond the compiled step: data, metrics, logging."""

import contextlib
import io
import pathlib
import statistics
import tempfile
import time

import jax
import ml_collections
import numpy as np

from benchmarks.measuring import Part, median_ratio
from cskd_jax.data import ImageDataset, Split
from cskd_jax.distributed.devices import Devices
from cskd_jax.runs.build import describe_network, make_network, make_trainer
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training.state import init_network
from cskd_jax.training.teachers import Teacher

NUM_CLASSES = 100
# {name: (network of teacher and student, its width, side of the images, steps in an epoch)}
CASES = {"small": ("resnet18", 0.125, 16, 40), "large": ("resnet18", 0.25, 32, 12)}


def make_config(name: str, width: float, steps: int) -> ml_collections.ConfigDict:
    """Returns the CIFAR-100 recipe with a small teacher and one epoch."""
    config = load_recipe("cifar100", [])
    config.epochs = 1
    for network in (config.teacher, config.student):
        network.name, network.width = name, width
    config.log_every = min(config.log_every, steps // 2)
    return config


def make_dataset(train_examples: int, side: int) -> ImageDataset:
    """Returns a data set of random images."""
    generator = np.random.default_rng(0)

    def split(size):
        images = generator.integers(256, size=(size, side, side, 3), dtype=np.uint8)
        return Split(images, generator.integers(NUM_CLASSES, size=size, dtype=np.int32))

    categories = tuple(str(category) for category in range(NUM_CLASSES))
    return ImageDataset("synthetic", split(train_examples), split(NUM_CLASSES), categories)


class Runner:
    """Runs the same compiled step within the training loop and bare."""

    def __init__(self, name: str, width: float, side: int, steps: int, folder: pathlib.Path):
        self._steps, self._folder, self._runs = steps, folder, 0
        config = make_config(name, width, steps)
        dataset = make_dataset(config.batch_size * steps, side)
        images, labels = dataset.train.images[: config.batch_size], dataset.train.labels[: config.batch_size]
        self._batch = {"image": images, "label": labels, "index": np.arange(len(labels), dtype=np.int32)}
        devices, network = (
            Devices(),
            make_network(describe_network(config.teacher, dataset.image_shape), NUM_CLASSES, config.dtype),
        )
        variables = jax.jit(lambda key: init_network(network, key, dataset.image_shape)[0])(jax.random.PRNGKey(0))
        self._teacher, self._devices = Teacher(network, variables), devices
        self._make = lambda folder: make_trainer("student", config, dataset, folder, devices, [self._teacher])
        self._batch_size = config.batch_size
        self.loop(), self.bare()

    def loop(self) -> float:
        """Returns the milliseconds per step of one epoch of the loop."""
        self._runs += 1
        # Each run has a folder of its own, because a training resumes where its folder ends.
        folder = self._folder / str(self._runs)
        folder.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            self._trainer = self._make(folder)
            result = self._trainer.fit()["student"]
        return 1e3 * self._batch_size / result.images_per_second

    def bare(self) -> float:
        """Returns the milliseconds per step of as many calls of the compiled step, on one batch."""
        programs = self._trainer.programs("student")
        state = self._devices.replicate(self._trainer.state["student"])
        variables = self._devices.replicate(self._teacher.variables)
        batch = self._devices.shard(self._batch)
        jax.block_until_ready((state, variables))
        start = time.perf_counter()
        for _ in range(self._steps):
            prepared = self._trainer.teacher_pass(self._batch_size, 0, variables, batch["image"])
            state, metrics = programs.step(0, self._batch_size, state, batch | prepared)
        jax.block_until_ready((state, metrics))
        return 1e3 * (time.perf_counter() - start) / self._steps


def measure(repeats: int, with_torch: bool) -> Part:
    """Measures the time per step in the loop and bare, in turns."""
    del with_torch
    rows = []
    for case, (name, width, side, steps) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            runner = Runner(name, width, side, steps, pathlib.Path(folder))
            times = [(runner.bare(), runner.loop()) for _ in range(min(repeats, 9))]
        bare, loop = zip(*times, strict=True)
        rows.append(
            {
                "network": f"{case}: {name}, width {width}, {side}x{side}",
                "bare ms": statistics.median(bare),
                "loop ms": statistics.median(loop),
                "overhead %": 100 * (median_ratio(loop, bare) - 1),
            }
        )
    notes = [
        "Milliseconds per step. Loop: the trainer on images in memory, with batches, metrics and logs; without "
        "evaluation and checkpoints. Bare: the same compiled step called again and again on one batch.",
        "Both crop, mirror and normalize, which is part of the step. Overhead: median over alternating epochs.",
    ]
    return Part("Loop: what training costs beyond its compiled steps", rows, notes)
