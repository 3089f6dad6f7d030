"""Students that are trained together become what they would become alone, whatever happens to the others."""

import itertools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import cskd_jax
from cskd_jax import console
from cskd_jax.__main__ import main
from cskd_jax.data import ImageDataset, Split
from cskd_jax.distributed.devices import Devices
from cskd_jax.errors import DivergedError, InterruptedRun, UserError
from cskd_jax.runs import grid, run, together
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training import loop
from cskd_jax.training.callbacks import Progress, Start
from cskd_jax.training.metrics import SINGLE_LABEL
from cskd_jax.training.programs import Programs
from cskd_jax.training.trainer import fit_together
from tests.conftest import ROOT, Stop
from tests.tiers import chosen

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(28, 4, 4, 1)).astype(np.float32)
LABELS = np.arange(28, dtype=np.int32) % 3
DATA = ImageDataset("noise", Split(IMAGES[:20], LABELS[:20]), Split(IMAGES[20:], LABELS[20:]), tuple("abc"))


class Net(nn.Module):
    width: int = 5
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images, train=False):
        maps = nn.relu(nn.Conv(self.width, (3, 3), name="conv")(images))
        x = nn.BatchNorm(use_running_average=not train)(maps.mean((1, 2)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return {"logits": nn.Dense(3)(x), "features": (maps,), "embedding": x}


TEACHER = cskd_jax.Teacher(Net(7), Net(7).init(jax.random.PRNGKey(9), IMAGES[:2]))
STUDENTS = {
    "ce": cskd_jax.Student(Net(), {"cross_entropy": 1.0}, optax.sgd(0.1)),
    "kd": cskd_jax.Student(Net(3, 0.3), {"kd": 1.0, "cross_entropy": 0.1}, optax.adam(1e-2)),
    "sp": cskd_jax.Student(Net(), {"sp": 1.0, "cross_entropy": 1.0}, optax.sgd(0.1, momentum=0.9), ema=0.9),
    "cc": cskd_jax.Student(Net(4), {"cc": 1.0}, optax.sgd(0.1)),
}


def make_trainer(names, epochs=2, workdir=None, callbacks=(), **settings):
    """A trainer of batches of 8, 8 and 4 images."""
    students = {name: settings.pop(name, STUDENTS[name]) for name in names}
    return cskd_jax.Trainer(
        students,
        [TEACHER],
        data=DATA,
        phases=[cskd_jax.Phase(epochs)],
        batch_size=8,
        workdir=workdir,
        callbacks=callbacks,
        log_every=1,
        **{"devices": 1} | settings,
    )


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual.variables, expected.variables)
    assert actual.last == expected.last
    assert [row for row in actual.history if "images_per_second" not in row] == expected.history


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "settings"),
    chosen([(["ce", "kd", "sp"], {}), (["kd", "sp"], {"devices": 2}), (["kd", "cc"], {"accumulation_steps": 2})], 1),
    ids=["one device", "two devices", "micro-batches"],
)
def test_company_changes_no_bit(names, settings):
    results = make_trainer(names, **settings).fit()
    assert list(results) == list(names)
    for name in names:
        assert_same(results[name], make_trainer([name], **settings).fit()[name])


@pytest.mark.slow
def test_all_seeds_have_the_same_programs():
    """A sweep compiles each of them once."""
    one, other = (make_trainer(["kd"], seed=seed).programs("kd") for seed in (0, 1))
    assert one.lowered_init.as_text() == other.lowered_init.as_text()
    assert one.lowered[0].as_text() == other.lowered[0].as_text()


@pytest.mark.slow
def test_the_pass_returns_only_what_is_read():
    trainer = make_trainer(STUDENTS)
    reads = {name: trainer.programs(name).reads.teacher for name in STUDENTS}
    assert reads["ce"] is None
    assert (reads["kd"].logits, reads["kd"].features, reads["kd"].embedding) == (True, (False,), False)
    assert (reads["sp"].logits, reads["sp"].features, reads["sp"].embedding) == (False, (True,), False)
    assert (reads["cc"].logits, reads["cc"].features, reads["cc"].embedding) == (False, (False,), True)


@pytest.mark.slow
def test_stopped_together_and_alone_they_go_on(tmp_path):
    """One has been trained further than the others: they catch up, and all end as if nothing had happened."""
    names = ["kd", "cc"]
    expected = make_trainer(names).fit()
    with pytest.raises(InterruptedRun, match="saved at step 4 of the kd"):
        make_trainer(["kd"], workdir=tmp_path).fit(Stop(4))
    with pytest.raises(InterruptedRun, match="saved at step 2 and 4 of the 2 students"):
        make_trainer(names, workdir=tmp_path).fit(Stop(2))
    with pytest.raises(InterruptedRun, match="saved at step 5 of the 2 students"):
        make_trainer(names, workdir=tmp_path).fit(Stop(3))
    results = make_trainer(names, workdir=tmp_path).fit()
    for name in names:
        assert_same(results[name], expected[name])
    again = make_trainer(names, workdir=tmp_path).fit()
    assert_same(again["cc"], expected["cc"])


@pytest.mark.slow
def test_one_that_diverges_leaves_the_others_alone():
    expected = make_trainer(["kd"]).fit()
    bad = cskd_jax.Student(Net(), {"cross_entropy": 1.0}, optax.sgd(1e38))
    with pytest.raises(DivergedError, match="ce: .*not|ce: .* is (nan|inf)") as caught:
        make_trainer(["ce", "kd"], ce=bad).fit()
    assert list(caught.value.results) == ["kd"]
    for name in expected:
        assert_same(caught.value.results[name], expected[name])


@pytest.mark.slow
def test_mistakes_are_found_before_the_devices_start(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "Devices", None)
    with pytest.raises(UserError, match="precision is '16'; it must be one of default, high, highest"):
        run.train(load_recipe("digits:kd", ["--config.precision=16"]), tmp_path / "run")


def test_memory_decides_how_many_train_together(monkeypatch):
    together = []

    class Watch(cskd_jax.Callback):
        def on_start(self, start):
            together.append(start.together)

    monkeypatch.setattr(Devices, "free_memory", lambda self: 1000)
    results = make_trainer(["kd", "cc"], callbacks=[Watch()]).fit()
    assert together == [1, 1]
    assert list(results) == ["kd", "cc"]


@pytest.mark.parametrize(("seconds", "order"), [(0, ["last batch", "start"]), (600, ["start", "last batch"])])
def test_a_slow_compiler_gets_what_follows_the_first_step_at_once(monkeypatch, seconds, order):
    """A quick one, which loads programs from the cache, gets it after the first step."""
    events, compile_step = [], Programs.compile

    class Watch(cskd_jax.Callback):
        def on_start(self, start):
            events.append("start")

    def watched(self, number, size, pool):
        if size == 4:
            events.append("last batch")
        compile_step(self, number, size, pool)

    monkeypatch.setattr(Programs, "compile", watched)
    monkeypatch.setattr(loop, "_LOADING_SECONDS", seconds)
    make_trainer(["ce"], 1, callbacks=[Watch()]).fit()
    assert list(dict.fromkeys(events)) == order


@pytest.mark.slow
def test_trainers_of_different_lengths(tmp_path):
    """Each has its own number of epochs and its own folder; the shorter one is done first."""
    first = make_trainer(["kd"], 1, tmp_path / "kd")
    second = make_trainer(["sp"], 3, tmp_path / "sp", beside=first)
    done = []
    fit_together([first, second], on_done=lambda trainer, name, result: done.append((name, result)))
    assert [name for name, _ in done] == ["kd", "sp"]
    assert_same(done[0][1], make_trainer(["kd"], 1).fit()["kd"])
    assert_same(done[1][1], make_trainer(["sp"], 3).fit()["sp"])
    assert not (tmp_path / "kd" / "sp").exists()


@pytest.mark.slow
def test_distill_students(tmp_path, capsys):
    arrays = {"train": (IMAGES[:20], LABELS[:20]), "test": (IMAGES[20:], LABELS[20:])}
    settings = {**arrays, "teacher": TEACHER.network, "teacher_variables": TEACHER.variables}
    settings |= {"epochs": 2, "batch_size": 8, "callbacks": (), "devices": 1}
    students = {name: STUDENTS[name] for name in ("ce", "kd")}
    results = cskd_jax.distill(students=students, workdir=tmp_path, **settings)
    one = STUDENTS["kd"]
    alone = cskd_jax.distill(one.network, losses=one.losses, optimizer=one.optimizer, **settings)
    jax.tree.map(np.testing.assert_array_equal, results["kd"].variables, alone.variables)
    assert {path.name for path in tmp_path.iterdir() if (path / "checkpoints").exists()} == {"ce", "kd"}
    loaded = cskd_jax.load_run(tmp_path, student=one.network, name="kd")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, alone.variables)
    assert main(["cskd-jax", "report", str(tmp_path)]) == 2
    assert "student=MODULE, name=NAME) reads it" in capsys.readouterr().err
    fewer = {"kd": STUDENTS["kd"]}
    with pytest.raises(UserError, match="holds another run .students"):
        cskd_jax.distill(students=fewer, workdir=tmp_path, **settings)
    for wrong, text in (
        ({"students": STUDENTS, "ema": 0.9}, "ema applies to a single student"),
        ({"students": {}}, "with at least one"),
        ({"students": {"../kd": one}}, "cannot be named '../kd'"),
        ({"students": {"lock": one}}, "cannot be named 'lock'"),
        ({"students": {"results.json": one}}, "cannot be named 'results.json'"),
        ({"students": {0: one}}, "cannot be named 0"),
        ({"student": one.network}, "a student needs losses and an optimizer"),
    ):
        with pytest.raises(UserError, match=text):
            cskd_jax.distill(**wrong, **settings)


def test_groups(tmp_path):
    """What shares batches and teacher goes together; seeds, other teachers and what trains a teacher do not."""
    words = ["ce", "kd", "R34_0.25/R18_0.125/kd", "at"]
    runs = grid.make_grid(f"{ROOT}/configs/digits.py", words, [0, 1], tmp_path, [])
    names = [[run.name for run in group] for group in grid.group(runs)]
    assert names == [
        ["teacher-resnet18_0.25"],
        ["teacher-resnet34_0.25"],
        ["ce-seed0", "kd-seed0", "at-seed0"],
        ["R34_0.25/R18_0.125/kd-seed0"],
        ["ce-seed1", "kd-seed1", "at-seed1"],
        ["R34_0.25/R18_0.125/kd-seed1"],
    ]
    assert [len(group) for group in grid.group(runs, 2)] == [1, 1, 2, 1, 1, 2, 1, 1]
    assert all(len(group) == 1 for group in grid.group(runs, 1))


def test_board(capsys, monkeypatch):
    """One line an epoch for all runs, one a minute in between, and each pause once."""
    now = [0.0]
    board = together.Board(2, clock=lambda: now[0])
    callbacks = [board.callback(name) for name in ("kd", "ce")]
    with callbacks[0].pause("student: evaluating"), callbacks[1].pause("student: evaluating"):
        pass
    # Even if they always take their time, each is shown once.
    monkeypatch.setattr(console, "_LONG_SECONDS", 0.0)
    monkeypatch.setattr(console, "_seconds", {"2 runs: evaluating": 9.0, "2 runs: saving": 9.0})
    for callback, what in itertools.product(callbacks, ["evaluating", "saving"]):
        with callback.pause(f"student: {what}"):
            pass
    progress = Progress(seconds=2.0, images=400)
    start = Start("student", 0, 20, 10, 0, 2000, SINGLE_LABEL, progress, lambda step: None)
    for callback in callbacks:
        callback.on_start(start)
    now[0] = 61.0
    for callback in callbacks:
        callback.on_step(4, 100, {})
    for callback, score in zip(callbacks, (0.5, 0.25), strict=True):
        callback.on_row({"split": "train", "step": 10, "loss": 1.0})
        callback.on_row({"split": "test", "step": 10, "top1": score})
    callbacks[0].on_end()
    callbacks[1].on_row({"split": "test", "step": 20, "top1": 0.75})
    callbacks[1].on_end()
    # With a validation split, a run's test row may come before the next run is evaluated.
    for callback in callbacks:
        callback.on_start(start)
    for callback, score in zip(callbacks, (0.5, 0.25), strict=True):
        callback.on_row({"split": "validation", "step": 20, "top1": score})
        callback.on_row({"split": "test", "step": 20, "top1": 0.9})
    assert capsys.readouterr().out.splitlines() == [
        "2 runs: evaluating ...",
        "2 runs: saving ...",
        "2 runs: epoch 1/2, 200 images/s",
        "epoch 1/2, 200 images/s: kd 0.5000, ce 0.2500",
        "epoch 2/2, 200 images/s: ce 0.7500",
        "epoch 2/2, 200 images/s: kd 0.5000, ce 0.2500",
    ]
