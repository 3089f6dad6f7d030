"""A configuration that a run has written down comes back as it was, with overrides of the right type; the console."""

import os
import subprocess
import sys

import jax
import pytest

from cskd_jax.commands import command_line
from cskd_jax.errors import UserError
from cskd_jax.runs import schema
from cskd_jax.runs.recipes import load_recipe, override
from tests.conftest import ROOT


@pytest.mark.parametrize("word", ["digits.py:cskd", "digits.py:reviewkd", "digit_pairs.py:mlcskd", "cifar100.py:ft"])
def test_configuration_comes_back(word):
    config = load_recipe(f"{ROOT}/configs/{word}", ["--config.epochs=3"])
    restored = schema.restore(schema.plain(config), "config.json")
    schema.validate(restored)
    assert schema.flatten(restored) == schema.flatten(config)


def test_overrides_of_a_restored_configuration():
    flat = schema.plain(load_recipe(f"{ROOT}/configs/digits.py", []))
    arguments = ["--config.dataset.data_dir=/data/7", "--config.dataset.train_examples=160", "--config.batch_size=32"]
    config = override(schema.restore(flat, "config.json"), arguments)
    assert (config.dataset.data_dir, config.dataset.train_examples, config.batch_size) == ("/data/7", 160, 32)
    with pytest.raises(UserError, match="batchsize; did you mean batch_size"):
        override(config, ["--config.batchsize=3"])
    with pytest.raises(UserError, match="train_examples"):
        override(config, ["--config.dataset.train_examples=many"])


@pytest.mark.parametrize("key", ["epoch", "losses.kdd.weight", "losses.kd.temprature", "losses", "losses.kd"])
def test_unknown_key_of_a_damaged_file(key):
    with pytest.raises(UserError, match=f"config.json holds an unknown configuration key {key}"):
        schema.restore({key: 1}, "config.json")


def test_configuration_that_lacks_keys():
    flat = schema.plain(load_recipe("digits:kd", []))
    expected = schema.flatten(schema.restore(flat, "config.json"))
    for key in ("dataset.image_size", "augment.flip", "losses.kd.temperature", "losses.kd.end_epoch"):
        del flat[key]
    assert schema.flatten(schema.restore(flat, "config.json")) == expected
    del flat["student.name"]
    with pytest.raises(UserError, match="config.json is missing student.name: another version of cskd_jax wrote it"):
        schema.restore(flat, "config.json")


PROGRAM = """
import sys
from cskd_jax.commands import command_line
command_line.start(lambda argv: print("R34 \\u2192 R18") or 3)
"""


def test_console_that_cannot_show_a_letter():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True)
    assert (process.returncode, process.stdout, process.stderr) == (3, b"R34 \\u2192 R18\n", b"")


def test_ctrl_c_before_there_is_anything_to_save_is_one_line(capsys):
    def program(argv):
        raise KeyboardInterrupt

    assert command_line.exit_code(program, []) == 75
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize("error", [UserError("x" * 10**6), FileNotFoundError(2, "No such file", "x" * 10**6)])
def test_long_messages_are_shortened(error, capsys):
    def program(argv):
        raise error

    assert command_line.exit_code(program, []) == 2
    line = capsys.readouterr().err
    assert len(line) < 2_020
    assert line.endswith("xxx…\n")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nmore"),
            "9 b",
        ),
        (MemoryError("Unable to allocate 7 TiB"), "7 TiB"),
    ],
)
def test_out_of_memory(error, text, capsys):
    def program(argv):
        raise error

    assert command_line.exit_code(program, []) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: out of memory")
    assert line.count("\n") == 1
    assert text in line


def test_other_errors_are_ours():
    def program(argv):
        raise RuntimeError("a mistake of this package")

    with pytest.raises(RuntimeError, match="a mistake"):
        command_line.exit_code(program, [])
