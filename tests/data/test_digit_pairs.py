"""The multi-label data set: two digits in an image, found again in the source."""

import zlib

import numpy as np
import pytest

from cskd_jax.data import load_dataset
from cskd_jax.errors import UserError

CHECKSUMS = [202486276, 3096813852]


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("digit_pairs")


@pytest.fixture(scope="module")
def digits(digits_dir):
    return load_dataset("digits", data_dir=str(digits_dir))


def test_sizes_and_types(dataset):
    assert dataset.multilabel
    assert dataset.categories == tuple("0123456789")
    for split, count in ((dataset.train, 1440), (dataset.test, 1428)):
        assert (split.images.shape, split.images.dtype) == ((count, 16, 16, 1), np.uint8)
        assert (split.labels.shape, split.labels.dtype) == ((count, 10), np.float32)
        assert set(np.unique(split.labels)) == {0, 1}
        assert set(split.labels.sum(axis=1)) == {1, 2}


def halves(images):
    """The two digits of each image, without the rows above and below them: (digits, left or right)."""
    for image in images:
        for side in (image[:, :8], image[:, 8:]):
            rows = np.flatnonzero(side.any(axis=(1, 2)))
            yield side[rows[0] : rows[-1] + 1]


def by_pixels(split):
    """{digit without the black rows above and below: its index}."""
    return {digit.tobytes(): index for index, digit in enumerate(map(trim, split.images))}


def trim(digit):
    rows = np.flatnonzero(digit.any(axis=(1, 2)))
    return digit[rows[0] : rows[-1] + 1]


@pytest.mark.parametrize(("name", "rounds"), [("train", 1), ("test", 4)])
def test_images_are_made_of_the_digits_of_their_split(dataset, digits, name, rounds):
    split, source = getattr(dataset, name), getattr(digits, name)
    index = by_pixels(source)
    found = np.array([index[half.tobytes()] for half in halves(split.images)]).reshape(-1, 2)
    expected = np.zeros_like(split.labels)
    for side in (0, 1):
        expected[np.arange(len(found)), source.labels[found[:, side]]] = 1
        # Each digit stands there once a round.
        assert (np.bincount(found[:, side]) == rounds).all()
    np.testing.assert_array_equal(split.labels, expected)


def test_digits_stand_at_any_height(dataset):
    tops = [np.flatnonzero(image[:, :8].any(axis=(1, 2)))[0] for image in dataset.train.images]
    assert set(tops) >= set(range(9))


def test_always_the_same(dataset):
    assert [zlib.crc32(split.images.tobytes()) for split in (dataset.train, dataset.test)] == CHECKSUMS


def test_first_examples(dataset):
    subset = load_dataset("digit_pairs", train_examples=100)
    for array, whole in zip(subset.train, dataset.train, strict=True):
        np.testing.assert_array_equal(array, whole[:100])
    assert len(subset.test.labels) == 1428


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "train_examples=0 is out of range; it must be from 1 to 1440"),
     (2, "data set 'digit_pairs' has no images of .* in its train split")],
)  # fmt: skip
def test_too_few_examples(number, text):
    with pytest.raises(UserError, match=text):
        load_dataset("digit_pairs", train_examples=number)
