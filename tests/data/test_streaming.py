"""Streams: the same bytes as in memory, whichever process decodes them, and clear ends."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cskd_jax.data import load_dataset, read_batches
from cskd_jax.data.samplers import BalancedSampler, UniformSampler
from cskd_jax.data.streaming import ImageStream
from cskd_jax.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """30 images of three categories for training and 6 for testing, of several sizes."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for category in "abc":
            (root / split / category).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (*generator.integers(20, 40, 2), 3), np.uint8)
                Image.fromarray(pixels).save(root / split / category / f"{number}.jpg")
    return root


@pytest.fixture(scope="module", params=["image_folder", "digits"])
def both(request, folder, digits_dir):
    """A data set in memory, and streamed by two processes."""
    arguments = {"image_folder": {"path": str(folder), "image_size": 16}, "digits": {"data_dir": str(digits_dir)}}
    return [load_dataset(request.param, **arguments[request.param], streaming=s, workers=2) for s in (False, True)]


def batches(dataset, sampler, steps, rows=slice(None)):
    return list(read_batches(dataset.train.images, (sampler.indices(step)[rows] for step in steps)))


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [False, True])
def test_the_same_bytes_over_two_epochs_and_from_the_middle(both, balanced):
    """The whole batches, and the halves of them that two processes read."""
    memory, stream = both
    sampler = UniformSampler(30, 8, seed=3)
    if balanced:
        sampler = BalancedSampler(memory.train.labels, 6, 2, seed=3)
    steps = range(2 * sampler.steps_per_epoch)
    expected = batches(memory, sampler, steps)
    halves = [batches(stream, sampler, steps, rows) for rows in (slice(None, 3), slice(3, None))]
    found = [(0, batches(stream, sampler, steps)), (3, batches(stream, sampler, steps[3:]))]
    found.append((0, [np.concatenate(parts) for parts in zip(*halves, strict=True)]))
    for start, streamed in found:
        for one, other in zip(expected[start:], streamed, strict=True):
            assert other.dtype == np.uint8
            np.testing.assert_array_equal(one, other)


def test_test_split_and_labels(both):
    memory, stream = both
    assert stream.test.images.shape == memory.test.images.shape
    np.testing.assert_array_equal(stream.test.images[:], memory.test.images)
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(stream, split).labels, getattr(memory, split).labels)


def test_streams_of_their_own_accord_where_memory_is_small(folder, monkeypatch):
    arguments = {"path": str(folder), "image_size": 16}
    size = 36 * 16 * 16 * 3
    for pages, streamed in ((8 * size, False), (8 * size - 1, True)):
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}.get)
        assert isinstance(load_dataset("image_folder", **arguments).train.images, ImageStream) == streamed


def test_damaged_image_is_named(folder, tmp_path):
    for path in folder.glob("*/*/*.jpg"):
        copy = tmp_path / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 100 if path.name == "7.jpg" and path.parent.name == "b" else None])
    dataset = load_dataset("image_folder", path=str(tmp_path), image_size=16, streaming=True, workers=1)
    with pytest.raises(UserError, match=f"{tmp_path}/train/b/7.jpg is not a valid image"):
        batches(dataset, UniformSampler(30, 8, seed=0), range(4))


def test_what_cannot_be_streamed():
    with pytest.raises(UserError, match="'digit_pairs' cannot be streamed: only image files and array_record can"):
        load_dataset("digit_pairs", streaming=True)


WORKER = """
import importlib.util, multiprocessing.spawn, sys
program = sys.argv[1]
is_package = importlib.util.find_spec(program).submodule_search_locations is not None
# What a worker does first, and what it decodes with.
multiprocessing.spawn.prepare({"init_main_from_name": program + ".__main__" if is_package else program})
import cskd_jax.data.streaming
print("jax" in sys.modules)
"""


@pytest.mark.parametrize("program", ["cskd_jax.main", "cskd_jax.evaluate", "cskd_jax.report"])
def test_workers_of_a_program_do_without_jax(program):
    """It takes five times the memory of a worker."""
    command = [sys.executable, "-c", WORKER, program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


SCRIPT = """
import sys, time
import numpy as np
from cskd_jax.data import load_dataset, read_batches

if __name__ == "__main__":
    images = load_dataset("image_folder", path=sys.argv[1], image_size=16, streaming=True, workers=1).train.images
    batches = read_batches(images, (np.arange(4) for _ in range(1000)))
    next(batches)
    (worker,) = images._workers._pool._processes
    print(worker, flush=True)
    try:
        for _ in batches:
            time.sleep(0.2)
    except Exception as error:
        print(error)
    print(next(read_batches(images, [np.arange(4)])).shape)
"""


UNGUARDED = """
import sys
import numpy as np
from cskd_jax.data import load_dataset, read_batches

images = load_dataset("image_folder", path=sys.argv[1], image_size=16, streaming=True, workers=1).train.images
list(read_batches(images, [np.arange(4)]))
"""


def test_a_script_that_starts_itself_again_is_told_how_not_to(folder, tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, tmp_path / "script.py", folder]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert "whose statements must be within `if __name__ == '__main__':`" in process.stderr


@pytest.fixture
def reading(folder, tmp_path):
    """A process that streams, and its worker's number."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process, int(process.stdout.readline())
        process.kill()


def test_worker_ends_with_a_run_that_is_killed(reading):
    process, worker = reading
    process.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker still runs")


def test_killed_worker_ends_the_run_with_a_message(reading):
    process, worker = reading
    os.kill(worker, signal.SIGTERM)  # is for the run to handle
    os.kill(worker, signal.SIGKILL)
    said = process.stdout.read()
    assert "a process that decodes images was killed" in said
    assert said.endswith("(4, 16, 16, 3)\n"), "new processes take the place of the killed ones"
