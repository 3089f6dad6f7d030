"""The embedded data set, prepared and read without TensorFlow."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cskd_jax.data import load_dataset


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def dataset(data_dir):
    return load_dataset("digits", data_dir=data_dir)


def test_sizes_and_types(dataset):
    assert dataset.train.images.shape == (1440, 8, 8, 1)
    assert dataset.test.images.shape == (357, 8, 8, 1)
    for split in (dataset.train, dataset.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
    assert dataset.categories == tuple("0123456789")
    assert (dataset.num_classes, dataset.image_shape) == (10, (8, 8, 1))


def test_each_category_gives_its_share_to_the_test_split(dataset):
    train, test = (np.bincount(split.labels) for split in (dataset.train, dataset.test))
    np.testing.assert_allclose(test, (train + test) * 357 / 1797, atol=1)


def test_the_splits_are_the_source_in_its_order(dataset):
    source = load_digits()
    pixels = np.rint(source.images * 255 / 16).astype(np.uint8).reshape(1797, 64)
    position = {row.tobytes(): index for index, row in enumerate(pixels)}
    assert len(position) == 1797
    found = []
    for split in (dataset.train, dataset.test):
        indices = [position[row.tobytes()] for row in split.images]
        assert indices == sorted(indices)
        np.testing.assert_array_equal(split.labels, source.target[indices])
        found += indices
    assert sorted(found) == list(range(1797))


def test_pixels_use_the_whole_range(dataset):
    assert (dataset.train.images.min(), dataset.train.images.max()) == (0, 255)


def test_second_load_reads_what_was_prepared(dataset, data_dir, monkeypatch):
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: pytest.fail("prepared twice"))
    again = load_dataset("digits", data_dir=data_dir)
    np.testing.assert_array_equal(again.train.images, dataset.train.images)
    np.testing.assert_array_equal(again.test.labels, dataset.test.labels)


def test_balanced_subset(dataset, data_dir):
    subset = load_dataset("digits", data_dir=data_dir, train_examples=23)
    np.testing.assert_array_equal(np.bincount(subset.train.labels), [3, 3, 3, 2, 2, 2, 2, 2, 2, 2])
    first_zeros = np.flatnonzero(dataset.train.labels == 0)[:3]
    np.testing.assert_array_equal(subset.train.images[subset.train.labels == 0], dataset.train.images[first_zeros])
    np.testing.assert_array_equal(subset.test.images, dataset.test.images)
