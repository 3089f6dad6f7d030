"""Seconds from starting a run to its first training step, without and with a compilation cache."""

import json
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
_TIMEOUT_SECONDS = 1800


def make_images(folder: pathlib.Path) -> None:
    """Random images of 32x32 pixels for image_folder, of 100 categories: two for training and one for test of each."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 2), ("test", 1)):
        for category in range(NUM_CLASSES):
            path = folder / split / f"{category:03}"
            path.mkdir(parents=True)
            for index in range(number):
                image = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(image).save(path / f"{index}.png")


def first_steps(images: pathlib.Path, workdir: pathlib.Path, cache: pathlib.Path) -> dict[str, float]:
    """Starts the CIFAR-100 recipe on `images`, and ends it after the first step of the student.

    Returns:
      {"teacher", "student": seconds from the start to the first training step of either}. The student's comes after an
      epoch of the teacher, of one step, with its evaluation.
    """
    command = [sys.executable, "-m", "cskd_jax.main", "--config=configs/cifar100.py", f"--workdir={workdir}"]
    command += ["--config.dataset.name=image_folder", f"--config.dataset.path={images}"]
    command += ["--config.teacher.epochs=1", "--config.log_every=1", "--config.drop_last=True"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(cache)
    workdir.mkdir()
    seconds, start = {}, time.perf_counter()
    with (workdir / "output.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while "student" not in seconds:
                time.sleep(0.01)
                now = time.perf_counter() - start
                for phase in _phases_begun(workdir / "metrics.jsonl"):
                    seconds.setdefault(phase, now)
                if process.poll() is not None or now > _TIMEOUT_SECONDS:
                    text = (workdir / "output.txt").read_text()
                    raise RuntimeError(f"no first step of the student after {now:.0f} s:\n{text}")
        finally:
            process.kill()
            process.wait()
    return seconds


def _phases_begun(path):
    """The phases that have a row of training in a metrics.jsonl that is perhaps just being written."""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                if row["split"] == "train":
                    yield row["phase"]


def measure(repeats: int, with_torch: bool) -> Part:
    """Seconds to the first steps with an empty cache, and with the one that this leaves behind."""
    del with_torch
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        make_images(folder / "images")
        runs = []
        for index in range(1 + min(repeats, 3)):
            runs.append(first_steps(folder / "images", folder / f"run{index}", folder / "cache"))
    rows = []
    for phase in ("teacher", "student"):
        cold, warm = runs[0][phase], statistics.median(run[phase] for run in runs[1:])
        rows.append({"first training step of": phase, "cold s": cold, "warm s": warm, "cold/warm": cold / warm})
    notes = [
        "Seconds from starting `python -m cskd_jax.main --config=configs/cifar100.py` on images in a folder, every run "
        "in a new workdir. Cold: empty compilation cache, one run. Warm: median of "
        f"{len(runs) - 1} runs with the cache that it left.",
        "The teacher (ResNet101, width 0.5) is trained for one step and evaluated; the student's first step follows.",
    ]
    return Part("Start: from the command to the first training step", rows, notes)
