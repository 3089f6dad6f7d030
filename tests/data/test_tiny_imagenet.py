"""Tiny ImageNet from archives in the original format, made here, small, and put where a person would put them."""

import dataclasses
import io
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from cskd_jax.data import archives, load_dataset, tiny_imagenet
from cskd_jax.errors import UserError
from tests.archive_files import photograph, write_zip

ROOT = "tiny-imagenet-200/"
# Not sorted: the order of wnids.txt is that of the labels.
NAMES = [f"n{(number * 37) % 200:08d}" for number in range(200)]
GRAY = f"{ROOT}train/{NAMES[3]}/images/{NAMES[3]}_1.JPEG"


def train_file(label, number):
    return f"{ROOT}train/{NAMES[label]}/images/{NAMES[label]}_{number}.JPEG"


def make_members():
    """Two images a category for training, the second one first in the archive, and one for validation."""
    members = {ROOT: b"", ROOT + "words.txt": b"n00000000\tentity\n", ROOT + "test/images/test_0.JPEG": b"not read"}
    annotations = []
    for label, name in enumerate(NAMES):
        members[f"{ROOT}train/{name}/{name}_boxes.txt"] = f"{name}_0.JPEG\t0\t0\t63\t63\n".encode()
        for number in (1, 0):
            members[train_file(label, number)] = photograph(2 * label + number, (64, 64))
        members[f"{ROOT}val/images/val_{label}.JPEG"] = photograph(1000 + label, (64, 64))
        annotations.append(f"val_{label}.JPEG\t{name}\t0\t32\t44\t62")
    members[GRAY] = photograph(7, (64, 64), mode="L")
    members[ROOT + "val/val_annotations.txt"] = "\n".join(reversed(annotations)).encode() + b"\n"
    members[ROOT + "wnids.txt"] = "\n".join(NAMES).encode()
    return members


MEMBERS = make_members()
ANNOTATIONS = MEMBERS[ROOT + "val/val_annotations.txt"]


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.slow
def test_prepared_without_network(tmp_path, no_network):
    write_zip(tmp_path / "tiny-imagenet-200.zip", MEMBERS)
    dataset = load_dataset("tiny_imagenet", data_dir=str(tmp_path))
    assert (dataset.name, dataset.categories, dataset.image_shape) == ("tiny_imagenet", tuple(NAMES), (64, 64, 3))
    np.testing.assert_array_equal(dataset.train.labels, np.repeat(np.arange(200), 2))
    train = [pixels(MEMBERS[train_file(label, number)]) for label in range(200) for number in range(2)]
    np.testing.assert_array_equal(dataset.train.images, train)
    np.testing.assert_array_equal(dataset.test.labels, np.arange(200)[::-1])
    test = [pixels(MEMBERS[f"{ROOT}val/images/val_{label}.JPEG"]) for label in reversed(range(200))]
    np.testing.assert_array_equal(dataset.test.images, test)
    for split in (dataset.train, dataset.test):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    assert (tmp_path / "tiny_imagenet" / "1.0.0" / "dataset_info.json").is_file()


def test_gray_images_are_stored_in_rgb(tmp_path):
    """So that tensorflow-datasets, too, reads what the features say."""
    path = write_zip(tmp_path / "tiny-imagenet-200.zip", MEMBERS)
    images = list(tiny_imagenet.read_archive(tiny_imagenet.ARCHIVE, path).splits["train"].images)
    gray = pixels(MEMBERS[GRAY])
    np.testing.assert_array_equal(images[7], gray)
    assert (gray[..., :1] == gray).all()
    assert images[6] == MEMBERS[train_file(3, 0)]  # What is in RGB keeps its bytes.


@pytest.mark.slow
def test_the_same_when_prepared_twice(tmp_path):
    """Whatever the order of the archive, in another folder of data and with another prefix."""
    write_zip(tmp_path / "a" / "tiny-imagenet-200.zip", MEMBERS)
    shuffled = dict(sorted(MEMBERS.items(), key=lambda item: item[0][::-1]))
    write_zip(tmp_path / "b" / "downloads" / "tiny-imagenet-200.zip", shuffled, prefix="./")
    first, second = (load_dataset("tiny_imagenet", data_dir=str(tmp_path / name)) for name in "ab")
    again = load_dataset("tiny_imagenet", data_dir=str(tmp_path / "a"))  # Reads what is prepared.
    for other in (second, again):
        for split in ("train", "test"):
            for one, two in zip(getattr(first, split), getattr(other, split), strict=True):
                np.testing.assert_array_equal(one, two)


def test_a_balanced_part(tmp_path):
    write_zip(tmp_path / "tiny-imagenet-200.zip", MEMBERS)
    dataset = load_dataset("tiny_imagenet", data_dir=str(tmp_path), train_examples=200)
    np.testing.assert_array_equal(dataset.train.labels, np.arange(200))
    np.testing.assert_array_equal(dataset.train.images[5], pixels(MEMBERS[train_file(5, 0)]))


@pytest.mark.slow
def test_tensorflow_is_not_imported(tmp_path):
    write_zip(tmp_path / "tiny-imagenet-200.zip", MEMBERS)
    script = """
import sys
from cskd_jax.data import load_dataset
load_dataset("tiny_imagenet", data_dir=sys.argv[1])
print("tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_another_checksum_is_accepted_with_a_warning(tmp_path, caplog):
    path = write_zip(tmp_path / "tiny-imagenet-200.zip", MEMBERS)
    with caplog.at_level("WARNING", logger="cskd_jax"):
        tiny_imagenet.read(tiny_imagenet.ARCHIVE, tmp_path)
    assert f"{path} is not the official" in caplog.text


def test_download(tmp_path, server, caplog):
    path = write_zip(tmp_path / "web" / "tiny-imagenet-200.zip", MEMBERS)
    archive = dataclasses.replace(
        tiny_imagenet.ARCHIVE, url=f"{server}/{path.name}", sha256=archives.sha256(path), size=path.stat().st_size
    )
    with caplog.at_level("WARNING", logger="cskd_jax"):
        content = tiny_imagenet.read(archive, tmp_path / "data")
    assert not caplog.text
    assert len(list(content.splits["train"].images)) == 400
    assert [file.name for file in (tmp_path / "data" / "downloads").iterdir()] == ["tiny-imagenet-200.zip"]


def change(member, data):
    return {**MEMBERS, ROOT + member: data}


def without(*members):
    return {name: data for name, data in MEMBERS.items() if name.removeprefix(ROOT) not in members}


TRAIN_5 = [train_file(5, number).removeprefix(ROOT) for number in range(2)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (without("wnids.txt"), "is missing tiny-imagenet-200/wnids.txt"),
        (without("val/val_annotations.txt"), "is missing tiny-imagenet-200/val/val_annotations.txt"),
        (without("val/images/val_9.JPEG"), "is missing tiny-imagenet-200/val/images/val_9.JPEG"),
        (change("wnids.txt", b"n1\nn2\n"), "wnids.txt should hold 200 distinct label names.* it has 2 lines"),
        (change("wnids.txt", b"n1\n" * 200), "wnids.txt .* it has 200 lines, 1 of them distinct"),
        (without(*TRAIN_5), f"the train split has no images of {NAMES[5]}$"),
        (
            change("train/n99999999/images/n99999999_0.JPEG", b""),
            "n99999999_0.JPEG belongs to class n99999999, which tiny-imagenet-200/wnids.txt does not list",
        ),
        (
            change("val/val_annotations.txt", ANNOTATIONS.replace(NAMES[4].encode(), NAMES[6].encode())),
            f"the validation split has no images of {NAMES[4]}",
        ),
        (
            change("val/val_annotations.txt", ANNOTATIONS.replace(NAMES[4].encode(), b"n99999999")),
            "val_annotations.txt says 'n99999999' for val_4.JPEG; tiny-imagenet-200/wnids.txt does not list that class",
        ),
        (change("val/val_annotations.txt", b"val_4.JPEG\n"), "val_annotations.txt says '' for val_4.JPEG"),
        (
            change("val/val_annotations.txt", b"\n".join(ANNOTATIONS.splitlines()[1:])),
            "val_annotations.txt has no annotation for val_199.JPEG",
        ),
        (change("val/val_annotations.txt", ANNOTATIONS * 2), "val_annotations.txt lists val_199.JPEG twice"),
        (change(TRAIN_5[0], b"nonsense"), f"{TRAIN_5[0]} is not a valid image"),
        (change(TRAIN_5[0], b""), f"{TRAIN_5[0]} is not a valid image"),
        (change(TRAIN_5[1], MEMBERS[train_file(5, 1)][:600]), f"{TRAIN_5[1]} is not a valid image .*runcated"),
        (change("val/images/val_3.JPEG", photograph(0, (64, 48))), "val_3.JPEG is 64x48 pixels, expected 64x64"),
    ],
)
def test_unsound_contents(tmp_path, members, message):
    path = write_zip(tmp_path / "tiny-imagenet-200.zip", members)
    with pytest.raises(UserError, match=message) as error:
        load_dataset("tiny_imagenet", data_dir=str(tmp_path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tiny_imagenet" / "1.0.0").exists()


def test_a_flipped_byte_is_found_by_its_checksum(tmp_path):
    path = write_zip(tmp_path / "tiny-imagenet-200.zip", MEMBERS)
    data = bytearray(path.read_bytes())
    data[data.index(MEMBERS[train_file(9, 0)]) + 700] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"member {train_file(9, 0)} is damaged .*replace the archive with http"):
        load_dataset("tiny_imagenet", data_dir=str(tmp_path))


def test_hidden_files_are_no_images(tmp_path):
    """As some systems leave them beside every file of an archive."""
    hidden = {f"{ROOT}train/{NAMES[0]}/images/._{NAMES[0]}_0.JPEG": b"", f"{ROOT}val/images/._val_0.JPEG": b""}
    path = write_zip(tmp_path / "tiny-imagenet-200.zip", MEMBERS | hidden)
    content = tiny_imagenet.read_archive(tiny_imagenet.ARCHIVE, path)
    assert [len(content.splits[split].labels["label"]) for split in ("train", "validation")] == [400, 200]


@pytest.mark.parametrize("size", [0, 10, 100_000])
def test_truncated_archive(tmp_path, size):
    path = write_zip(tmp_path / "tiny-imagenet-200.zip", MEMBERS)
    os.truncate(path, size)
    with pytest.raises(UserError, match=f"{path} is damaged or not a zip archive .*: replace it with http") as error:
        load_dataset("tiny_imagenet", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


def test_compressed_members(tmp_path):
    path = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in MEMBERS.items():
            file.writestr(name, data)
    assert len(list(tiny_imagenet.read_archive(tiny_imagenet.ARCHIVE, path).splits["validation"].images)) == 200
