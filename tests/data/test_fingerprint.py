"""The fingerprint of a data set: the same wherever the data lie, another for other data."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from cskd_jax.data import ImageDataset, Split, load_dataset
from cskd_jax.data.fingerprint import fingerprint


def make_dataset(count=40, multilabel=False):
    generator = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % 3

    def split(labels):
        images = generator.integers(256, size=(len(labels), 4, 4, 3), dtype=np.uint8)
        return Split(images, np.eye(3, dtype=np.float32)[labels] if multilabel else labels)

    return ImageDataset("some", split(labels), split(labels[:7]), ("a", "b", "c"))


def test_it_is_stable_and_short():
    assert fingerprint(make_dataset()) == fingerprint(make_dataset()) == "480734a3abcd54d5"
    assert fingerprint(make_dataset(multilabel=True)) != fingerprint(make_dataset())


def change_label(dataset):
    labels = dataset.train.labels.copy()
    labels[13] = (labels[13] + 1) % 3
    return dataclasses.replace(dataset, train=dataset.train._replace(labels=labels))


def change_pixel(dataset):
    images = dataset.test.images.copy()
    images[-1, 0, 0, 0] ^= 1
    return dataclasses.replace(dataset, test=dataset.test._replace(images=images))


def change_shape(dataset):
    train, test = (split._replace(images=split.images.reshape(-1, 2, 8, 3)) for split in (dataset.train, dataset.test))
    return dataclasses.replace(dataset, train=train, test=test)


CHANGES = {
    "a label": change_label,
    "a pixel": change_pixel,
    "the shape": change_shape,
    "a class": lambda dataset: dataclasses.replace(dataset, categories=("a", "b", "d")),
    "fewer": lambda _: make_dataset(39),
    "splits": lambda dataset: dataclasses.replace(dataset, train=dataset.test, test=dataset.train),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data(change):
    assert fingerprint(CHANGES[change](make_dataset())) != fingerprint(make_dataset())


def test_its_name_does_not_matter():
    assert fingerprint(dataclasses.replace(make_dataset(), name="other")) == fingerprint(make_dataset())


def test_streamed_and_moved(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "here" / split / name
            folder.mkdir(parents=True)
            for index in range(12):
                image = generator.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(image).save(folder / f"{index}.png")
    load = {"name": "image_folder", "path": str(tmp_path / "here")}
    expected = fingerprint(load_dataset(**load, streaming=False))
    assert fingerprint(load_dataset(**load, streaming=True, workers=1)) == expected
    (tmp_path / "here").rename(tmp_path / "there")
    assert fingerprint(load_dataset("image_folder", path=str(tmp_path / "there"))) == expected
