"""The parsers of files from outside, on random inputs: they return, or raise the one error that a command shows.

Here a few inputs are read; `benchmarks/fuzz.py` reads any number, see docs/security.md.
"""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz
from cskd_jax.interop import unpickle
from tests import random_inputs
from tests.random_inputs import GENERATORS, mutated, read

_LEAST_ACCEPTED = {"pickle": 5, "safetensors": 10, "records": 50}


@pytest.mark.parametrize("parser", GENERATORS)
def test_random_inputs(parser, tmp_path):
    row = fuzz.campaign(parser, 400, 0, tmp_path / "failures")
    assert row["failed"] == 0, [path.read_text() for path in (tmp_path / "failures").glob("*.txt")]
    # Inputs that are all refused at once, or all accepted, would test little.
    assert _LEAST_ACCEPTED[parser] <= row["accepted"] <= 300
    assert row["accepted"] + row["refused"] == row["inputs"] == 400


@pytest.mark.slow
@pytest.mark.parametrize("parser", GENERATORS)
def test_inputs_that_hypothesis_looks_for(parser, tmp_path):
    """hypothesis draws every choice of a generator itself, and would make a failure as small as it can."""

    @settings(max_examples=50, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def check(rng):
        read(GENERATORS[parser](rng), tmp_path)

    check()


def test_real_files_are_read(tmp_path):
    assert [name for name, data in random_inputs.real() if not read((name, data), tmp_path)] == []


def test_an_input_is_the_same_whenever_it_is_made():
    inputs = [fuzz.make_input("records", 1, number) for number in (3, 4, 3)]
    assert inputs[0] == inputs[2] != inputs[1]
    assert mutated(random.Random(0), b"abc" * 9) == mutated(random.Random(0), b"abc" * 9)


def _break(*_):
    raise KeyError("a parser of random moods")


def _hang(*_):
    while True:
        pass


@pytest.mark.parametrize(("reader", "error"), [(_break, "KeyError"), (_hang, "it took 0.05 s")])
def test_failures_are_found_and_kept(reader, error, tmp_path, monkeypatch):
    if reader is _hang:
        monkeypatch.setattr(fuzz, "SECONDS", 0.05)
    monkeypatch.setitem(random_inputs._READERS, "x.safetensors", reader)
    row = fuzz.campaign("safetensors", 2, 0, tmp_path, first=7)
    assert (row["failed"], row["accepted"], row["refused"]) == (2, 0, 0)
    assert (tmp_path / "safetensors-0-7-x.safetensors").read_bytes() == fuzz.make_input("safetensors", 0, 7)[1]
    assert error in (tmp_path / "safetensors-0-8-error.txt").read_text()


def test_what_must_not_happen_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, "load", lambda _: fuzz.watch("os.system", ()))
    row = fuzz.campaign("pickle", 5, 0, tmp_path)
    assert row["failed"] > 0
    assert "it made happen: os.system" in "".join(path.read_text() for path in tmp_path.glob("*.txt"))
