"""Tests run on 8 fake CPU devices, with strict type promotion left to the library and the golden files at hand."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pathlib

import jax
import pytest


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Folder of the golden files: CSKD_GOLDEN_DIR, or the copy beside the tests."""
    return golden_path()


def golden_path() -> pathlib.Path:
    """See `golden_dir`; for use while tests are collected."""
    return pathlib.Path(os.environ.get("CSKD_GOLDEN_DIR") or pathlib.Path(__file__).parent / "golden")


def pytest_generate_tests(metafunc):
    """A test that takes `loss_file` or `train_file` runs once for every golden file of that kind."""
    for kind in ("loss", "train"):
        if f"{kind}_file" in metafunc.fixturenames:
            files = sorted((golden_path() / kind).glob("*.npz"))
            metafunc.parametrize(f"{kind}_file", files, ids=lambda path: path.stem)


@pytest.fixture
def x64():
    """64-bit types for the length of a test."""
    with jax.enable_x64(True):
        yield
