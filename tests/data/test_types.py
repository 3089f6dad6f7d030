"""The balanced subset of the training split."""

import numpy as np
import pytest

from cskd_jax.data.types import ImageDataset, Split, balanced_indices, hold_out
from cskd_jax.errors import UserError

CATEGORIES = ("cat", "dog", "emu")
LABELS = np.array([2, 0, 1, 0, 0, 1, 2, 1, 0, 2], np.int32)  # 4 cats, 3 dogs, 3 emus.


def test_all_examples_without_a_number():
    np.testing.assert_array_equal(balanced_indices(LABELS, CATEGORIES, None), np.arange(10))


def test_first_examples_of_each_category_in_source_order():
    np.testing.assert_array_equal(balanced_indices(LABELS, CATEGORIES, 6), [0, 1, 2, 3, 5, 6])


def test_first_categories_give_one_more():
    np.testing.assert_array_equal(balanced_indices(LABELS, CATEGORIES, 4), [0, 1, 2, 3])


def test_largest_subset():
    np.testing.assert_array_equal(balanced_indices(LABELS, CATEGORIES, 10), np.arange(10))


@pytest.mark.parametrize("number", [-1, 0, 2])
def test_fewer_than_the_categories(number):
    with pytest.raises(
        UserError, match=f"train_examples={number} is less than the number of classes, 3; it must be from 3 to 10"
    ):
        balanced_indices(LABELS, CATEGORIES, number)


def test_more_than_a_category_has():
    with pytest.raises(UserError, match="needs 4 training examples of class 'dog', which has 3: at most 10 are"):
        balanced_indices(LABELS, CATEGORIES, 11)


def test_largest_subset_stops_at_the_first_exhausted_category():
    with pytest.raises(UserError, match="class 'cat', which has 1: at most 2 are possible"):
        balanced_indices(np.array([0, 1, 1, 1]), ("cat", "dog"), 3)


def test_a_category_without_examples():
    with pytest.raises(UserError, match="class 'emu', which has 0: at most 2 are possible"):
        balanced_indices(np.array([0, 1, 1, 1]), CATEGORIES, 3)


def test_an_image_of_each_class_remains_for_training():
    images = np.zeros((10, 4, 6, 3), np.uint8)
    dataset = ImageDataset("ten", Split(images, LABELS), Split(images, LABELS), CATEGORIES)
    assert sorted(hold_out(dataset, 7, 0).train.labels) == [0, 1, 2]
    with pytest.raises(UserError, match="class 'cat', which has 4, and 1 must remain: at most 7 are possible"):
        hold_out(dataset, 10, 0)
    labels = np.eye(3, dtype=np.float32)[LABELS]
    dataset = ImageDataset("ten", Split(images, labels), Split(images, labels), CATEGORIES)
    with pytest.raises(UserError, match="validation_examples=10 is out of range; it must be from 1 to 9"):
        hold_out(dataset, 10, 0)


def test_a_split_of_nothing_is_not_one_without_labels():
    split = Split(np.zeros((0, 4, 6, 3), np.uint8), np.zeros(0, np.int32))
    assert not ImageDataset("nothing", split, split, CATEGORIES).unlabeled


def test_properties_of_a_dataset():
    split = Split(np.zeros((5, 4, 6, 3), np.uint8), np.zeros(5, np.int32))
    dataset = ImageDataset("zeros", split, split, CATEGORIES)
    assert dataset.num_classes == 3
    assert dataset.image_shape == (4, 6, 3)
    assert not dataset.multilabel
    split = Split(np.zeros((5, 4, 6, 3), np.uint8), np.zeros((5, 3), np.float32))
    assert ImageDataset("zeros", split, split, CATEGORIES).multilabel


def test_first_examples_of_multilabel_data():
    labels = np.eye(3, dtype=np.float32)[LABELS]
    np.testing.assert_array_equal(balanced_indices(labels, CATEGORIES, None), np.arange(10))
    np.testing.assert_array_equal(balanced_indices(labels, CATEGORIES, 4), np.arange(4))


@pytest.mark.parametrize("number", [-1, 0, 11])
def test_number_of_multilabel_examples_out_of_range(number):
    labels = np.eye(3, dtype=np.float32)[LABELS]
    with pytest.raises(UserError, match=f"train_examples={number} is out of range; it must be from 1 to 10"):
        balanced_indices(labels, CATEGORIES, number)
