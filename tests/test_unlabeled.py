"""Training on images without labels: which losses take them, what is measured, and fine-tuning afterwards."""

import json
import re

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import cskd_jax
from cskd_jax.errors import UserError
from tests.tiny import Net

RNG = np.random.default_rng(0)
PIXELS, LABELS = RNG.integers(0, 256, (24, 8, 8, 3), np.uint8), (np.arange(24) % 3).astype(np.int32)
TEACHER = Net(width=6, classes=5)


def train(losses, images=(PIXELS, None), **settings):
    variables = TEACHER.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    settings = {"epochs": 1, "batch_size": 8, "callbacks": (), "devices": 1, "test": (PIXELS, LABELS)} | settings
    settings |= {"mean": (0.5,), "std": (0.25,), "optimizer": optax.sgd(0.05), "losses": losses, "train": images}
    return cskd_jax.distill(Net(), teacher=TEACHER, teacher_variables=variables, **settings)


@pytest.mark.slow
def test_a_teacher_of_other_classes_teaches_without_labels():
    result = train({"cosine": 1.0, "smooth_l1": 0.1, "vkd": {"weight": 1.0, "kd_weight": 0.0}}, epochs=3)
    rows = [row for row in result.history if row["split"] == "train"]
    assert rows[-1]["cosine"] < rows[0]["cosine"]
    assert all("top1" not in row for row in rows)
    assert 0 <= result.metrics["test"]["top1"] <= 1


@pytest.mark.slow
def test_labels_change_nothing_for_losses_that_read_none():
    found, expected = (train({"cosine": 1.0}, (PIXELS, labels)).variables for labels in (None, LABELS))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_batches_of_a_function():
    def batches(epoch):
        del epoch
        return ((PIXELS[start : start + 8], None) for start in range(0, 24, 8))

    train({"cosine": 1.0}, batches)


@pytest.mark.slow
def test_label_free_on_two_devices():
    one, two = (train({"srd": {"weight": 1.0, "kd_weight": 0.0}}, devices=devices).variables for devices in (1, 2))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, two)


@pytest.mark.parametrize("loss", ["cross_entropy", "dkd", "category_structure", "crd", "ofa"])
def test_losses_that_read_labels_are_refused(loss):
    message = f"losses.{loss} reads labels, but the training images have none: losses that read none are ab, abkd"
    with pytest.raises(UserError, match=re.escape(message)):
        train({loss: 1.0})


@pytest.mark.parametrize("name", ["test", "validation"])
def test_other_splits_need_labels(name):
    with pytest.raises(UserError, match=f"{name} must be images .* and labels"):
        train({"cosine": 1.0}, **{name: (PIXELS, None)})


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_folder_then_neighbors_then_fine_tuning(start, tmp_path):
    """On the command line: a teacher, a student without labels, its embedding, and a student that starts from it."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for number, name in enumerate(("dark", "bright")):
            folder = tmp_path / "labeled" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 128, (8, 8, 3)) + 100 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    free = tmp_path / "free"
    (free / "train").mkdir(parents=True)
    (free / "test").symlink_to(tmp_path / "labeled" / "test")
    for number, file in enumerate(sorted((tmp_path / "labeled" / "train").glob("*/*"))):
        (free / "train" / f"{number}.png").symlink_to(file)
    common = ["--config.dataset.name=image_folder", "--config.batch_size=16", "--config.epochs=2"]
    common += ["--config.dataset.mean=(0.4,)", "--config.dataset.std=(0.3,)", "--config.optimizer.milestones=(1,)"]
    common += [f"--config.{role}.{key}" for role in ("teacher", "student") for key in ("name=resnet8", "width=0.25")]

    def run(word, folder, *more, program="cskd_jax.main", expected=0):
        arguments = [f"--config=digits:{word}", *common, f"--config.dataset.path={folder}", *more]
        output, error = (process := start(arguments, program=program)).communicate()
        assert process.returncode == expected, error
        return output, error

    labeled = tmp_path / "labeled"
    run("ce", labeled, f"--workdir={tmp_path / 'teacher'}")
    given = f"--config.teacher.checkpoint={tmp_path / 'teacher' / 'student'}"
    _, error = run("kd", free, given, f"--workdir={tmp_path / 'wrong'}", expected=2)
    assert "losses.cross_entropy reads labels, but the training images have none" in error
    _, error = run(
        "cosine", free, given, "--config.sampler.name=balanced", f"--workdir={tmp_path / 'wrong'}", expected=2
    )
    assert "sampler.name is balanced, but the training images have no labels: it must be uniform" in error
    output, _ = run("cosine", free, given, f"--workdir={tmp_path / 'student'}")
    assert "48 training and 16 test images, 2 classes" in output
    _, error = (process := start([str(tmp_path / "student"), "--embedding"], program="cskd_jax.evaluate")).communicate()
    assert process.returncode == 2
    assert "--embedding needs training images with labels: name a recipe that has them with --config" in error
    words = [str(tmp_path / "student"), "--embedding", f"--config.dataset.path={labeled}"]
    _, error = (process := start(words, program="cskd_jax.evaluate")).communicate()
    assert process.returncode == 0, error
    measured = json.loads((tmp_path / "student" / "evaluation.json").read_text())
    assert "knn" in json.dumps(measured)
    start_there = f"--config.student.checkpoint={tmp_path / 'student'}"
    output, _ = run("ce", labeled, start_there, f"--workdir={tmp_path / 'tuned'}")
    assert f"student: starts from {tmp_path / 'student' / 'student'}" in output
