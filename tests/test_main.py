"""The command line: whole small runs in this process, and every kind of bad input."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from cskd_jax.main import main
from cskd_jax.runs import lock
from tests.conftest import ROOT


@pytest.mark.slow
def test_results(done):
    results = json.loads((done / "results.json").read_text())
    assert (results["method"], results["seed"]) == ("cskd", 0)
    assert results["dataset"] == {"name": "digits", "categories": 10, "train_examples": 192, "test_examples": 357}
    for phase, epochs in (("teacher", 1), ("student", 3)):
        entry = results[phase]
        assert entry["last"]["epoch"] == epochs
        assert entry["best"]["top1"] >= entry["last"]["top1"]
        for evaluation in (entry["last"], entry["best"]):
            # Fractions of exactly 357 images: padding counts nowhere.
            assert (evaluation["top1"] * 357) == pytest.approx(round(evaluation["top1"] * 357), abs=1e-9)
            assert evaluation.keys() == {"epoch", "top1", "loss"}, "top-5 of ten categories says nothing"
    assert results["devices"]["count"] == 1
    assert results["config"]["epochs"] == 3
    assert results["versions"]["jax"]


@pytest.mark.slow
def test_confusion_matrix(done):
    rows = [line.split(",") for line in (done / "confusion_matrix.csv").read_text().splitlines()]
    student = json.loads((done / "results.json").read_text())["student"]
    categories = list(student["by_category"])
    assert rows[0][1:] == categories == [row[0] for row in rows[1:]]
    counts = [[int(value) for value in row[1:]] for row in rows[1:]]
    right = [row[i] for i, row in enumerate(counts)]
    assert sum(map(sum, counts)) == 357
    assert sum(right) / 357 == pytest.approx(student["last"]["top1"])
    assert [hit / sum(row) for hit, row in zip(right, counts, strict=True)] == pytest.approx(
        list(student["by_category"].values())
    )


def test_metrics_rows(done):
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    student = [row for row in rows if row["phase"] == "student"]
    assert [row["step"] for row in student if row["split"] == "test"] == [3, 6, 9]
    train = [row for row in student if row["split"] == "train"]
    assert [row["step"] for row in train] == [3, 6, 9]
    assert {"loss", "top1", "learning_rate", "gradient_norm", "category_structure/intra_feature"} <= train[0].keys()


def test_tensorboard_files(done):
    assert list((done / "tensorboard" / "student").glob("events*"))


def test_checkpoints_keep_last_and_best(done):
    steps = {int(path.name) for path in (done / "student" / "checkpoints").iterdir()}
    best = json.loads((done / "results.json").read_text())["student"]["best"]["epoch"]
    assert steps == {6, 9, 3 * best}


def test_run_again_says_done(done, small_run, capsys):
    before = (done / "results.json").read_bytes()
    assert main(["main", *small_run, f"--workdir={done}"]) == 0
    assert "already done" in capsys.readouterr().out
    assert (done / "results.json").read_bytes() == before


@pytest.mark.slow
def test_teacher_checkpoint(done, start, small_run, tmp_path):
    arguments = [*small_run, "--config.epochs=1", f"--config.teacher.checkpoint={done}/teacher"]
    _, error = (process := start([*arguments, f"--workdir={tmp_path / 'run'}"])).communicate()
    assert process.returncode == 0, error
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    expected = json.loads((done / "results.json").read_text())["teacher"]["last"]
    assert results["teacher"]["last"]["top1"] == expected["top1"]
    assert not (tmp_path / "run" / "teacher").exists()


@pytest.mark.slow
def test_ce_trains_no_teacher_in_the_default_workdir(start, small_run, tmp_path):
    arguments = [f"{small_run[0]}:ce", *small_run[1:], "--config.epochs=1", "--config.dtype=bfloat16"]
    output, error = (process := start(arguments, cwd=tmp_path)).communicate()
    assert process.returncode == 0, error
    assert "done in" in output.splitlines()[-1]
    assert not re.findall("downloading|absl|orbax|xla|tensorflow", output + error, re.IGNORECASE)
    (workdir,) = (tmp_path / "runs" / "digits").iterdir()
    # A digest stands for so many changes.
    assert re.fullmatch("ce-seed0-[0-9a-f]{8}", workdir.name)
    assert json.loads((workdir / "results.json").read_text())["teacher"] is None
    assert not (workdir / "teacher").exists()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_divergence_names_step_and_term(start, small_run, tmp_path):
    arguments = [f"{small_run[0]}:ce", *small_run[1:], "--config.optimizer.learning_rate=1e39"]
    _, error = (process := start([*arguments, f"--workdir={tmp_path / 'run'}"])).communicate()
    assert process.returncode == 3
    assert "error: student: cross_entropy is nan at step 2" in error


@pytest.mark.slow
def test_divergence_in_the_last_step_of_an_epoch_saves_nothing(start, small_run, tmp_path):
    arguments = [f"{small_run[0]}:ce", *small_run[1:], "--config.optimizer.learning_rate=1e39"]
    arguments += ["--config.dataset.train_examples=64"]
    _, error = (process := start([*arguments, f"--workdir={tmp_path / 'run'}"])).communicate()
    assert process.returncode == 3
    assert "error: student: test loss is" in error
    assert not list((tmp_path / "run" / "student" / "checkpoints").glob("[0-9]*"))
    assert "Traceback" not in error


def image_folder(root, *, classes=("cat", "dog"), size=(8, 8)):
    """train/CLASS and test/CLASS with 16 small images each."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(16):
                Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{index}.png")
    return root


def break_nothing(root):
    return root


def corrupt_image(root):
    (root / "train" / "cat" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n no picture")


def empty_category(root):
    for file in (root / "train" / "dog").iterdir():
        file.unlink()


def mixed_sizes(root):
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(root / "train" / "dog" / "5.png")


def category_not_in_test(root):
    shutil.rmtree(root / "test" / "dog")


FOLDER = ["--config.dataset.name=image_folder", "--config.dataset.path={folder}", "--config.dataset.train_examples=32"]
CIFAR = ["--config.dataset.name=cifar100", "--config.dataset.data_dir={empty}", "--config.dataset.train_examples=100"]
# name -> (arguments after those of `small_run`, words that the message must hold, change to the image folder)
BAD_INPUT = {
    "no config": (["--config="], ["--config=RECIPE must name a file"], None),
    "missing config file": (["--config=configs/nothing.py"], ["configs/nothing.py"], None),
    "unknown method": ([f"--config={ROOT}/configs/digits.py:cskdd"], ["cskdd", "did you mean cskd?"], None),
    "unknown key": (["--config.batchsize=3"], ["batchsize", "did you mean batch_size"], None),
    "unknown loss": (["--config.losses.crossentropy.weight=1"], ["losses.crossentropy.weight"], None),
    "wrong type": (["--config.epochs=many"], ["epochs", "many"], None),
    "no truth value": (["--config.augment.flip=maybe"], ["augment.flip", "maybe"], None),
    "zero epochs": (["--config.epochs=0"], ["epochs is 0", "from 1"], None),
    "negative learning rate": (
        ["--config.optimizer.learning_rate=-1"],
        ["learning_rate is -1", "greater than 0"],
        None,
    ),
    "unordered milestones": (["--config.optimizer.milestones=(9,3)"], ["milestones", "(9, 3)", "increasing"], None),
    "unknown flag": (["--epochs=3"], ["unknown flag --epochs; did you mean --config.epochs=3?"], None),
    "argument without dashes": (
        ["epochs=3"],
        ["epochs=3 is missing its dashes; did you mean --config.epochs=3?"],
        None,
    ),
    "unknown model": (["--config.student.name=resnet19"], ["student.name is 'resnet19'", "resnet18"], None),
    "unknown data set": (["--config.dataset.name=digitz"], ["digitz", "digits", "image_folder"], None),
    "batch and devices": (["--config.batch_size=60"], ["batch_size is 60", "8 devices"], None),
    "last batch and devices": (["--config.dataset.train_examples=150"], ["last batch", "22", "drop_last"], None),
    "batch larger than the data": (["--config.batch_size=512"], ["512", "192"], None),
    "method as a key": (["--config.method=kd"], ["--config=RECIPE:METHOD"], None),
    "loss of another method": (["--config.losses.kd.weight=1"], ["no kd", "category_structure"], None),
    "weight that is no number": (
        ["--config.losses.category_structure.inter_weight=nan"],
        ["inter_weight", "nan"],
        None,
    ),
    "width without channels": (["--config.student.width=0.001"], ["width 0.001"], None),
    "overlong path": (["--config.teacher.checkpoint=/tmp/" + 300 * "x"], ["name too long"], None),
    "no teacher": (["--config.teacher.name="], ["needs a teacher", "resnet18"], None),
    "no such teacher": (["--config.teacher.checkpoint=/no/such"], ["/no/such does not exist"], None),
    "no checkpoint there": (["--config.teacher.checkpoint={empty}"], ["no checkpoint in"], None),
    "teacher of other data": (
        [*FOLDER, "--config.teacher.checkpoint={done}/teacher", "--config.dataset.mean=(0.1,)"],
        ["3"],
        break_nothing,
    ),
    "teacher does not fit": (
        ["--config.teacher.checkpoint={done}/teacher", "--config.teacher.width=0.125"],
        ["0.25", "0.125"],
        None,
    ),
    "unknown variant": (["--config.losses.category_structure.variant=papr"], ["papr", "did you mean paper?"], None),
    "weight below zero": (["--config.losses.cross_entropy.weight=-1"], ["cross_entropy.weight is -1"], None),
    "float64 without x64": (["--config.dtype=float64"], ["JAX_ENABLE_X64"], None),
    "channels": (["--config.dataset.mean=(0.1,0.2)", "--config.dataset.std=(1.,1.)"], ["2 values", "1 channel"], None),
    "too many examples": (["--config.dataset.train_examples=5000"], ["5000"], None),
    "other run's workdir": (["--workdir={done}"], ["another configuration", "seed 0 != 1"], None),
    "workdir cannot be written to": (["--workdir=/sys/kernel"], ["cannot write to workdir /sys/kernel"], None),
    "coordinator alone": (["--coordinator=localhost:1234"], ["given together"], None),
    "coordinator without port": (
        ["--coordinator=here", "--processes=2", "--process=0"],
        ["must be HOST:PORT; got here"],
        None,
    ),
    "process beyond the last": (
        ["--coordinator=localhost:1234", "--processes=2", "--process=2"],
        ["from 0 to --processes - 1 = 1; got 2"],
        None,
    ),
    "workdir is a file": (["--workdir={file}"], ["file is a file, not a folder"], None),
    "no path": (["--config.dataset.name=image_folder"], ["path"], None),
    "corrupt image": (FOLDER, ["train/cat/3.png"], corrupt_image),
    "empty category": (FOLDER, ["dog"], empty_category),
    "mixed sizes": (FOLDER, ["train/dog/5.png"], mixed_sizes),
    "category not in test": (FOLDER, ["dog", "test"], category_not_in_test),
    "damaged archive": (CIFAR, ["cifar-100-binary.tar.gz"], None),
    "image size": (
        [*FOLDER, "--config.dataset.mean=(0.1,0.2)", "--config.dataset.std=(1.,1.)"],
        ["3 channels"],
        break_nothing,
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, done, small_run, tmp_path, capsys):
    arguments, words, change = BAD_INPUT[case]
    empty, file, folder = tmp_path / "empty", tmp_path / "file", tmp_path / "folder"
    empty.mkdir()
    file.touch()
    (empty / "cifar-100-binary.tar.gz").write_bytes(b"not an archive")
    if change is not None:
        change(image_folder(folder))
    arguments = [a.format(done=done, empty=empty, file=file, folder=folder) for a in arguments]
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    workdir = [] if any(a.startswith("--workdir") for a in arguments) else [f"--workdir={tmp_path / 'run'}"]
    # A later --config would be the second of two: replaced instead.
    recipe = [a for a in arguments if a.startswith("--config=")] or small_run[:1]
    rest = [a for a in [*small_run[1:], *arguments] if not a.startswith("--config=")]
    code = main(["main", *recipe, *rest, "--config.seed=1", *workdir])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2, error
    assert error.startswith("error: "), error
    for word in words:
        assert word in error, error
    assert before == {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}, "something was lost"


def test_two_jobs_in_one_workdir(small_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "LOCAL_PATIENCE_SECONDS", 0)
    with lock.locked(tmp_path / "lock", ""):
        assert main(["main", *small_run, f"--workdir={tmp_path}"]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["lock"], "that of the other job"
    assert f"another job is running in workdir {tmp_path}" in capsys.readouterr().err
