"""What the training loop costs beyond the compiled step: data, metrics, logging."""

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
from cskd_jax.distributed import devices
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training.networks import Network
from cskd_jax.training.state import init_network
from cskd_jax.training.trainer import Phase

NUM_CLASSES = 100
# name -> (width of the ResNet18s, side of the images, steps in an epoch)
CASES = {"small": (0.125, 16, 40), "large": (0.25, 32, 12)}


def make_config(width: float, steps: int) -> ml_collections.ConfigDict:
    """The CIFAR-100 recipe with a small teacher and one epoch."""
    config = load_recipe("cifar100", [])
    config.epochs = 1
    for network in (config.teacher, config.student):
        network.name, network.width = "resnet18", width
    config.log_every = min(config.log_every, steps // 2)
    return config


def make_dataset(train_examples: int, side: int) -> ImageDataset:
    """Random images."""
    generator = np.random.default_rng(0)

    def split(size):
        images = generator.integers(256, size=(size, side, side, 3), dtype=np.uint8)
        return Split(images, generator.integers(NUM_CLASSES, size=size, dtype=np.int32))

    categories = tuple(str(category) for category in range(NUM_CLASSES))
    return ImageDataset("synthetic", split(train_examples), split(NUM_CLASSES), categories)


class Runner:
    """Runs the same compiled step within the loop of a phase and bare."""

    def __init__(self, width: float, side: int, steps: int, folder: pathlib.Path):
        self._steps, self._folder, self._runs = steps, folder, 0
        config = make_config(width, steps)
        dataset = make_dataset(config.batch_size * steps, side)
        teacher, student = (Network.create(c, NUM_CLASSES, config.dtype) for c in (config.teacher, config.student))
        variables = jax.jit(lambda key: init_network(teacher.module, key, dataset.image_shape)[0])(
            jax.random.PRNGKey(0)
        )
        self._teacher_variables = devices.replicate(variables)
        self._phase = Phase("student", config, student, config.losses, config.epochs, dataset, folder, teacher)
        self.loop(), self.bare()

    def loop(self) -> float:
        """Milliseconds per step of one epoch of the loop."""
        self._runs += 1
        # A folder of its own: a phase resumes where its folder ends.
        self._phase._workdir = self._folder / str(self._runs)
        self._phase._workdir.mkdir()
        with contextlib.redirect_stdout(io.StringIO()), StopRequest() as stop:
            _, progress = self._phase.run(stop, self._teacher_variables)
        return 1e3 * progress.seconds * self._phase._config.batch_size / progress.images

    def bare(self) -> float:
        """Milliseconds per step of as many calls of the compiled step, on one batch."""
        phase = self._phase
        state, (_, batch) = devices.replicate(phase._lowered_state.compile()()), next(phase._batches(0))
        (step,) = phase._compiled.values()
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(self._steps):
            state, metrics = step(state, self._teacher_variables, batch, phase._key)
        jax.block_until_ready((state, metrics))
        return 1e3 * (time.perf_counter() - start) / self._steps


def measure(repeats: int, with_torch: bool) -> Part:
    """Time per step in the loop and bare, alternating."""
    del with_torch
    rows = []
    for name, (width, side, steps) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            runner = Runner(width, side, steps, pathlib.Path(folder))
            times = [(runner.bare(), runner.loop()) for _ in range(min(repeats, 9))]
        bare, loop = zip(*times, strict=True)
        rows.append(
            {
                "network": f"{name}: ResNet18, width {width}, {side}x{side}",
                "bare ms": statistics.median(bare),
                "loop ms": statistics.median(loop),
                "overhead %": 100 * (median_ratio(loop, bare) - 1),
            }
        )
    notes = [
        "Milliseconds per step. Loop: cskd_jax.loop.Phase on images in memory, with batches, metrics and logs; without "
        "evaluation and checkpoints. Bare: the same compiled step called again and again on one batch.",
        "Both crop, mirror and normalize, which is part of the step. Overhead: median over alternating epochs.",
    ]
    return Part("Loop: what training costs beyond its compiled steps", rows, notes)
