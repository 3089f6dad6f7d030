"""How often a training is evaluated and saved, and that neither changes what it becomes."""

import dataclasses
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import cskd_jax
from cskd_jax.data import ImageDataset, Split
from cskd_jax.distributed.devices import Devices
from cskd_jax.errors import InterruptedRun, UserError
from cskd_jax.training import participant
from cskd_jax.training.checkpoint import Checkpoints, load_variables
from cskd_jax.training.programs import Reads
from cskd_jax.training.saved import Record
from tests.conftest import Stop
from tests.tiers import chosen

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.normal(size=(24, 2, 2, 1)).astype(np.float32), (np.arange(24) % 3).astype(np.int32)
DATA = ImageDataset("arrays", Split(IMAGES[:16], LABELS[:16]), Split(IMAGES[16:], LABELS[16:]), ("a", "b", "c"))
STEPS_PER_EPOCH, EPOCHS = 2, 6
RECORD = Record({"name": "resnet8", "width": 1.0}, channels=1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


def make_trainer(workdir=None, data=DATA, **settings):
    # A learning rate this large makes the accuracy go up and down, so that the best epoch is not the last.
    student = cskd_jax.Student(Net(), {"cross_entropy": 1.0}, optax.sgd(5.0))
    return cskd_jax.Trainer(
        {"net": student},
        data=data,
        phases=[cskd_jax.Phase(EPOCHS)],
        batch_size=8,
        workdir=workdir,
        **{"devices": 1, "callbacks": ()} | settings,
    )


def fit(workdir=None, stop=None, data=DATA, **settings):
    return make_trainer(workdir, data, **settings).fit(stop)["net"]


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "net" / "checkpoints").iterdir() if path.name.isdigit())


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual.variables, expected.variables)
    assert (actual.last, actual.best) == (expected.last, expected.best)


@pytest.fixture(scope="module")
def whole():
    result = fit()
    assert result.best["epoch"] < EPOCHS
    return result


@pytest.mark.slow
def test_after_every_epoch(tmp_path, whole):
    assert_same(fit(tmp_path, save_every_minutes=0, keep_checkpoints=100), whole)
    assert saved_steps(tmp_path) == [STEPS_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]


@pytest.mark.slow
def test_best_and_last_are_saved_in_any_case(tmp_path, whole):
    assert_same(fit(tmp_path, save_every_minutes=60), whole)
    assert saved_steps(tmp_path) == [STEPS_PER_EPOCH * whole.best["epoch"], STEPS_PER_EPOCH * EPOCHS]
    best, last = (load_variables(str(tmp_path / "net"), best=best) for best in (True, False))
    assert (best.step, last.step) == (STEPS_PER_EPOCH * whole.best["epoch"], STEPS_PER_EPOCH * EPOCHS)
    jax.tree.map(np.testing.assert_array_equal, last.variables, whole.variables)
    logits = Net().apply(best.variables, DATA.test.images)
    assert np.mean(logits.argmax(1) == DATA.test.labels) == pytest.approx(whole.best["top1"])


@pytest.mark.slow
def test_what_was_never_evaluated_has_no_best(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        checkpoints.save(1, {"params": {"network": {"bias": np.zeros(3)}}}, RECORD)
    assert load_variables(str(tmp_path)).step == 1
    with pytest.raises(UserError, match="none of its checkpoints has a score, so none of them is the best"):
        load_variables(str(tmp_path), best=True)


@pytest.mark.slow
@pytest.mark.parametrize("step", chosen([4, 2, 3, 5, 9], 1))
def test_stop_saves_what_is_not_saved(tmp_path, whole, step):
    with pytest.raises(InterruptedRun):
        fit(tmp_path, Stop(step), save_every_minutes=60)
    assert saved_steps(tmp_path)[-1] == step
    assert_same(fit(tmp_path, save_every_minutes=60), whole)


@pytest.mark.slow
def test_validation_measures_a_best_epoch_that_was_not_saved(tmp_path):
    data = dataclasses.replace(DATA, validation=DATA.test)
    alone = fit(data=data)
    assert alone.best["epoch"] < EPOCHS
    assert_same(fit(tmp_path, data=data, save_every_minutes=60), alone)


def test_evaluation_every_few_epochs(tmp_path, whole):
    result = fit(tmp_path, evaluate_every_epochs=4, save_every_minutes=0)
    jax.tree.map(np.testing.assert_array_equal, result.variables, whole.variables)
    assert [row["epoch"] for row in result.history if row["split"] == "test"] == [4, 6]
    assert result.last == whole.last
    with pytest.raises(UserError, match="evaluate_every_epochs is 0; it must be an integer, at least 1"):
        fit(evaluate_every_epochs=0)


def test_offers_are_saved_when_it_is_time(tmp_path):
    now = 0.0

    def offer(step, score, is_best):
        tree = {"params": {"network": {"w": np.full(2, step, np.float32)}}}
        return checkpoints.offer(step, tree, RECORD, score, is_best)

    with Checkpoints(tmp_path / "checkpoints", keep=1, every_minutes=1, clock=lambda: now) as checkpoints:
        now = 59.0
        assert [offer(1, 0.5, True), offer(2, 0.7, True), offer(3, 0.6, False)] == [False] * 3
        now = 61.0
        assert offer(4, 0.1, False)
        now = 120.0
        assert not offer(5, 0.2, False)
        assert not offer(6, 0.9, True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6"], "closing saves the best"
    assert load_variables(str(tmp_path)).variables["params"]["w"].tolist() == [6, 6]


@pytest.mark.slow
def test_fit_again(tmp_path, whole):
    """A trainer that is done stays done, as when a cell of a notebook is run again."""
    for workdir in (None, tmp_path):
        trainer = make_trainer(workdir)
        assert_same(trainer.fit()["net"], whole)
        assert_same(trainer.fit()["net"], whole)


@pytest.mark.slow
def test_programs_that_an_interruption_cancelled(whole):
    trainer, pool, busy = make_trainer(), ThreadPoolExecutor(1), threading.Event()
    (own,) = trainer._participants.values()
    pool.submit(busy.wait)
    own.programs.compile(0, 8, pool)
    own.compile_ahead(pool)
    trainer.teacher_pass.compile(8, Reads.union([own.programs.reads]), pool)
    pool.shutdown(wait=False, cancel_futures=True)
    busy.set()
    assert not own.programs.is_compiled(0, 8)
    assert not trainer.teacher_pass.is_compiled(8)
    assert_same(trainer.fit()["net"], whole)


@pytest.mark.slow
def test_without_a_folder_nothing_is_resumed():
    with pytest.raises(InterruptedRun) as error:
        fit(stop=Stop(3))
    assert str(error.value) == "stopped by test at step 3 of the net"


def test_more_rows_than_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cskd_jax.training.trainer.MAX_ROWS", 40)
    make_trainer(tmp_path)
    with pytest.raises(UserError, match=r"log_every is 1: metrics.jsonl would get up to 24 rows, and at most 20 are"):
        make_trainer(tmp_path, log_every=1)
    make_trainer(log_every=1)


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_when_metrics_are_read(monkeypatch, several):
    """Several processes read them at the same step, however long each of them waits for its devices."""
    monkeypatch.setattr(participant, "processes", types.SimpleNamespace(is_distributed=lambda: several))
    monkeypatch.setattr(Devices, "steps_in_flight", 2)
    behind = []

    class Behind(cskd_jax.Callback):
        def on_step(self, step, images, metrics):
            behind.append(dispatched[0] - step)

    dispatched, trainer = [0], make_trainer(callbacks=[Behind()])
    programs = trainer.programs("net")
    step = programs.step

    def step_that_is_ready(*arguments):
        dispatched[0] += 1
        return jax.block_until_ready(step(*arguments))

    monkeypatch.setattr(programs, "step", step_that_is_ready)
    trainer.fit()
    # Several processes read the first step of an epoch once they have dispatched the second.
    assert behind == ([1, 0] if several else [0, 0]) * EPOCHS
