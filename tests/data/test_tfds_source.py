"""Reading any prepared tensorflow-datasets folder, and what is said about those that cannot be read."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cskd_jax.data import DATASETS, cifar, load_dataset, tfds_source
from cskd_jax.errors import UserError

INSTALL = r"pip install 'cskd_jax\[tf\]'"


def write(data_dir, splits, name="shapes", shape=(4, 6, 3), **features):
    """Prepares a data set from {split: [example]} as array_record."""
    features = features or {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(names=["round", "square"]),
    }
    builder_name = name

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = builder_name
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    Builder(data_dir=str(data_dir)).download_and_prepare(file_format="array_record")
    return data_dir / name / "1.2.3"


def picture(seed, size=(6, 4), mode="RGB"):
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def examples(count, offset=0, **options):
    return [{"image": picture(offset + index, **options), "label": index % 2} for index in range(count)]


class _Hiding:
    """A finder of modules that does not find TensorFlow."""

    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, fullname, path=None, target=None):
        hidden = fullname.partition(".")[0] == "tensorflow"
        return None if hidden else self._finder.find_spec(fullname, path, target)


@pytest.fixture
def no_tensorflow(monkeypatch):
    assert "tensorflow" not in sys.modules
    monkeypatch.setattr(sys, "meta_path", [_Hiding(finder) for finder in sys.meta_path])
    yield
    assert "tensorflow" not in sys.modules


def test_a_prepared_array_record_needs_no_tensorflow(tmp_path, no_tensorflow):
    train, test = examples(6), examples(3, offset=100)
    write(tmp_path, {"train": train, "test": test})
    dataset = load_dataset("shapes", data_dir=str(tmp_path))
    assert (dataset.name, dataset.categories, dataset.image_shape) == ("shapes", ("round", "square"), (4, 6, 3))
    for split, source in ((dataset.train, train), (dataset.test, test)):
        np.testing.assert_array_equal(split.images, [np.asarray(example["image"]) for example in source])
        np.testing.assert_array_equal(split.labels, [example["label"] for example in source])
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)


def test_gray_images_keep_one_channel(tmp_path):
    train = examples(2, mode="L")
    write(tmp_path, {"train": train, "test": train}, shape=(None, None, 1))
    images = load_dataset("shapes", data_dir=str(tmp_path)).train.images
    np.testing.assert_array_equal(images[..., 0], [np.asarray(example["image"]) for example in train])
    assert images.shape == (2, 4, 6, 1)


def test_gray_files_become_the_color_that_the_feature_declares(tmp_path):
    train = examples(2, mode="L")
    write(tmp_path, {"train": train, "test": train}, shape=(4, 6, 3))
    assert load_dataset("shapes", data_dir=str(tmp_path)).image_shape == (4, 6, 3)


def test_balanced_subset_in_file_order(tmp_path):
    train = examples(6)
    write(tmp_path, {"train": train, "test": train})
    subset = load_dataset("shapes", data_dir=str(tmp_path), train_examples=3)
    np.testing.assert_array_equal(subset.train.images, [np.asarray(train[index]["image"]) for index in (0, 1, 2)])
    assert len(subset.test.labels) == 6


def test_validation_stands_in_for_test(tmp_path):
    write(tmp_path, {"train": examples(2), "validation": examples(4)})
    assert len(load_dataset("shapes", data_dir=str(tmp_path)).test.labels) == 4


@pytest.mark.parametrize("splits", [("train",), ("test", "validation")])
def test_missing_split(tmp_path, splits):
    write(tmp_path, {name: examples(2) for name in splits})
    with pytest.raises(UserError, match="'shapes' needs the splits train and test .or validation.: it has") as error:
        load_dataset("shapes", data_dir=str(tmp_path))
    assert str(list(splits)) in str(error.value)


def test_missing_label(tmp_path):
    rows = [{"image": picture(0), "kind": 1}]
    write(tmp_path, {"train": rows, "test": rows}, image=tfds.features.Image(), kind=tfds.features.Scalar(np.int64))
    with pytest.raises(UserError, match=r"'shapes' needs the features .*: it has image \(Image\), kind \(Scalar\)"):
        load_dataset("shapes", data_dir=str(tmp_path))


def test_label_that_is_no_category(tmp_path):
    rows = [{"image": picture(0), "label": 1}]
    write(tmp_path, {"train": rows, "test": rows}, image=tfds.features.Image(), label=tfds.features.Scalar(np.int64))
    with pytest.raises(UserError, match=r"it has image \(Image\), label \(Scalar\)"):
        load_dataset("shapes", data_dir=str(tmp_path))


def test_sixteen_bit_images(tmp_path):
    features = {"image": tfds.features.Image(shape=(4, 6, 1), dtype=np.uint16, encoding_format="png")}
    rows = [{"image": picture(0, mode="L"), "label": 0}]
    write(tmp_path, {"train": rows, "test": rows}, **features, label=tfds.features.ClassLabel(num_classes=2))
    with pytest.raises(UserError, match=r"needs uint8 images .* it has uint16 images of shape \(4, 6, 1\)"):
        load_dataset("shapes", data_dir=str(tmp_path))


def test_mixed_sizes_in_one_split(tmp_path):
    rows = [*examples(2), *examples(1, size=(5, 4))]
    write(tmp_path, {"train": rows, "test": examples(2)}, shape=(None, None, 3))
    with pytest.raises(UserError, match="'shapes', split train: example 2 is 5x4 pixels, expected 6x4"):
        load_dataset("shapes", data_dir=str(tmp_path))


def test_mixed_sizes_between_splits(tmp_path):
    write(tmp_path, {"train": examples(2), "test": examples(2, size=(6, 7))}, shape=(None, None, 3))
    with pytest.raises(UserError, match="'shapes', split test: example 0 is 6x7 pixels, expected 6x4"):
        load_dataset("shapes", data_dir=str(tmp_path))


def test_unlabeled_test_split(tmp_path):
    write(tmp_path, {"train": examples(2), "test": [{"image": picture(0), "label": -1}]})
    with pytest.raises(UserError, match="'shapes' has no examples, or unlabeled ones, in its test split"):
        load_dataset("shapes", data_dir=str(tmp_path))


def test_validation_stands_in_for_an_unlabeled_test_split(tmp_path, caplog):
    unlabeled = [{"image": picture(0), "label": -1}] * 3
    write(tmp_path, {"train": examples(2), "test": unlabeled, "validation": examples(4)})
    assert len(load_dataset("shapes", data_dir=str(tmp_path)).test.labels) == 4
    assert "the split test of data set 'shapes' has no labels: its split validation is used" in caplog.text


def test_labels_are_kept_only_where_data_may_be_written(tmp_path):
    directory = write(tmp_path, {"train": examples(2), "test": examples(2)})
    (directory / "dataset_info.json").chmod(0o644)
    load_dataset("shapes", data_dir=str(tmp_path), prepare=False)
    assert not list(directory.glob("labels-*"))
    load_dataset("shapes", data_dir=str(tmp_path))
    assert {path.name for path in directory.glob("labels-*")} == {"labels-train.npy", "labels-test.npy"}
    assert (directory / "labels-test.npy").stat().st_mode & 0o777 == 0o644


def test_record_that_is_no_image(tmp_path):
    write(tmp_path, {"train": [*examples(1), {"image": b"nonsense", "label": 1}], "test": examples(2)})
    with pytest.raises(UserError, match="'shapes', split train: example 1 is not a valid image"):
        load_dataset("shapes", data_dir=str(tmp_path))


@pytest.mark.parametrize("header", ["((((", "-" * 9000 + "1", "[" * 2000, "\0", "(9223372036854775808,)", "PK"])
def test_damaged_labels_are_read_anew(header, tmp_path):
    directory = write(tmp_path, {"train": examples(4), "test": examples(2)})
    if header.endswith(",)"):
        header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {header}}}"
    content = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header.encode()
    (directory / "labels-train.npy").write_bytes(b"PK\3\4" + bytes(100) if header == "PK" else content)
    with (directory / "labels-test.npy").open("wb") as file:
        np.savez(file, labels=[0, 1])
    data = load_dataset("shapes", data_dir=str(tmp_path))
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == ([0, 1, 0, 1], [0, 1])
    assert data.train.labels.dtype == np.int32


@pytest.mark.parametrize("label", [2, 2**31 - 1, 2**40])
def test_labels_that_are_no_classes(label, tmp_path):
    directory = write(tmp_path, {"train": examples(4), "test": examples(2)})
    np.save(directory / "labels-train.npy", [0, 1, 0, label])
    with pytest.raises(UserError, match=f"has the label {label} in its train split; labels must be from 0 to 1: rem"):
        load_dataset("shapes", data_dir=str(tmp_path))


def test_truncated_record_file(tmp_path):
    folder = write(tmp_path, {"train": examples(200), "test": examples(2)})
    (file,) = folder.glob("*train*")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(
        UserError, match=f"cannot read split train in {folder}: .*; remove the folder to prepare it again"
    ):
        load_dataset("shapes", data_dir=str(tmp_path))


def test_damaged_dataset_info(tmp_path):
    load_dataset("digits", data_dir=str(tmp_path))
    (tmp_path / "digits" / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=f"'digits' cannot be opened in {tmp_path}"):
        load_dataset("digits", data_dir=str(tmp_path))


def test_folder_that_was_not_prepared(tmp_path):
    (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match="digits/1.0.0 exists but holds no dataset_info.json: remove it"):
        load_dataset("digits", data_dir=str(tmp_path))


def test_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^{tmp_path}/file is a file, not a folder"):
        load_dataset("digits", data_dir=str(tmp_path / "file"))


@pytest.mark.slow
def test_preparing_keeps_stdout_free(tmp_path, capsys):
    load_dataset("digits", data_dir=str(tmp_path))
    assert capsys.readouterr().out == ""


def test_unknown_name(tmp_path):
    message = f"unknown data set 'digitz'; it must be one of {', '.join(DATASETS)}, or any tensorflow-datasets name"
    with pytest.raises(UserError, match=message):
        load_dataset("digitz", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["two words", "mnist:9.9.9", "imagenet_v2/nothing"])
def test_name_that_does_not_fit(tmp_path, name):
    with pytest.raises(UserError, match=f"data set '{name}' cannot be opened") as error:
        load_dataset(name, data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["huggingface:evil/x", "kubric:movi_a"])
def test_other_registries_are_not_asked(tmp_path, name):
    """They would be asked for code, in the name of a run that may come from elsewhere."""
    with pytest.raises(UserError, match=f"data set '{name}' belongs to {name.partition(':')[0]}, not to tensorflow"):
        load_dataset(name, data_dir=str(tmp_path))


def test_an_unprepared_stock_builder_needs_tensorflow(tmp_path, no_tensorflow):
    with pytest.raises(UserError, match=f"'mnist' is not prepared in {tmp_path}/mnist.*TensorFlow.*{INSTALL}"):
        load_dataset("mnist", data_dir=str(tmp_path))


def test_a_stock_builder_that_cannot_be_constructed_without_tensorflow(tmp_path, no_tensorflow):
    with pytest.raises(UserError, match=f"opening data set 'coco' needs TensorFlow.*{INSTALL}"):
        load_dataset("coco", data_dir=str(tmp_path))


def test_tfrecord_needs_tensorflow(tmp_path, no_tensorflow):
    folder = write(tmp_path, {"train": examples(1), "test": examples(1)})
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=f"'shapes' is prepared as tfrecord in {folder}.*needs TensorFlow.*{INSTALL}"):
        load_dataset("shapes", data_dir=str(tmp_path))


def test_other_formats_are_refused(tmp_path):
    folder = write(tmp_path, {"train": examples(1), "test": examples(1)})
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "riegeli"}))
    with pytest.raises(UserError, match=r"prepared as \['riegeli'\]; it must be array_record or tfrecord"):
        load_dataset("shapes", data_dir=str(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="reads tfrecord through TensorFlow")
def test_tfrecord_is_read_through_tensorflow(tmp_path):
    script = """
import sys
import numpy as np
from cskd_jax.data import digits, load_dataset, tfds_source
builder = tfds_source._builder_class(digits.SOURCE)(data_dir=sys.argv[1])
builder.content = digits.read(None)
builder.download_and_prepare(file_format="tfrecord")
dataset = load_dataset("digits", data_dir=sys.argv[1])
np.testing.assert_array_equal(dataset.train.images, builder.content.splits["train"].images)
np.testing.assert_array_equal(dataset.test.labels, builder.content.splits["test"].labels["label"])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_builders_of_ours_do_not_replace_stock_ones():
    tfds_source._builder_class(cifar.CIFAR10)
    assert tfds.builder_cls("cifar10").__module__.startswith("tensorflow_datasets")
