"""Folders of image files."""

import numpy as np
import pytest
from PIL import Image

from cskd_jax.data import load_dataset
from cskd_jax.data.images import middle_square
from cskd_jax.errors import UserError
from tests.archive_files import drawing


def save(path, seed=0, size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    """Three images of each of two categories for training, and one of each for testing."""
    for index, category in enumerate(("dog", "cat")):
        for number in range(3):
            save(tmp_path / "train" / category / f"{number}.png", seed=10 * index + number)
        save(tmp_path / "test" / category / "0.png", seed=100 + index)
    return tmp_path


def load(root, **options):
    return load_dataset("image_folder", path=str(root), **options)


def test_sorted_categories_and_files(root):
    dataset = load(root)
    assert (dataset.name, dataset.categories, dataset.image_shape) == ("image_folder", ("cat", "dog"), (4, 6, 3))
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 0, 1, 1, 1])
    for index, name in enumerate(["cat/0", "cat/1", "cat/2", "dog/0", "dog/1", "dog/2"]):
        np.testing.assert_array_equal(
            dataset.train.images[index], np.asarray(Image.open(root / "train" / f"{name}.png"))
        )
    np.testing.assert_array_equal(dataset.test.labels, [0, 1])
    for split in (dataset.train, dataset.test):
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)


def test_val_stands_in_for_test(root):
    (root / "test").rename(root / "val")
    assert len(load(root).test.labels) == 2


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.BMP", "a.Png"])
def test_extensions(root, name):
    save(root / "train" / "cat" / name)
    assert len(load(root).train.labels) == 7


def test_other_files_and_hidden_ones_are_ignored(root):
    for name in (
        "train/cat/notes.txt",
        "train/cat/.hidden.png",
        "train/.cache/1.png",
        "train/cat/deeper/1.png",
        "train/x.png",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("no image")
    assert len(load(root).train.labels) == 6


def test_folders_that_are_nested_too_deeply(root):
    (root / "train" / "cat").joinpath(*"d" * 150).mkdir(parents=True)
    with pytest.raises(UserError, match="train/cat/d holds folders that are nested more than 100 deep, the maximum"):
        load(root)


def test_links_that_lead_in_circles_are_broken_links(root, caplog):
    for path in (root / "train" / "cat" / "a.png", root / "train" / "cat" / "more" / "b.png", root / "train" / "b"):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(path)
    (root / "train" / "dog" / "up").symlink_to(root / "train")
    assert len(load(root).train.labels) == 6
    assert "1 broken links (such as " in caplog.text


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_become_rgb(root, mode):
    save(root / "train" / "cat" / "0.png", mode=mode)
    pixels = np.asarray(Image.open(root / "train" / "cat" / "0.png")).reshape(4, 6, -1)
    expected = np.repeat(pixels, 3, axis=-1) if mode == "L" else pixels[..., :3]
    np.testing.assert_array_equal(load(root).train.images[0], expected)


def test_palette_with_transparency(root):
    image = Image.open(root / "train" / "cat" / "0.png").convert("P")
    image.save(root / "train" / "cat" / "0.png", transparency=bytes([0, 128]))
    np.testing.assert_array_equal(load(root).train.images[0], np.asarray(image.convert("RGB")))


def test_subset_decodes_only_what_it_takes(root):
    (root / "train" / "cat" / "2.png").write_bytes(b"never looked at")
    np.testing.assert_array_equal(load(root, train_examples=3).train.labels, [0, 0, 1])


def test_subset_larger_than_a_category(root):
    with pytest.raises(UserError, match="needs 4 training examples of class 'cat', which has 3: at most 6"):
        load(root, train_examples=7)


def test_no_path():
    with pytest.raises(UserError, match="image_folder needs path"):
        load_dataset("image_folder")


def test_missing_path(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/nowhere is not a folder"):
        load(tmp_path / "nowhere")


def test_no_train_folder(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} has no folder train"):
        load(tmp_path)


def test_neither_test_nor_val(root):
    (root / "test").rename(root / "tests")
    with pytest.raises(UserError, match="has no folder test or val"):
        load(root)


def test_no_categories(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}/train has no class folders"):
        load(tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_category(root, split):
    for file in (root / split / "dog").iterdir():
        file.rename(file.with_suffix(".txt"))
    with pytest.raises(UserError, match=f"{root}/{split}/dog has no images: file names must end in one of .bmp, .jpeg"):
        load(root)


def test_test_split_lacks_a_category(root):
    (root / "test" / "dog").rename(root / "elsewhere")
    with pytest.raises(UserError, match=f"{root}/test is missing the class 'dog', which train has"):
        load(root)


def test_test_split_has_another_category(root):
    save(root / "test" / "emu" / "0.png")
    with pytest.raises(UserError, match=f"{root}/test has the class 'emu', which train does not have"):
        load(root)


@pytest.mark.parametrize("file", ["train/cat/0.png", "train/dog/1.png", "test/dog/0.png"])
@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_corrupt_image(root, file, damage):
    data = (root / file).read_bytes()
    (root / file).write_bytes(b"no image" if damage == "text" else data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{root}/{file} is not a valid image"):
        load(root)


def test_image_that_would_start_a_program(root, ghostscript):
    (root / "train" / "cat" / "x.jpg").write_bytes(drawing())
    with pytest.raises(
        UserError, match=f"{root}/train/cat/x.jpg is not a valid image .*not one of BMP, JPEG, PNG, WEBP"
    ):
        load(root)
    assert not ghostscript.exists()


def test_telephone_photographs_of_several_pictures(root):
    """JPEG by their start and their suffix; Pillow calls them MPO."""
    picture = Image.new("RGB", (6, 4), "red")
    picture.save(root / "train" / "cat" / "x.jpg", "MPO", save_all=True, append_images=[picture])
    with Image.open(root / "train" / "cat" / "x.jpg") as image:
        assert image.format == "MPO"
    assert len(load(root).train.images) == 7


@pytest.mark.parametrize("file", ["train/dog/2.png", "test/cat/0.png"])
def test_mixed_sizes(root, file):
    save(root / file, size=(5, 7))
    with pytest.raises(UserError, match=f"{root}/{file} is 5x7 pixels, expected 6x4"):
        load(root)


def test_more_than_eight_bits(root):
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(root / "train" / "dog" / "1.png")
    with pytest.raises(UserError, match=f"{root}/train/dog/1.png has more than 8 bits per channel"):
        load(root)


def test_mixed_sizes_become_squares(root):
    save(root / "train" / "dog" / "1.png", size=(9, 20))
    dataset = load(root, image_size=7)
    assert dataset.image_shape == (7, 7, 3)
    with Image.open(root / "train" / "dog" / "1.png") as image:
        np.testing.assert_array_equal(dataset.train.images[4], middle_square(image, 7))


def without_labels(root):
    """The same training images in one folder."""
    for file in sorted(root.glob("train/*/*")):
        file.rename(root / "train" / f"{file.parent.name}{file.name}")
    for folder in root.glob("train/*/"):
        folder.rmdir()
    return root


def test_images_without_labels(root, caplog):
    save(root / "train" / "dog" / "3.png", seed=50)
    (root / "train" / "dog" / "notes.txt").write_text("no image")
    dataset = load(without_labels(root))
    assert (dataset.unlabeled, dataset.categories) == (True, ("cat", "dog"))
    np.testing.assert_array_equal(dataset.train.labels, [-1] * 7)
    np.testing.assert_array_equal(dataset.test.labels, [0, 1])
    np.testing.assert_array_equal(dataset.train.images[0], np.asarray(Image.open(root / "train" / "cat0.png")))
    assert "skipped files: 1 in formats other than" in caplog.text
    assert len(load(root, train_examples=3).train.labels) == 3


def test_images_without_labels_are_not_held_out_or_counted_by_class(root):
    without_labels(root)
    with pytest.raises(UserError, match="which cannot be held out for validation"):
        load(root, validation_examples=2)
    with pytest.raises(UserError, match="train_examples=9 is out of range; it must be from 1 to 6"):
        load(root, train_examples=9)
    (root / "train").rename(root / "other")
    (root / "train").mkdir()
    with pytest.raises(UserError, match="has no class folders"):
        load(root)
