"""Batches that a function of the epoch makes."""

import numpy as np
import optax
import pytest

import cskd_jax
from cskd_jax.data.arrays import from_arrays
from cskd_jax.data.batches import EpochBatches, read_steps
from cskd_jax.data.samplers import UniformSampler
from cskd_jax.data.types import Split
from cskd_jax.errors import InterruptedRun, UserError
from tests.conftest import Stop
from tests.test_options import DATA, IMAGES, LABELS, Net


def batches_of(epoch, sizes=(8, 8, 6)):
    order = np.random.default_rng(epoch).permutation(22)
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        yield IMAGES[order[start : start + size]], LABELS[order[start : start + size]]


def test_counts():
    batches = EpochBatches(batches_of, Split)
    assert (batches.steps_per_epoch, batches.batch_size, batches.last_batch_size) == (3, 8, 6)
    assert batches.num_examples == 22
    sampler = UniformSampler(22, 8, 0)
    assert [batches.images_before(step) for step in range(8)] == [sampler.images_before(step) for step in range(8)]


@pytest.mark.parametrize(("start", "end"), [(0, 6), (2, 3), (4, 9), (3, 3)])
def test_reads_any_steps(start, end):
    batches = EpochBatches(batches_of, Split)
    found = list(batches.read(range(start, end)))
    expected = [batch for epoch in range(3) for batch in batches_of(epoch)][start:end]
    assert len(found) == len(expected)
    for batch, (images, labels) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(batch.images, images)
        np.testing.assert_array_equal(batch.labels, labels)


def test_parts_of_batches():
    batches = EpochBatches(batches_of, Split)
    read = read_steps(None, batches, range(3), lambda size: np.arange(size)[size // 2 :])
    assert [(size, len(batch["image"]), len(batch["label"]), "index" in batch) for size, batch in read] == [
        (8, 4, 4, False), (8, 4, 4, False), (6, 3, 3, False),
    ]  # fmt: skip


def test_a_given_number_of_steps_is_not_counted():
    def endless(epoch):
        while True:
            yield IMAGES[:4], LABELS[:4]

    batches = EpochBatches(endless, Split, steps_per_epoch=5)
    assert batches.num_examples == 20
    assert len(list(batches.read(range(3, 12)))) == 9


SPENT = iter([(IMAGES[:4], LABELS[:4])] * 3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda epoch: [], "train yields no batches for epoch 0"),
        (lambda epoch: [{"image": 0, "label": 1}], "train yields a dict; it must yield pairs"),
        (lambda epoch: batches_of(epoch, (8, 6, 8)), r"batches of \[6, 8\] images; only the last may be smaller"),
        (lambda epoch: batches_of(epoch, (6, 8)), r"batches of \[6, 8\] images; only the last may be smaller"),
        (lambda epoch: SPENT, "train yields 0 batches for epoch 0, but 3 for epoch 0: the function must make new ones"),
        (
            lambda epoch: batches_of(epoch, (8, 8, 6)[: 3 - epoch]),
            "train yields 2 batches for epoch 1, but 3 for epoch 0",
        ),
        (lambda epoch: batches_of(epoch, ((8, 8, 6), (8, 6, 8))[epoch]), r"at step 5, not float32\[8, 4, 4, 1\]"),
    ],
)
def test_functions_that_give_no_epochs(function, message):
    def read_all():
        list(EpochBatches(function, Split).read(range(6)))

    with pytest.raises(UserError, match=message):
        read_all()


@pytest.mark.parametrize("steps", [0, -3, "5", 2.0, True])
def test_impossible_steps_per_epoch(steps):
    with pytest.raises(UserError, match=f"steps_per_epoch is {steps!r}; it must be a positive integer, or None"):
        EpochBatches(batches_of, Split, steps)


def test_epochs_that_are_shorter_than_asked():
    with pytest.raises(UserError, match="3 batches for epoch 0, but steps_per_epoch is 5: lower it, or yield more"):
        list(EpochBatches(lambda epoch: [(IMAGES[:8], LABELS[:8])] * 3, Split, 5).read(range(5)))


SETTINGS = {
    "losses": {"cross_entropy": 1.0}, "optimizer": optax.sgd(0.1), "test": tuple(DATA.test), "epochs": 2,
    "callbacks": (), "devices": 1, "log_every": 1,
}  # fmt: skip


@pytest.mark.slow
def test_trains_as_from_arrays():
    def function(epoch):
        for step in range(3):
            index = UniformSampler(22, 8, 0).indices(3 * epoch + step)
            yield IMAGES[index], LABELS[index].astype(np.int64)

    ours = cskd_jax.distill(Net(), train=function, **SETTINGS)
    theirs = cskd_jax.distill(Net(), train=tuple(DATA.train), batch_size=8, **SETTINGS)
    assert ours.history == theirs.history
    np.testing.assert_array_equal(
        ours.variables["params"]["Dense_0"]["kernel"], theirs.variables["params"]["Dense_0"]["kernel"]
    )


@pytest.mark.slow
def test_resumes_bit_for_bit(tmp_path):
    expected = cskd_jax.distill(Net(), train=batches_of, **SETTINGS)

    def trainer():
        batches = EpochBatches(batches_of, Split)
        data = from_arrays(batches.first, SETTINGS["test"])
        student = cskd_jax.Student(Net(), SETTINGS["losses"], SETTINGS["optimizer"])
        return cskd_jax.Trainer(
            {"student": student}, data=data, sampler=batches, phases=[cskd_jax.Phase(2)], callbacks=(), devices=1,
            log_every=1, workdir=tmp_path,
        )  # fmt: skip

    with pytest.raises(InterruptedRun):
        trainer().fit(Stop(4))
    resumed = trainer()
    assert resumed.fit()["student"].history == expected.history
    with pytest.raises(UserError, match="batches made by a function cannot be evaluated"):
        resumed.evaluate("student", "train")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (batches_of(0), "train is a generator, which may be exhausted after one epoch: give arrays, or a function"),
        (lambda epoch: [(IMAGES[:8], LABELS[:7])], "train must be images .* and labels"),
        (lambda epoch: [(IMAGES[:8], LABELS[:8])] * 2 if epoch == 0 else [(IMAGES[:8], LABELS[:8] + 2)] * 2,
         "train yields a label at step 3 that is not from 0 to 2"),
    ],
)  # fmt: skip
def test_what_distill_refuses(train, message):
    with pytest.raises(UserError, match=message):
        cskd_jax.distill(Net(), train=train, **SETTINGS)
