"""Measures the seconds from starting a run to its first training step, without and with a compilation cache."""

import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks.measuring import Part

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUM_CLASSES = 100


def make_images(folder: pathlib.Path) -> None:
    """Makes random images of 32x32 pixels for image_folder: for each of 100 classes, two for training and one test."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 2), ("test", 1)):
        for category in range(NUM_CLASSES):
            path = folder / split / f"{category:03}"
            path.mkdir(parents=True)
            for index in range(number):
                image = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(path / f"{index}.png")


def seconds_to_first_steps(phases: tuple[str, ...], workdir: pathlib.Path, *arguments: str) -> dict[str, float]:
    """Starts a run, and kills it once the last of `phases` has compiled its step.

    Args:
      phases: Names of the phases, "teacher", "student" or both.
      workdir: Folder of the run, which is made.
      arguments: Arguments of `python -m cskd_jax.main`; JAX keeps its compilation cache in a folder beside `workdir`.

    Returns:
      {phase: seconds from the start to its first step}.
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(workdir.parent / "cache")
    command = [sys.executable, "-m", "cskd_jax.main", f"--workdir={workdir}", *arguments]
    seconds, lines, start = {}, [], time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in process.stdout:
            lines.append(line)
            for phase in phases:
                if line.startswith(f"{phase}: compiled"):
                    seconds[phase] = time.perf_counter() - start
            if len(seconds) == len(phases):
                return seconds
    finally:
        process.kill()
        process.wait()
    raise RuntimeError("the run ended before its first step:\n" + "".join(lines))


def measure(repeats: int, with_torch: bool) -> Part:
    """Measures the seconds to the first steps with an empty cache, and with the one that this leaves behind."""
    del with_torch
    rows, warm_runs = [], min(repeats, 3)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        make_images(folder / "images")
        small = ["--config=configs/digits.py", "--config.teacher.epochs=1"]
        large = ["--config=configs/cifar100.py", "--config.dataset.name=image_folder"]
        large += [f"--config.dataset.path={folder / 'images'}", "--config.drop_last=True", "--config.teacher.epochs=1"]
        for recipe, arguments in (("digits", small), ("cifar100", large)):
            (folder / recipe).mkdir()
            phases = ("teacher", "student")
            cold, *warm = (
                seconds_to_first_steps(phases, folder / recipe / f"run{index}", *arguments)
                for index in range(1 + warm_runs)
            )
            for phase in phases:
                median = statistics.median(run[phase] for run in warm)
                row = {"recipe": recipe, "first step of": phase, "cold s": cold[phase], "warm s": median}
                rows.append(row | {"cold/warm": cold[phase] / median})
    notes = [
        "Seconds from starting `python -m cskd_jax.main` in a new workdir until the first training step is compiled "
        "and can begin; cifar100 on random images. That of the student comes after an epoch of the teacher.",
        f"Cold: empty compilation cache, one run. Warm: with the cache that it left, median of {warm_runs} runs.",
    ]
    return Part("Start: from the command to the first training step", rows, notes)
