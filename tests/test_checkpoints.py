"""Checkpoints from others: what their folders, records and arrays may not be."""

import dataclasses
import errno
import itertools
import json
import os
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from cskd_jax.errors import TransientError, UserError
from cskd_jax.models import create_model
from cskd_jax.training import checkpoint
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.checkpoint import Checkpoints, load_variables
from cskd_jax.training.saved import Record
from cskd_jax.training.state import check_variables
from tests.torch_files import random_variables

RECORD = Record({"name": "resnet8", "width": 0.25}, channels=1)


def save(folder, record=RECORD, **arrays):
    with Checkpoints(folder / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(3, {"params": {"network": arrays or {"kernel": np.ones((2, 3), np.float32)}}}, record)
    return folder / "checkpoints" / "3"


def refused(folder):
    """Returns the message with which a checkpoint is refused, for use as well as for going on."""
    with pytest.raises(UserError) as error:
        load_variables(str(folder))
    return str(error.value)


def test_a_sound_one(tmp_path):
    save(tmp_path)
    saved = load_variables(str(tmp_path))
    assert (saved.step, saved.record) == (3, RECORD)
    np.testing.assert_array_equal(saved.variables["params"]["kernel"], np.ones((2, 3), np.float32))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: os.mkfifo(path / "arrays" / "pipe"),
        lambda path: (path / "arrays" / "link").symlink_to("/dev/zero"),
        lambda path: (path / "record" / "link").symlink_to("nowhere"),
    ],
    ids=["pipe", "device", "link"],
)
def test_what_is_no_file(make, tmp_path):
    make(save(tmp_path))
    assert "is damaged (" in refused(tmp_path)
    assert "is not a regular file)" in refused(tmp_path)


def test_too_many_files(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr(checkpoint, "_MAX_FILES", 3)
    assert "is damaged (it has too many files)" in refused(tmp_path)


@pytest.mark.parametrize("name", ["record/metadata", "arrays/_METADATA", "_CHECKPOINT_METADATA", "metrics/metrics"])
def test_a_file_that_is_too_large(name, tmp_path):
    path = save(tmp_path) / name
    path.write_bytes(path.read_bytes() + bytes(checkpoint.MAX_JSON))
    assert f"{name} has 8,38" in refused(tmp_path) or f"{name} has 8,39" in refused(tmp_path)


def test_arrays_that_unpack_to_far_more_than_their_files(tmp_path):
    """Eighty megabytes of zeros take some kilobytes in the files, also if there is a large hole besides them."""
    path = save(tmp_path, kernel=np.zeros((20 << 20,), np.float32))
    with (path / "arrays" / "0").open("wb") as file:
        file.truncate(20 << 20)
    assert "its arrays would take 83,886,080 bytes, but its files have " in refused(tmp_path)


def test_fresh_memories_compress_well(tmp_path):
    save(tmp_path, kernel=np.zeros((4 << 20,), np.float32))
    assert load_variables(str(tmp_path)).step == 3


def test_chunks_that_are_larger_than_their_array(tmp_path):
    path = save(tmp_path)
    shutil.rmtree(path / "arrays")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(path / "arrays", {"params/network/kernel": np.ones((2, 3), np.float32)})
    (array,) = (path / "arrays").rglob(".zarray")
    content = json.loads(array.read_text(encoding="utf-8"))
    array.write_text(json.dumps(content | {"chunks": [20_000, 30_000]}), encoding="utf-8")
    assert "the chunks of params/network/kernel are larger than the array" in refused(tmp_path)


@pytest.mark.parametrize("name", ["²", "\u0663", "007", "9" * 200])
def test_folders_of_other_names(name, tmp_path):
    folder = save(tmp_path).parent
    (folder / name).mkdir()
    assert load_variables(str(tmp_path)).step == 3
    checkpoint.mark_unfinished(folder)


def test_a_record_that_was_changed(tmp_path):
    path = save(tmp_path) / "record" / "metadata"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["record"]["channels"] = 3
    path.write_text(json.dumps(content), encoding="utf-8")
    assert "is damaged (the digest of its record differs)" in refused(tmp_path)


def test_a_record_that_is_unsound(tmp_path):
    save(tmp_path, dataclasses.replace(RECORD, multilabel="yes"))
    assert "its record has no valid multilabel" in refused(tmp_path)


@pytest.mark.parametrize("version", ["x", None, [3], -1])
def test_a_version_that_is_none(version, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_VERSION", version)
    save(tmp_path)
    monkeypatch.setattr(checkpoint, "_VERSION", 2)
    assert "its record has no valid version" in refused(tmp_path)


def test_a_newer_version(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_VERSION", 3)
    save(tmp_path)
    monkeypatch.setattr(checkpoint, "_VERSION", 2)
    assert "was written by a newer version of cskd_jax" in refused(tmp_path)


def test_arrays_of_no_network(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("cskd_jax.training.arrays._SLASH", "/")  # So that one name is the folder of another.
        save(tmp_path, **{"a": np.ones(1, np.float32), "a/b": np.ones(1, np.float32)})
    assert "its arrays are not those of a network" in refused(tmp_path)


def test_no_classifier(tmp_path):
    save(tmp_path)
    with pytest.raises(UserError, match=r"the checkpoint of a resnet8, width 0\.25 holds no classifier"):
        _ = load_variables(str(tmp_path)).num_classes


def test_arrays_that_do_not_fit_the_network_that_is_named():
    module = create_model("resnet8", num_classes=3, width=0.25)
    variables = random_variables(module)
    network = LinenNetwork(module)
    check_variables(network, variables, (32, 32, 3), "it")
    variables["params"]["classifier"]["bias"] = np.zeros(4, np.float32)
    with pytest.raises(UserError, match=r"it does not hold .*: params/classifier/bias is \(4,\) instead of \(3,\)"):
        check_variables(network, variables, (32, 32, 3), "it")
    del variables["params"]["classifier"]["bias"]
    with pytest.raises(UserError, match=r"params/classifier/bias is nothing instead of \(3,\)"):
        check_variables(network, variables, (32, 32, 3), "it")


def assert_put_aside(folder):
    with (
        Checkpoints(folder, keep=1) as checkpoints,
        pytest.raises(UserError, match="no checkpoint in .* is intact; the same command starts over"),
    ):
        checkpoints.restore(lambda step: {})
    assert [path.name for path in folder.iterdir()] == ["3.damaged"]


def test_one_that_is_damaged_is_put_aside(tmp_path, caplog):
    """As the message says, the next start begins anew."""
    (save(tmp_path) / "record" / "metadata").write_bytes(b"{")
    folder = tmp_path / "checkpoints"
    assert_put_aside(folder)
    assert "is damaged" in caplog.text
    with Checkpoints(folder, keep=1) as checkpoints:
        assert checkpoints.restore(lambda step: {}) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *itertools.product(["metrics/metrics", "_CHECKPOINT_METADATA"], [b"[" * 100_000, b"\xff\xfe", b"null", b"[]"]),
        ("metrics/metrics", b'{"score": "a", "step": 3}'),
        ("_CHECKPOINT_METADATA", b'{"item_handlers": 1}'),
        ("_CHECKPOINT_METADATA", b'{"init_timestamp_nsecs": "0"}'),
        ("_CHECKPOINT_METADATA", b'{"commit_timestamp_nsecs": 1000000000000000000000000000000}'),
    ],
)
def test_metadata_that_orbax_cannot_read(name, content, tmp_path, caplog):
    """Neither is the folder left as it is, since no run could go on in it."""
    (save(tmp_path) / name).write_bytes(content)
    folder = tmp_path / "checkpoints"
    assert_put_aside(folder)
    assert "checkpoints/3 is damaged (" in caplog.text


@pytest.mark.parametrize("name", ["1\u0663", "9" * 200])
def test_folders_that_orbax_would_take_for_steps(name, tmp_path, caplog):
    folder = save(tmp_path).parent
    (folder / name).mkdir()
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(4, {"params": {"network": {"kernel": np.ones((2, 3), np.float32)}}}, RECORD)
    assert "(its name is not a number of steps)" in caplog.text
    assert load_variables(str(tmp_path)).step == 4


def test_a_folder_that_orbax_cannot_open(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise TypeError("Object must be a dict")

    save(tmp_path)
    monkeypatch.setattr(ocp, "CheckpointManager", refuse)
    with pytest.raises(UserError, match="cannot open the checkpoints in .*/checkpoints: "):
        Checkpoints(tmp_path / "checkpoints", keep=1)


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), MemoryError("no memory")])
def test_one_that_cannot_be_read_now_is_left_alone(error, tmp_path, monkeypatch):
    """Nothing is wrong with it, so training must not begin anew."""
    folder = save(tmp_path).parent

    def restore(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", restore)
    with Checkpoints(folder, keep=1) as checkpoints, pytest.raises(TransientError, match="cannot read checkpoint"):
        checkpoints.restore(lambda step: {})
    assert [path.name for path in folder.iterdir()] == ["3"]
