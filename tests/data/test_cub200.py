"""CUB-200-2011 from archives in the original format, made here, small, and put where a person would put them."""

import dataclasses
import io
import os

import numpy as np
import pytest
from PIL import Image

from cskd_jax.data import archives, cub200, load_dataset
from cskd_jax.data.images import middle_square
from cskd_jax.errors import UserError
from tests.archive_files import drawing, photograph, write_tar

ROOT = "CUB_200_2011/"
CLASSES = [f"{number:03d}.Bird_{number}" for number in range(1, 201)]
# Width and height of the photographs; each occurs for training and for testing.
SIZES = [(60, 40), (40, 60), (50, 50)]


def make_members():
    """Two photographs a category, of several sizes: the odd identifiers for training, the even ones for testing."""
    members = {"attributes.txt": b"1 has_bill_shape::curved\n", ROOT + "README": b"read me\n"}
    tables = {"classes.txt": [], "images.txt": [], "image_class_labels.txt": [], "train_test_split.txt": []}
    for label, name in enumerate(CLASSES, 1):
        tables["classes.txt"].append(f"{label} {name}")
        for number in (0, 1):
            identifier = 2 * label - 1 + number
            file = f"{name}/{name.split('.')[1]}_{number:04d}_{identifier}.jpg"
            tables["images.txt"].append(f"{identifier} {file}")
            tables["image_class_labels.txt"].append(f"{identifier} {label}")
            tables["train_test_split.txt"].append(f"{identifier} {1 - number}")
            members[f"{ROOT}images/{file}"] = photograph(identifier, SIZES[label % 3])
    # Grey, and with the suffix in the middle of the archive.
    members[f"{ROOT}images/{CLASSES[4]}/Bird_5_0000_9.jpg"] = photograph(9, (50, 45), mode="L")
    return members | {ROOT + name: "\n".join(lines).encode() + b"\n" for name, lines in tables.items()}


MEMBERS = make_members()


def image_files():
    return [line.split()[1] for line in MEMBERS[ROOT + "images.txt"].decode().splitlines()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with the archive, and the data set that was prepared from it."""
    folder = tmp_path_factory.mktemp("cub")
    write_tar(folder / "CUB_200_2011.tgz", MEMBERS)
    return folder, load_dataset("cub200", data_dir=str(folder))


@pytest.mark.slow
def test_prepared(prepared):
    folder, dataset = prepared
    assert (dataset.name, dataset.categories, dataset.image_shape) == ("cub200", tuple(CLASSES), (224, 224, 3))
    for number, split in enumerate((dataset.train, dataset.test)):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(split.labels, np.arange(200))
        for label in range(200):
            with Image.open(io.BytesIO(MEMBERS[f"{ROOT}images/{image_files()[2 * label + number]}"])) as image:
                np.testing.assert_array_equal(split.images[label], middle_square(image.convert("RGB"), 224))
    assert (folder / "cub200" / "1.0.0" / "dataset_info.json").is_file()


def test_gray_becomes_rgb(prepared):
    _, dataset = prepared
    gray = dataset.train.images[4]
    assert (gray[..., :1] == gray).all()
    assert not (dataset.train.images[5][..., :1] == dataset.train.images[5]).all()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_same_when_prepared_twice(tmp_path, prepared, no_network):
    """Whatever the order, the place and the compression of the archive."""
    folder, first = prepared
    write_tar(tmp_path / "downloads" / "CUB_200_2011.tar", dict(reversed(MEMBERS.items())), prefix="./")
    for other in (load_dataset("cub200", data_dir=str(path)) for path in (tmp_path, folder)):
        for split in ("train", "test"):
            for one, two in zip(getattr(first, split), getattr(other, split), strict=True):
                np.testing.assert_array_equal(one, two)


def test_another_checksum_is_accepted_with_a_warning(tmp_path, caplog):
    path = write_tar(tmp_path / "CUB_200_2011.tar.gz", MEMBERS)
    with caplog.at_level("WARNING", logger="cskd_jax"):
        cub200.read(cub200.ARCHIVE, tmp_path)
    assert f"{path} is not the official" in caplog.text


def test_download(tmp_path, server, caplog):
    path = write_tar(tmp_path / "web" / "CUB_200_2011.tgz", MEMBERS)
    archive = dataclasses.replace(cub200.ARCHIVE, url=f"{server}/{path.name}", sha256=archives.sha256(path))
    with caplog.at_level("WARNING", logger="cskd_jax"):
        content = cub200.read(archive, tmp_path / "data")
    assert not caplog.text
    assert len(content.splits["train"].images) == 200
    assert [file.name for file in (tmp_path / "data" / "downloads").iterdir()] == ["CUB_200_2011.tgz"]


def change(member, data):
    return {**MEMBERS, ROOT + member: data}


def replace(member, old, new):
    assert old in MEMBERS[ROOT + member]
    return change(member, MEMBERS[ROOT + member].replace(old, new, 1))


def without(member):
    return {name: data for name, data in MEMBERS.items() if name != ROOT + member}


FIRST = f"images/{CLASSES[0]}/Bird_1_0000_1.jpg"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("members", "message"),
    [
        *((without(table), f"is missing {ROOT}{table}") for table in ("images.txt", "classes.txt")),
        (without(FIRST), f"is missing {ROOT}{FIRST}"),
        (change(FIRST, b"nonsense"), f"member {ROOT}{FIRST} is not a valid image"),
        (change(FIRST, MEMBERS[ROOT + FIRST][:700]), f"member {ROOT}{FIRST} is not a valid image .*truncated"),
        (change("classes.txt", b"1 one\n2 two\n"), "classes.txt should hold 200 distinct label names.* has 2 lines"),
        (
            replace("classes.txt", b"002.Bird_2\n", b"001.Bird_1\n"),
            "classes.txt .* has 200 lines, 199 of them distinct",
        ),
        (replace("images.txt", b"2 ", b"1 "), "images.txt, line 2 is '1 001.*'; it must be a new number and a value"),
        (change("train_test_split.txt", b"1\n"), "train_test_split.txt, line 1 is '1'; it must be"),
        (replace("train_test_split.txt", b"1 1\n", b""), "split.txt has no entry for image 1, 001.Bird_1/Bird_1_0000"),
        (replace("train_test_split.txt", b"1 1\n", b"1 2\n"), "train_test_split.txt says '2' for image 1, 001.Bird_1"),
        (
            replace("image_class_labels.txt", b"4 2\n", b"4 201\n"),
            "class_labels.txt says '201' for image 4, 002.Bird_2",
        ),
        (replace("image_class_labels.txt", b"4 2\n", b"4 3\n"), "the test split has no images of 002.Bird_2"),
        (replace("train_test_split.txt", b"\n3 1\n", b"\n3 0\n"), "the train split has no images of 002.Bird_2"),
    ],
)
def test_unsound_contents(tmp_path, members, message):
    path = write_tar(tmp_path / "CUB_200_2011.tar", members)
    with pytest.raises(UserError, match=message) as error:
        load_dataset("cub200", data_dir=str(tmp_path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cub200").exists()


def test_photograph_that_would_start_a_program(tmp_path, ghostscript):
    write_tar(tmp_path / "CUB_200_2011.tar", change(FIRST, drawing()))
    with pytest.raises(UserError, match=f"member {ROOT}{FIRST} is not a valid image .*not one of BMP, JPEG, PNG, WEBP"):
        load_dataset("cub200", data_dir=str(tmp_path))
    assert not ghostscript.exists()


def test_photographs_that_take_too_long(tmp_path, monkeypatch):
    write_tar(tmp_path / "CUB_200_2011.tar", change(FIRST, photograph(0, (1100, 1000), mode="L")))
    with pytest.raises(UserError, match=f"member {ROOT}{FIRST} is not a valid image .*1100x1000 pixels; at most 1,000"):
        load_dataset("cub200", data_dir=str(tmp_path))
    write_tar(tmp_path / "CUB_200_2011.tar", MEMBERS)
    monkeypatch.setattr(cub200, "_MAX_IMAGES", 399)
    with pytest.raises(UserError, match="has more than 399 images: replace it with https://data.caltech.edu/"):
        load_dataset("cub200", data_dir=str(tmp_path))


def test_truncated_archive(tmp_path):
    path = write_tar(tmp_path / "CUB_200_2011.tgz", MEMBERS)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=f"{path} (is damaged or not a tar|is missing)") as error:
        load_dataset("cub200", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)
