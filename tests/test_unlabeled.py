"""Training on images without labels: which losses take them, what is measured, and fine-tuning afterwards."""

import json
import re
import shutil

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
from PIL import Image

import cskd_jax
from cskd_jax.__main__ import main
from cskd_jax.errors import UserError
from cskd_jax.interop.names import to_torch
from cskd_jax.models import create_model
from cskd_jax.runs.recipes import load_recipe
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


@pytest.mark.exhaustive
@pytest.mark.slow
def test_label_free_resumes_bit_for_bit(tmp_path):
    losses = {"vkd": {"weight": 1.0, "kd_weight": 0.0}, "smooth_l1": 0.1}
    whole = train(losses, epochs=3).variables
    train(losses, epochs=1, workdir=tmp_path / "run")
    again = train(losses, epochs=3, workdir=tmp_path / "run").variables
    jax.tree.map(np.testing.assert_array_equal, again, whole)


@pytest.mark.slow
def test_positions_are_unknown_where_a_function_makes_the_batches():
    seen = []

    class Remembers(cskd_jax.Method):
        def __call__(self, inputs):
            seen.append(inputs.indices)
            return jax.numpy.mean(inputs.student.logits**2), {}

    def batches(epoch):
        del epoch
        return ((PIXELS[start : start + 8], None) for start in range(0, 24, 8))

    train({"own": Remembers}, batches)
    assert seen[-1] is None


@pytest.mark.parametrize("loss", ["cross_entropy", "dkd", "category_structure", "crd", "ofa"])
def test_losses_that_read_labels_are_refused(loss):
    message = f"losses.{loss} reads labels, but the training images have none: losses that read none are ab, abkd"
    with pytest.raises(UserError, match=re.escape(message)):
        train({loss: 1.0})


def test_what_reads_labels_may_depend_on_the_settings():
    with pytest.raises(UserError, match=r"losses.ctkd reads labels, .*: losses that read none are .*\bcosine, d"):
        train({"ctkd": {"weight": 1.0, "variant": "dkd"}})


@pytest.mark.parametrize("name", ["test", "validation"])
def test_other_splits_need_labels(name):
    with pytest.raises(UserError, match=f"{name} needs labels to evaluate the students with"):
        train({"cosine": 1.0}, **{name: (PIXELS, None)})


@pytest.fixture
def folder(tmp_path):
    """Image folder of two classes, with unlabeled images for training."""
    rng = np.random.default_rng(0)
    for place in (*(f"train/{n}" for n in range(16)), *(f"test/{name}/{n}" for name in "ab" for n in range(4))):
        path = tmp_path / "images" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    return tmp_path / "images"


def _recipe(word, folder, teacher, *more):
    keys = {"dataset.name": "image_folder", "dataset.path": folder, "batch_size": 8, "epochs": 1}
    keys |= {"dataset.mean": "(0.5,)", "dataset.std": "(0.3,)", "student.name": "resnet8", "student.width": 0.25}
    keys |= {"teacher.checkpoint": teacher}
    return load_recipe(f"digits:{word}", [*(f"--config.{key}={keys[key]}" for key in keys), *more])


def _imported(tmp_path, name, **settings):
    """Returns the folder of an imported teacher with random weights, and what a recipe says of it."""
    module = create_model(name, width=0.25, **settings)
    variables = jax.device_get(module.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32), train=False))
    file, folder = tmp_path / f"{name}.safetensors", tmp_path / name
    safetensors.numpy.save_file(to_torch(module, variables, batches=1), file)
    words = [str(file), f"--model={name}", "--width=0.25", f"--num_classes={settings['num_classes']}"]
    assert main(["cskd-jax", "import-torch", *words, f"--out={folder}"]) == 0
    return folder, (f"--config.teacher.name={name}", "--config.teacher.width=0.25")


@pytest.fixture
def resnet(tmp_path):
    """A teacher of ten classes."""
    return _imported(tmp_path, "resnet8", num_classes=10)


@pytest.mark.slow
def test_a_recipe_whose_teacher_has_other_classes(folder, resnet, tmp_path, capsys):
    """A teacher of ten classes teaches its features to a student of two classes, and is shown without a score."""
    cskd_jax.run(_recipe("cosine", folder, resnet[0], *resnet[1]), workdir=tmp_path / "run")
    assert f"resnet8, width 0.25, from {resnet[0]}, of other classes" in capsys.readouterr().out
    assert "last" not in json.loads((tmp_path / "run" / "results.json").read_text())["teacher"]
    assert main(["cskd-jax", "report", str(tmp_path / "run"), f"--out={tmp_path / 'report'}"]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| teacher resnet8_0.25 |" in page, "its size"
    assert "| teacher | 1 |" in page, "its tightness, but no score"
    assert page.count("| teacher | ") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("word", "reads"), [("kd", "the logits"), ("simkd", "the classifier")])
def test_classes_that_a_loss_reads_are_those_of_the_data(word, reads, folder, resnet, tmp_path):
    labeled = shutil.copytree(folder, tmp_path / "labeled", ignore=shutil.ignore_patterns("*.png"))
    shutil.copytree(folder / "test", labeled / "train", dirs_exist_ok=True)
    shutil.copytree(folder / "test", labeled / "test", dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"losses.{word}: it reads {reads} of the teacher, which has other classes"):
        cskd_jax.run(_recipe(word, labeled, resnet[0], *resnet[1]), workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_teacher_without_a_head(folder, tmp_path):
    """A Vision Transformer without a classifier, as self-supervised ones are, teaches from a recipe and in Python."""
    settings = {"patch_size": 4, "image_size": (8, 8), "depth": 1}
    teacher, network = _imported(tmp_path, "deit_tiny", num_classes=0, settings=settings)
    found = cskd_jax.run(_recipe("cosine", folder, teacher, *network), workdir=tmp_path / "run")
    assert "last" not in found.results["teacher"]
    pixels = RNG.integers(0, 256, (16, 8, 8, 3), np.uint8)
    cskd_jax.distill(
        Net(),
        teacher=cskd_jax.load_teacher(teacher),
        losses={"cosine": 1.0},
        optimizer=optax.sgd(0.05),
        train=(pixels, None),
        test=(pixels, np.arange(16) % 3),
        epochs=1,
        batch_size=8,
        callbacks=(),
    )


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
