"""What holds for the table of data sets as a whole."""

import os
import subprocess
import sys

import pytest

from cskd_jax.data import DATASETS, load_dataset
from cskd_jax.errors import UserError


def run(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


def test_names():
    names = ["digits", "digit_pairs", "cifar10", "cifar100", "tiny_imagenet", "cub200", "image_folder"]
    assert list(DATASETS) == names


@pytest.mark.parametrize("name", ["digits", "digit_pairs", "cifar10", "mnist"])
def test_path_is_only_for_image_folder(name, tmp_path):
    with pytest.raises(UserError, match=f"path='/images' is only for image_folder: leave it out for data set '{name}'"):
        load_dataset(name, data_dir=str(tmp_path), path="/images")


def test_home_is_understood_in_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    load_dataset("digits", data_dir="~/data")
    assert (tmp_path / "data" / "digits" / "1.0.0" / "dataset_info.json").is_file()


def test_importing_the_package_imports_no_data_library():
    done = run("import sys, cskd_jax.data; print({'tensorflow_datasets', 'tensorflow', 'sklearn'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_preparing_and_reading_never_import_tensorflow(tmp_path):
    """Also that the default of data_dir is the one of tensorflow-datasets."""
    script = """
import sys
from cskd_jax.data import load_dataset
for _ in range(2):
    print(len(load_dataset("digits").train.labels), "tensorflow" in sys.modules)
"""
    done = run(script, TFDS_DATA_DIR=str(tmp_path))
    assert done.stdout.split() == ["1440", "False"] * 2, done.stderr
    assert (tmp_path / "digits" / "1.0.0").is_dir()
