"""The samplers: batches that only the seed and the step decide."""

import numpy as np
import pytest

from cskd_jax.data.samplers import BalancedSampler, UniformSampler
from cskd_jax.errors import UserError


def epoch_batches(sampler, epoch):
    first = epoch * sampler.steps_per_epoch
    return [sampler.indices(step) for step in range(first, first + sampler.steps_per_epoch)]


def epoch_order(sampler, epoch):
    return np.concatenate(epoch_batches(sampler, epoch))


@pytest.mark.parametrize("num_examples", [9, 10, 11, 3])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_example_once_an_epoch(num_examples, epoch):
    sampler = UniformSampler(num_examples, batch_size=5, seed=0)
    assert sorted(epoch_order(sampler, epoch)) == list(range(num_examples))


@pytest.mark.parametrize(
    ("num_examples", "sizes"), [(9, [5, 4]), (10, [5, 5]), (11, [5, 5, 1]), (3, [3])], ids=lambda value: str(value)
)
def test_last_batch_is_kept(num_examples, sizes):
    sampler = UniformSampler(num_examples, batch_size=5, seed=0)
    assert [len(batch) for batch in epoch_batches(sampler, 1)] == sizes
    assert sampler.last_batch_size == sizes[-1]


@pytest.mark.parametrize(("num_examples", "steps"), [(9, 1), (10, 2), (11, 2)])
def test_drop_last_leaves_the_smaller_batch_out(num_examples, steps):
    sampler = UniformSampler(num_examples, batch_size=5, seed=0, drop_last=True)
    assert [len(batch) for batch in epoch_batches(sampler, 1)] == [5] * steps
    assert sampler.last_batch_size == 5


def test_dropped_examples_differ_between_epochs():
    sampler = UniformSampler(11, batch_size=5, seed=0, drop_last=True)
    seen = [set(epoch_order(sampler, epoch).tolist()) for epoch in range(8)]
    assert all(len(examples) == 10 for examples in seen)
    assert len({frozenset(examples) for examples in seen}) > 1


def test_order_depends_on_the_epoch():
    sampler = UniformSampler(50, batch_size=5, seed=0)
    assert not np.array_equal(epoch_order(sampler, 0), epoch_order(sampler, 1))


def test_order_depends_on_the_seed():
    assert not np.array_equal(*(epoch_order(UniformSampler(50, batch_size=5, seed=seed), 0) for seed in (0, 1)))


def test_seed_and_epoch_are_not_added_up():
    order, other = epoch_order(UniformSampler(50, 5, seed=0), 1), epoch_order(UniformSampler(50, 5, seed=1), 0)
    assert not np.array_equal(order, other)


def test_order_is_shuffled():
    assert not np.array_equal(epoch_order(UniformSampler(50, batch_size=5, seed=0), 0), np.arange(50))


def test_order_does_not_depend_on_the_batch_size():
    small, large = (UniformSampler(50, batch_size=size, seed=3) for size in (5, 20))
    np.testing.assert_array_equal(epoch_order(small, 2), epoch_order(large, 2))


def test_a_step_is_a_pure_function():
    steps = [17, 3, 40, 3, 0, 29]
    first = {step: UniformSampler(23, batch_size=4, seed=5).indices(step).copy() for step in sorted(set(steps))}
    sampler = UniformSampler(23, batch_size=4, seed=5)
    for step in steps:
        np.testing.assert_array_equal(sampler.indices(step), first[step])


def test_indices_are_int64():
    assert UniformSampler(9, batch_size=5, seed=0).indices(1).dtype == np.int64


def test_indices_cannot_be_overwritten():
    with pytest.raises(ValueError, match="read-only"):
        UniformSampler(10, 4, seed=0).indices(0)[:] = -1


@pytest.mark.parametrize("drop_last", [False, True])
def test_images_before_a_step(drop_last):
    sampler = UniformSampler(10, 4, seed=0, drop_last=drop_last)
    sizes = [len(sampler.indices(step)) for step in range(9)]
    assert [sampler.images_before(step) for step in range(10)] == [sum(sizes[:step]) for step in range(10)]


def unbalanced_labels():
    """Categories of 3 to 40 examples, shuffled."""
    labels = np.repeat(np.arange(9), [40, 3, 12, 13, 8, 21, 4, 9, 17])
    return np.random.default_rng(0).permutation(labels)


@pytest.mark.parametrize(("batch_size", "size"), [(12, 4), (20, 4), (9, 3), (8, 8), (6, 1)])
@pytest.mark.parametrize("epoch", [0, 3])
def test_balanced_batches_have_as_many_of_each_category(batch_size, size, epoch):
    labels = unbalanced_labels()
    sampler = BalancedSampler(labels, batch_size, size, seed=0)
    batches = epoch_batches(sampler, epoch)
    for batch in batches:
        categories, counts = np.unique(labels[batch], return_counts=True)
        assert len(categories) == batch_size // size
        assert set(counts) == {size}
    used = np.concatenate(batches)
    assert len(set(used.tolist())) == len(used)


@pytest.mark.parametrize(
    ("counts", "steps"),
    [([8] * 6, 6), ([8, 8, 8], 3), ([40, 8, 8], 4), ([40, 8, 3], 2), ([4, 4], 1), ([9, 9, 11], 3)],
    ids=str,
)
def test_balanced_epochs_are_as_long_as_can_be(counts, steps):
    """Groups of 4, two classes in each batch: the steps that the groups allow, counted by hand."""
    labels = np.repeat(np.arange(len(counts)), counts)
    sampler = BalancedSampler(labels, 8, 4, seed=0)
    assert sampler.steps_per_epoch == steps
    assert sampler.images_before(3) == 24
    assert len(np.unique(np.concatenate(epoch_batches(sampler, 0)))) == 8 * sampler.steps_per_epoch


def test_balanced_epochs_use_everything_in_the_long_run():
    labels = unbalanced_labels()
    sampler = BalancedSampler(labels, 12, 4, seed=0)
    used = np.concatenate([np.concatenate(epoch_batches(sampler, epoch)) for epoch in range(60)])
    # The class of 3 examples never fills a group of 4.
    assert set(used.tolist()) == set(np.flatnonzero(labels != 1).tolist())


def test_balanced_batches_depend_on_seed_and_step_alone():
    labels = unbalanced_labels()
    one, same, other = (BalancedSampler(labels, 12, 4, seed=seed) for seed in (5, 5, 6))
    for step in (7, 0, 25, 7):
        np.testing.assert_array_equal(one.indices(step), same.indices(step))
    assert not np.array_equal(one.indices(0), other.indices(0))
    assert not np.array_equal(one.indices(0), one.indices(one.steps_per_epoch))


@pytest.mark.parametrize(
    ("batch_size", "size", "text"),
    [
        (10, 4, "batch_size 10 is not divisible by sampler.samples_per_category 4"),
        (40, 4, "needs 10 classes with that many examples, but the training split has 8"),
        (40, 20, None),
        (60, 20, "needs 3 classes with that many examples, but the training split has 2"),
    ],
)
def test_balanced_errors(batch_size, size, text):
    if text is None:
        assert BalancedSampler(unbalanced_labels(), batch_size, size, seed=0).steps_per_epoch == 1
    else:
        with pytest.raises(UserError, match=text):
            BalancedSampler(unbalanced_labels(), batch_size, size, seed=0)
