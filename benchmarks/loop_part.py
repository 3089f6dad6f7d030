"""Measures the time of the training loop beyond the compiled step: data, metrics, logging."""

import contextlib
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks.measuring import Part, median_ratio
from cskd_jax.data import ImageDataset, Split
from cskd_jax.distributed.devices import Devices
from cskd_jax.runs.build import describe_network, make_network, make_trainer
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training.callbacks import Callback, Start
from cskd_jax.training.state import init_network
from cskd_jax.training.teachers import Teacher

NUM_CLASSES = 100
# {name: (network of teacher and student, its width, side of the images, steps in an epoch)}
CASES = {"small": ("resnet18", 0.125, 16, 40), "large": ("resnet18", 0.25, 32, 12)}


def make_dataset(train_examples: int, side: int) -> ImageDataset:
    """Returns a data set of random images."""
    generator = np.random.default_rng(0)

    def split(size):
        images = generator.integers(256, size=(size, side, side, 3), dtype=np.uint8)
        return Split(images, generator.integers(NUM_CLASSES, size=size, dtype=np.int32))

    categories = tuple(str(category) for category in range(NUM_CLASSES))
    return ImageDataset("synthetic", split(train_examples), split(NUM_CLASSES), categories)


class Alternating(Callback):
    """Measures each epoch of a training, and something else after it.

    Args:
      other: Function that measures it, with the number of steps of an epoch as its argument.

    Attributes:
      loop: Milliseconds per step of each epoch but the first, in which programs are compiled for the others.
      other: What the function returned after each of these epochs.
    """

    def __init__(self, other: Callable[[int], float]):
        self.loop, self.other = list[float](), list[float]()
        self._measure_other = other

    def on_start(self, start: Start) -> None:
        """Keeps the progress, which has the seconds of the training."""
        self._start, self._seconds = start, 0.0

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Measures after the evaluation of an epoch."""
        if row["split"] == "train":
            return
        seconds, self._seconds = self._start.progress.seconds - self._seconds, self._start.progress.seconds
        if row["epoch"] > 1:
            self.loop.append(1e3 * seconds / self._start.steps_per_epoch)
            self.other.append(self._measure_other(self._start.steps_per_epoch))


def measure_case(name: str, width: float, side: int, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    """Returns the milliseconds per step, in turns `rounds` times: of an epoch of training, and of the bare steps.

    Args:
      name: Network of teacher and student, with the CIFAR-100 recipe.
      width: Its width.
      side: Height and width of the images.
      steps: Steps in an epoch.
      rounds: Epochs.
    """
    config = load_recipe("cifar100", [])
    config.epochs, config.log_every = rounds + 1, min(config.log_every, steps // 2)
    for network in (config.teacher, config.student):
        network.name, network.width = name, width
    size = config.batch_size
    dataset, devices = make_dataset(size * steps, side), Devices()
    network = make_network(describe_network(config.teacher, dataset.image_shape), NUM_CLASSES, config.dtype)
    given = jax.jit(lambda key: init_network(network, key, dataset.image_shape)[0])(jax.random.PRNGKey(0))
    images = {"image": dataset.train.images[:size], "label": dataset.train.labels[:size]}

    def bare(steps):
        programs = trainer.programs("student")
        state, variables = devices.replicate((programs.init(), given))
        batch = devices.shard(images | {"index": np.arange(size, dtype=np.int32)})
        jax.block_until_ready((state, variables, batch))
        start = time.perf_counter()
        for _ in range(steps):
            prepared = trainer.teacher_pass(size, 0, variables, batch["image"])
            state, metrics = programs.step(0, size, state, batch | prepared)
        jax.block_until_ready((state, metrics))
        return 1e3 * (time.perf_counter() - start) / steps

    times = Alternating(bare)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        teachers = [Teacher(network, given)]
        trainer = make_trainer("student", config, dataset, pathlib.Path(folder), devices, teachers, [times])
        trainer.fit()
    return times.loop, times.other


def measure(repeats: int, with_torch: bool) -> Part:
    """Measures the time per step in the loop and bare, in turns."""
    del with_torch
    rows = []
    for case, (name, width, side, steps) in CASES.items():
        loop, bare = measure_case(name, width, side, steps, rounds=repeats)
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
        "evaluation, saving and the first epoch. Bare: the same compiled step called again and again on one batch.",
        "Both crop, mirror and normalize, which is part of the step. Overhead: median over alternating epochs.",
    ]
    return Part("Loop: what training costs beyond its compiled steps", rows, notes)
