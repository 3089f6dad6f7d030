"""Tests run on 8 fake CPU devices; golden files and a prepared data set are at hand."""

import os

from tests.xla_flags import xla_flags

os.environ["XLA_FLAGS"] = xla_flags(devices=8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import atexit
import gc
import logging
import pathlib
import shutil
import subprocess
import sys
import tempfile

import jax
import pytest

from cskd_jax import console
from cskd_jax.data import load_dataset

# The environment variable with the cache of the commands that tests start, which all processes of a session share.
_CACHE = "CSKD_TESTS_CACHE"

if _CACHE not in os.environ:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="cskd_jax-tests-")
    atexit.register(shutil.rmtree, os.environ[_CACHE], ignore_errors=True)
# To save one of so many programs has ended a process.
jax.config.update("jax_enable_compilation_cache", False)
# Linux allows a process 65,530 mappings of memory. A compiled program holds dozens, and XLA aborts when none is left.
_MAPPINGS = pathlib.Path("/proc/self/maps")
_MOST_MAPPINGS = 30_000

jax.config.update("jax_numpy_dtype_promotion", "strict")
gc.set_threshold(100_000)  # As in main: most of the quick tests' time is tracing.

ROOT = pathlib.Path(__file__).parent.parent


class Stop:
    """Asks to stop after some steps."""

    name = "test"

    def __init__(self, steps):
        self.steps, self.requested = steps, False

    def reached(self):
        self.requested = self.steps == 0
        self.steps -= 1
        return self.requested


@pytest.fixture(autouse=True)
def own_console(monkeypatch):
    """What a command does to the console and to logging ends with its test."""
    monkeypatch.setattr(console, "_muted", False)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # It is that of pytest.
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler).__module__ == console.__name__]:
        root.removeHandler(handler)


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Drops the compiled programs of the tests so far when they hold too many mappings of memory."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Folder of the golden files: CSKD_GOLDEN_DIR, or the copy beside the tests."""
    return golden_path()


def golden_path() -> pathlib.Path:
    """See `golden_dir`; for use while tests are collected."""
    return pathlib.Path(os.environ.get("CSKD_GOLDEN_DIR") or pathlib.Path(__file__).parent / "golden")


def pytest_generate_tests(metafunc):
    """A test that takes `loss_file`, `train_file` or `vit_file` runs once for every golden file of that kind."""
    for kind in ("loss", "train", "vit"):
        if f"{kind}_file" in metafunc.fixturenames:
            files = sorted((golden_path() / kind).glob("*.npz"))
            metafunc.parametrize(f"{kind}_file", files, ids=lambda path: path.stem)


@pytest.fixture
def x64():
    """64-bit types for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> pathlib.Path:
    """A data_dir in which digits is prepared."""
    path = tmp_path_factory.mktemp("data")
    load_dataset("digits", data_dir=str(path))
    return path


@pytest.fixture(scope="session")
def small_run(digits_dir) -> list[str]:
    """Arguments of a run that takes seconds: digits, 192 images, small networks, 1 + 3 epochs of 3 steps."""
    return [
        f"--config={ROOT}/configs/digits.py",
        f"--config.dataset.data_dir={digits_dir}",
        "--config.dataset.train_examples=192",
        "--config.teacher.name=resnet8",
        "--config.teacher.width=0.25",
        "--config.student.name=resnet8",
        "--config.student.width=0.25",
        "--config.teacher.epochs=1",
        "--config.epochs=3",
        "--config.save_every_minutes=0",
    ]


@pytest.fixture(scope="session")
def start():
    """Starts a command line as a process of its own.

    `program` is a module, or the words of another command that takes such arguments; the command itself chooses the
    number of `devices` if that is None.
    """
    environment = os.environ | {"XDG_CACHE_HOME": os.environ[_CACHE], "PYTHONPATH": str(ROOT)}

    def start(arguments, cwd=ROOT, program="cskd_jax.main", devices=1, **variables):
        words = (sys.executable, "-m", program) if isinstance(program, str) else program
        pipe, variables = subprocess.PIPE, environment | {"XLA_FLAGS": xla_flags(devices)} | variables
        return subprocess.Popen([*words, *arguments], cwd=cwd, env=variables, text=True, stdout=pipe, stderr=pipe)

    return start


@pytest.fixture(scope="session")
def done(start, small_run, tmp_path_factory) -> pathlib.Path:
    """Workdir of a finished, undisturbed run of `small_run`."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    _, error = (process := start([*small_run, f"--workdir={workdir}"])).communicate()
    assert process.returncode == 0, error
    return workdir
