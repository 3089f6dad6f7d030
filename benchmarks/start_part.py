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
from cskd_jax.training.records import read_rows

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


def seconds_to_first_steps(workdir: pathlib.Path, *arguments: str) -> dict[str, float]:
    """Starts a run, and kills it after the first step of its student.

    Args:
      workdir: Folder of the run, which is made.
      arguments: Arguments of `python -m cskd_jax.main`; JAX keeps its compilation cache in a folder beside `workdir`.

    Returns:
      {"teacher" or "student": seconds from the start until the metrics of its first step are written}.
    """
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(workdir.parent / "cache")
    command = [sys.executable, "-m", "cskd_jax.main", f"--workdir={workdir}", "--config.log_every=1", *arguments]
    log, metrics = workdir.with_suffix(".log"), workdir / "metrics.jsonl"
    seconds, start = {}, time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while "student" not in seconds and process.poll() is None:
            time.sleep(0.05)
            for row in read_rows(metrics):
                seconds.setdefault(row["phase"], time.perf_counter() - start)
    finally:
        process.kill()
        process.wait()
    if "student" not in seconds:
        raise RuntimeError(f"the run ended before its first step:\n{log.read_text(encoding='utf-8')}")
    return seconds


def measure(repeats: int, with_torch: bool) -> Part:
    """Measures the seconds to the first steps with an empty cache, and with the one that this leaves behind."""
    del with_torch
    rows, warm_runs = [], min(repeats, 3)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        make_images(folder / "images")
        small = ["--config=configs/digits.py", "--config.teacher.epochs=1"]
        large = ["--config=configs/cifar100_standard.py:resnet56/resnet20/kd", "--config.dataset.name=image_folder"]
        large += [f"--config.dataset.path={folder / 'images'}", "--config.teacher.epochs=1"]
        for recipe, arguments in (("digits", small), ("resnet56/resnet20", large)):
            place = folder / recipe.replace("/", "_")
            place.mkdir()
            cold, *warm = (seconds_to_first_steps(place / f"run{index}", *arguments) for index in range(1 + warm_runs))
            for phase, seconds in cold.items():
                median = statistics.median(run[phase] for run in warm)
                row = {"run": recipe, "first step of": phase, "cold s": seconds, "warm s": median}
                rows.append(row | {"cold/warm": seconds / median})
    notes = [
        "Seconds from starting `python -m cskd_jax.main` in a new workdir until the metrics of the first training step "
        "are written; resnet56/resnet20 on random images. That of the student comes after an epoch of the teacher.",
        f"Cold: empty compilation cache, one run. Warm: with the cache that it left, median of {warm_runs} runs.",
    ]
    return Part("Start: from the command to the first training step", rows, notes)
