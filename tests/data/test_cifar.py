"""CIFAR from archives in the original format, made here, small, and put where a person would put them."""

import dataclasses
import functools
import gzip
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from cskd_jax.data import archives, cifar, load_dataset, tfds_source
from cskd_jax.errors import UserError
from tests.archive_files import write_tar

COARSE = [f"group{number}" for number in range(20)]
FINE = [f"fine{number:02d}" for number in range(100)]
NAMES_10 = [f"category{number}" for number in range(10)]


def records(seed, *labels):
    """Records of the given label columns with random pixels, uint8 [N, columns + 3072]."""
    columns = np.stack(labels, axis=1).astype(np.uint8)
    pixels = np.random.default_rng(seed).integers(0, 256, (len(columns), 3072), np.uint8)
    return np.concatenate([columns, pixels], axis=1)


def members_100():
    fine = np.arange(200) % 100
    return {
        "cifar-100-binary/train.bin": records(1, fine // 5, fine).tobytes(),
        "cifar-100-binary/test.bin": records(2, fine[:100] // 5, fine[:100]).tobytes(),
        "cifar-100-binary/fine_label_names.txt": "\n".join(FINE).encode() + b"\n",
        "cifar-100-binary/coarse_label_names.txt": "\n".join(COARSE).encode() + b"\n",
    }


def members_10():
    members = {
        f"cifar-10-batches-bin/data_batch_{number}.bin": records(number, (np.arange(4) + 2 * number) % 10).tobytes()
        for number in range(1, 6)
    }
    members["cifar-10-batches-bin/test_batch.bin"] = records(6, np.arange(10)).tobytes()
    members["cifar-10-batches-bin/batches.meta.txt"] = "\n".join(NAMES_10).encode() + b"\n\n"
    return members


def expected_images(data, labels):
    return (
        np.frombuffer(data, np.uint8)
        .reshape(-1, labels + 3072)[:, labels:]
        .reshape(-1, 3, 32, 32)
        .transpose(0, 2, 3, 1)
    )


def test_cifar100_byte_exact_without_network(tmp_path, no_network):
    members = members_100()
    write_tar(tmp_path / "cifar-100-binary.tar.gz", members)
    dataset = load_dataset("cifar100", data_dir=str(tmp_path))
    train, test = members["cifar-100-binary/train.bin"], members["cifar-100-binary/test.bin"]
    np.testing.assert_array_equal(dataset.train.images, expected_images(train, 2))
    np.testing.assert_array_equal(dataset.test.images, expected_images(test, 2))
    np.testing.assert_array_equal(dataset.train.labels, np.arange(200) % 100)
    assert dataset.train.labels.dtype == np.int32
    assert dataset.categories == tuple(FINE)
    assert (tmp_path / "cifar100" / "3.0.2" / "dataset_info.json").is_file()


def test_cifar10_byte_exact_without_network(tmp_path, no_network):
    members = members_10()
    write_tar(tmp_path / "cifar-10-binary.tar.gz", members)
    dataset = load_dataset("cifar10", data_dir=str(tmp_path))
    batches = b"".join(members[f"cifar-10-batches-bin/data_batch_{number}.bin"] for number in range(1, 6))
    np.testing.assert_array_equal(dataset.train.images, expected_images(batches, 1))
    np.testing.assert_array_equal(dataset.train.labels, [2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9, 0, 1, 0, 1, 2, 3])
    assert dataset.categories == tuple(NAMES_10)


@pytest.mark.parametrize("split", ["train", "test"])
def test_category_without_images_is_named(tmp_path, split):
    members = members_100()
    name = f"cifar-100-binary/{split}.bin"
    members[name] = b"".join(
        members[name][start : start + 3074]
        for start in range(0, len(members[name]), 3074)
        if members[name][start + 1] != 7
    )
    write_tar(tmp_path / "cifar-100-binary.tar.gz", members)
    with pytest.raises(UserError, match=f"the {split} split has no images of {FINE[7]}"):
        load_dataset("cifar100", data_dir=str(tmp_path))
    write_tar(tmp_path / "cifar-100-binary.tar.gz", members_100())  # A better archive is all that it takes.
    load_dataset("cifar100", data_dir=str(tmp_path))


def test_prepared_features_are_those_of_the_stock_builder(tmp_path):
    import tensorflow_datasets as tfds

    write_tar(tmp_path / "cifar-100-binary.tar.gz", members_100())
    load_dataset("cifar100", data_dir=str(tmp_path))
    builder = tfds.builder("cifar100", data_dir=str(tmp_path))
    example = builder.as_data_source("train")[7]
    assert set(example) == {"id", "image", "label", "coarse_label"}
    assert (example["id"], example["label"], example["coarse_label"]) == (b"train_00007", 7, 1)
    assert builder.info.features["coarse_label"].names == COARSE


@pytest.mark.parametrize("file", ["cifar-100-binary.tar", "downloads/cifar-100-binary.tar.xz"])
def test_other_places_and_suffixes(tmp_path, no_network, file):
    write_tar(tmp_path / file, members_100(), prefix="./")
    assert len(load_dataset("cifar100", data_dir=str(tmp_path)).train.labels) == 200


def test_another_checksum_is_accepted_with_a_warning(tmp_path, caplog):
    write_tar(tmp_path / "cifar-100-binary.tar.gz", members_100())
    with caplog.at_level("WARNING", logger="cskd_jax"):
        cifar.read(cifar.ARCHIVE_100, tmp_path)
    assert "cifar-100-binary.tar.gz is not the official" in caplog.text


def test_a_prepared_data_set_knows_whether_its_archive_was_the_official_one(tmp_path):
    path = write_tar(tmp_path / "cifar-100-binary.tar.gz", members_100())

    def load(source):
        options = {"path": None, "train_examples": 150, "image_size": None}
        return tfds_source.load_own(source, data_dir=str(tmp_path), **options).official

    assert load(cifar.CIFAR100) is False
    (prepared,) = tmp_path.glob("cifar100/*/metadata.json")
    assert json.loads(prepared.read_text()) == {"official": False}
    path.unlink()
    assert load_dataset("cifar100", data_dir=str(tmp_path), validation_examples=100).official is False
    prepared.unlink()
    assert load(cifar.CIFAR100) is None, "earlier versions did not say"
    shutil.rmtree(tmp_path / "cifar100")
    write_tar(path, members_100())
    archive = dataclasses.replace(cifar.ARCHIVE_100, sha256=archives.sha256(path))
    assert load(dataclasses.replace(cifar.CIFAR100, read=functools.partial(cifar.read, archive))) is True


def test_no_warning_about_the_official_checksum(tmp_path, caplog):
    path = write_tar(tmp_path / "cifar-100-binary.tar.gz", members_100())
    with caplog.at_level("WARNING", logger="cskd_jax"):
        cifar.read(dataclasses.replace(cifar.ARCHIVE_100, sha256=archives.sha256(path)), tmp_path)
    assert not caplog.text


def change(member, data):
    return {**members_100(), f"cifar-100-binary/{member}": data}


def without(member):
    return {name: data for name, data in members_100().items() if not name.endswith(member)}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (without("test.bin"), "is missing cifar-100-binary/test.bin"),
        (without("fine_label_names.txt"), "is missing cifar-100-binary/fine_label_names.txt"),
        (change("train.bin", b"\0" * 3075), "train.bin has 3075 bytes, not a whole number of records of 3074"),
        (change("test.bin", b""), "the test split is empty: cifar-100-binary/test.bin"),
        (change("train.bin", b""), "the train split is empty: cifar-100-binary/train.bin"),
        (
            change("test.bin", records(0, [0, 20], [0, 1]).tobytes()),
            "test.bin, record 1 has coarse_label 20; .* 0 to 19",
        ),
        (
            change("train.bin", records(0, [0], [100]).tobytes()),
            "train.bin, record 0 has label 100; it must be from 0 to 99",
        ),
        (change("fine_label_names.txt", b"one\ntwo\n"), "fine_label_names.txt should hold 100 .* it has 2 lines"),
        (
            change("coarse_label_names.txt", b"same\n" * 20),
            "coarse_label_names.txt .* it has 20 lines, 1 of them distinct",
        ),
        (change("fine_label_names.txt", b""), "fine_label_names.txt .* it has 0 lines"),
    ],
)
def test_unsound_contents(tmp_path, members, message):
    path = write_tar(tmp_path / "cifar-100-binary.tar", members)
    with pytest.raises(UserError, match=message) as error:
        load_dataset("cifar100", data_dir=str(tmp_path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cifar100" / "3.0.2").exists()


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.xz", ".tar"])
def test_truncated_archive(tmp_path, suffix):
    path = write_tar(tmp_path / f"cifar-100-binary{suffix}", members_100())
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=f"cifar-100-binary{suffix} (is damaged or not a tar|is missing)"):
        load_dataset("cifar100", data_dir=str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>" * 100])
def test_not_an_archive(tmp_path, data):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(data)
    with pytest.raises(UserError, match="cifar-10-binary.tar.gz is damaged or not a tar archive") as error:
        load_dataset("cifar10", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_file_that_is_too_large_is_not_even_hashed(tmp_path):
    with (tmp_path / "cifar-10-binary.tar").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="cifar-10-binary.tar has 1,099,511,627,776 bytes; at most .* are allowed"):
        cifar.read(cifar.ARCHIVE_10, tmp_path)


def test_names_and_sizes_among_attributes(tmp_path):
    """A name that tar's own header cannot hold, and attributes that do not matter."""
    name = "é" * 99 + "/cifar"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 50}) as tar:
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.pax_headers = 3, 1.5, {"size": "3", "SCHILY.xattr.user.x": "a=b\nc"}
        tar.addfile(member, io.BytesIO(b"abc"))
        tar.addfile(tarfile.TarInfo("after"))
    found = archives.read_tar(cifar.ARCHIVE_10, tmp_path / "a.tar", lambda name: True, 10)
    assert list(found) == [(name, b"abc"), ("after", b"")]


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_an_archive_of_several_compressed_parts(tmp_path, pack):
    path = write_tar(tmp_path / "a.tar", {"x": bytes(2_000_000), "y": b"abc"})
    data = path.read_bytes()
    (tmp_path / "a").write_bytes(
        b"".join(pack(data[start : start + 777_777]) for start in range(0, len(data), 777_777))
    )
    with (tmp_path / "a").open("ab") as file:
        file.write(bytes(100_000))
    found = dict(archives.read_tar(cifar.ARCHIVE_10, tmp_path / "a", lambda name: True, 10**7))
    assert found == {"x": bytes(2_000_000), "y": b"abc"}


def test_a_link_is_no_member(tmp_path):
    path = write_tar(tmp_path / "cifar-100-binary.tar", without("test.bin"))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("cifar-100-binary/test.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(UserError, match="is missing cifar-100-binary/test.bin"):
        cifar.read_archive(cifar.ARCHIVE_100, path)


def test_download(tmp_path, server):
    path = write_tar(tmp_path / "web" / "cifar-100-binary.tar.gz", members_100())
    archive = dataclasses.replace(cifar.ARCHIVE_100, url=f"{server}/{path.name}", sha256=archives.sha256(path))
    content = cifar.read(archive, tmp_path / "data")
    assert len(content.splits["train"].images) == 200
    downloads = tmp_path / "data" / "downloads"
    assert [file.name for file in downloads.iterdir()] == ["cifar-100-binary.tar.gz"]
    assert (downloads / path.name).read_bytes() == path.read_bytes()


def test_a_download_with_a_wrong_checksum_is_refused(tmp_path, server):
    path = write_tar(tmp_path / "web" / "cifar-100-binary.tar.gz", members_100())
    archive = dataclasses.replace(cifar.ARCHIVE_100, url=f"{server}/{path.name}")
    with pytest.raises(UserError, match=f"{archive.url} returned a file with checksum .*, not {archive.sha256}"):
        cifar.read(archive, tmp_path / "data")
    assert not list((tmp_path / "data" / "downloads").iterdir())


def test_a_download_that_is_not_there(tmp_path, server):
    archive = dataclasses.replace(cifar.ARCHIVE_10, url=f"{server}/nothing.tar.gz")
    data = tmp_path / "data"
    write_tar(data / "cifar10_20k_binary.tar.gz", {})
    names = "cifar-10-binary.tar.gz or cifar-10-binary.tar or cifar-10-binary.tar.xz"
    by_hand = f"put it, as {names}, into {data} or {data}/downloads$"
    with pytest.raises(UserError, match=f"cannot download {archive.url} .*404.*{by_hand}"):
        cifar.read(archive, data)
    assert not list((data / "downloads").iterdir())


@pytest.mark.parametrize("proxy", ["http:/proxy:3128", f"http://{'a' * 70}.org:3128"])
def test_a_proxy_that_is_no_address(tmp_path, monkeypatch, proxy):
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(UserError, match="cannot download https://.*: download it yourself"):
        archives.download(dataclasses.replace(cifar.ARCHIVE_10, url="https://cskd.invalid/x"), tmp_path)


def test_a_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path}/file is a file, not a folder"):
        load_dataset("cifar10", data_dir=str(tmp_path / "file"))


@pytest.mark.slow
def test_a_killed_preparation_is_not_taken_for_a_finished_one(tmp_path):
    write_tar(tmp_path / "cifar-100-binary.tar", members_100())
    script = """
import os, signal, sys
from PIL import Image
from cskd_jax.data import load_dataset, tfds_source
calls = 0
def fromarray(pixels, original=Image.fromarray):
    global calls
    calls += 1
    if calls == 250:  # In the middle of the second split.
        os.kill(os.getpid(), signal.SIGKILL)
    return original(pixels)
tfds_source.Image.fromarray = fromarray
load_dataset("cifar100", data_dir=sys.argv[1])
"""
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name[:10] for path in (tmp_path / "cifar100").iterdir()] == ["incomplete"]
    dataset = load_dataset("cifar100", data_dir=str(tmp_path))
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (200, 100)


@pytest.mark.slow
def test_the_loser_of_a_race_uses_what_the_winner_prepared(tmp_path, monkeypatch):
    """Runs a whole second preparation in the middle of the first."""
    write_tar(tmp_path / "cifar-100-binary.tar", members_100())
    winners = []
    original = tfds_source.Image.fromarray

    def fromarray(pixels):
        monkeypatch.setattr(tfds_source.Image, "fromarray", original)
        winners.append(load_dataset("cifar100", data_dir=str(tmp_path)))
        return original(pixels)

    monkeypatch.setattr(tfds_source.Image, "fromarray", fromarray)
    loser = load_dataset("cifar100", data_dir=str(tmp_path))
    assert len(winners) == 1
    np.testing.assert_array_equal(loser.train.images, winners[0].train.images)
    assert [path.name for path in (tmp_path / "cifar100").iterdir()] == ["3.0.2"]
