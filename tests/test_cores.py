"""On a CPU, commands give each core a part of the batch, unless the user or an earlier start has decided otherwise."""

import json
import os
import shutil

import jax
import pytest

from cskd_jax.distributed.devices import Devices, make_cores_devices
from cskd_jax.errors import UserError
from cskd_jax.runs.workdir import DEVICES, devices_of


@pytest.mark.parametrize(
    ("sizes", "count"),
    [((64, 16), 8), ((64, 64), 8), ((48, 20), 4), ((64, 29), 1), ((24, 12), 3), ((4, 4), 1), ((1, 1), 1)],
)
def test_all_batches_divide_and_each_device_has_enough(sizes, count):
    assert Devices(8).how_many_divide(*sizes) == count
    assert Devices(8).first(count).count == count
    assert Devices(1).how_many_divide(*sizes) == 1


def test_a_number_that_the_user_has_set_stays():
    before = jax.device_count()
    assert not make_cores_devices()  # XLA_FLAGS of the tests sets it.
    assert jax.device_count() == before


def test_a_workdir_knows_its_number(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({DEVICES: 3}))
    assert devices_of(tmp_path) is None  # Without a checkpoint, nothing would be continued.
    (tmp_path / "student" / "checkpoints" / "4").mkdir(parents=True)
    assert devices_of(tmp_path) == 3
    (tmp_path / "config.json").write_text("{}")
    assert devices_of(tmp_path) == 1
    for value in (0, "2", 1.5, None):
        (tmp_path / "config.json").write_text(json.dumps({DEVICES: value}))
        with pytest.raises(UserError, match="number of devices must be a positive integer"):
            devices_of(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_commands_use_all_cores_and_keep_what_a_run_began_with(start, small_run, done, tmp_path):
    cores = len(os.sched_getaffinity(0))
    shutil.copytree(done, tmp_path / "begun")
    for name, epochs, expected in (("new", 1, Devices(min(8, cores)).how_many_divide(64, 64)), ("begun", 4, 1)):
        arguments = [*small_run, f"--config.epochs={epochs}", f"--workdir={tmp_path / name}"]
        output, error = (process := start(arguments, devices=None)).communicate()
        assert process.returncode == 0, error
        assert f"; {expected} x cpu\n" in output
        assert json.loads((tmp_path / name / "results.json").read_text())["devices"]["count"] == expected
        assert devices_of(tmp_path / name) == expected
