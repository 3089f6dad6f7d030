"""Multi-label runs: what does not fit is an error before anything compiles; a whole small run and its results."""

import json

import numpy as np
import optax
import pytest
from sklearn.metrics import average_precision_score

from cskd_jax.data import ImageDataset, Split, load_dataset
from cskd_jax.data.augment import Normalize
from cskd_jax.distributed.devices import Devices
from cskd_jax.errors import UserError
from cskd_jax.losses import LOSSES
from cskd_jax.models import create_model
from cskd_jax.runs.build import describe_network, make_evaluation, make_network
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.runs.trained import check_fits
from cskd_jax.training.checkpoint import load_variables
from cskd_jax.training.checks import check_losses
from cskd_jax.training.objective import Objective
from cskd_jax.training.phases import Phase
from cskd_jax.training.saved import Record, Saved
from cskd_jax.training.teachers import Teacher
from cskd_jax.training.trainer import Student, Trainer
from tests.conftest import ROOT

SMALL = [
    "--config.dataset.train_examples=128",
    "--config.teacher.name=resnet8",
    "--config.teacher.width=0.25",
    "--config.teacher.epochs=1",
    "--config.student.name=resnet8",
    "--config.student.width=0.25",
]


def black(multilabel, count=64):
    labels = np.arange(count, dtype=np.int32) % 10
    split = Split(np.zeros((count, 8, 8, 1), np.uint8), np.eye(10, dtype=np.float32)[labels] if multilabel else labels)
    return ImageDataset("black", split, split, tuple("0123456789"))


@pytest.mark.parametrize(
    "name", [name for name, method in LOSSES.items() if method.multilabel is not None or method.softmax]
)
def test_methods_for_other_labels(name):
    multilabel = not LOSSES[name].multilabel
    network = create_model("resnet8", num_classes=10, width=0.25)
    kind = r"any number of classes \(multi-label\)" if multilabel else "one class"
    fitting = "binary_cross_entropy, binary_kd" if multilabel else "abkd, category_structure, crd, cross_entropy"
    text = f"^losses.{name} does not work with data set 'black', whose images have {kind} each: .* are {fitting}"
    losses = {"mse_logits": {"weight": 1.0}, name: {"weight": 1.0}}
    with pytest.raises(UserError, match=text):
        Trainer(
            {"student": Student(network, losses, optax.sgd(0.1))},
            [Teacher(network)],
            data=black(multilabel),
            batch_size=64,
            phases=[Phase(1)],
        )


@pytest.mark.parametrize(
    ("name", "settings"),
    [("at", {}), ("mse_logits", {}), ("simkd", {}), *((name, {"kd_weight": 0.0}) for name in ("srd", "vkd"))],
)
def test_methods_without_a_softmax_are_for_any_labels(name, settings):
    for multilabel in (False, True):
        check_losses(Objective.create({name: settings}, num_classes=10), black(multilabel))


@pytest.mark.parametrize("name", ["kd", "lskd", "dist", "ttm", "wttm", "abkd", "luminet", "srd", "vkd", "deit", "mlkd"])
def test_methods_with_a_softmax_are_for_one_class(name):
    objective = Objective.create({name: 1.0}, num_classes=10)
    assert not objective.losses[name][1].reads_labels
    check_losses(objective, black(multilabel=False))
    with pytest.raises(
        UserError, match=rf"^losses.{name} does not work with .* are binary_cross_entropy, binary_kd, .*; losses that"
    ):
        check_losses(objective, black(multilabel=True))


@pytest.mark.parametrize("multilabel", [False, True])
def test_teacher_of_other_labels(multilabel):
    # Checkpoints that do not say are of one class per image.
    values = {"network": {"name": "resnet8", "width": 1.0}, "channels": 1, "categories": list("0123456789")}
    wrong = Record.from_json(values if multilabel else values | {"multilabel": True})
    right = Record.from_json(values | {"multilabel": multilabel})
    one, several = "one class per image", "several classes per image"
    trained, needed = (one, several) if multilabel else (several, one)
    with pytest.raises(UserError, match=f"runs/teacher was trained with {trained}, but black has {needed}"):
        check_fits("runs/teacher", Saved({}, wrong, 1, ""), black(multilabel))
    check_fits("runs/teacher", Saved({}, right, 1, ""), black(multilabel))


@pytest.fixture(scope="module")
def done(start, tmp_path_factory):
    """Workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("multilabel") / "run"
    arguments = [f"--config={ROOT}/configs/digit_pairs.py", *SMALL, "--config.epochs=3", f"--workdir={workdir}"]
    output, error = (process := start(arguments)).communicate()
    assert process.returncode == 0, error
    assert "last mean average precision 0." in output.splitlines()[-2]
    assert "top-1" not in output
    return workdir


@pytest.mark.slow
def test_results(done):
    results = json.loads((done / "results.json").read_text())
    for phase in ("teacher", "student"):
        last, best = (results[phase][name] for name in ("last", "best"))
        assert last.keys() == {"epoch", "mean_average_precision", "loss"}
        assert best["mean_average_precision"] >= last["mean_average_precision"]
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["phase"] == "student" and row["split"] == "train"]
    names = {"mean_average_precision", "binary_kd", "multilabel_category_structure/intra_feature", "learning_rate"}
    assert names <= train[0].keys()
    assert "top1" not in train[0]


@pytest.mark.slow
def test_evaluation_on_eight_devices_is_that_of_scikit_learn(done):
    """The run evaluated on one device; the number of test images does not divide by the batch."""
    config, dataset = load_recipe("digit_pairs", []), load_dataset("digit_pairs")
    config.student.update(name="resnet8", width=0.25)
    variables = load_variables(str(done / "student")).variables
    devices = Devices()
    network = make_network(describe_network(config.student, dataset.image_shape), 10, config.dtype)
    values = make_evaluation(network, config, dataset, devices)(devices.replicate(variables))
    expected = json.loads((done / "results.json").read_text())["student"]["last"]
    for name in ("mean_average_precision", "loss"):
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-4)
    images = Normalize(config.dataset.mean, config.dataset.std)(dataset.test.images)
    logits = network.module.clone(axis_name=None).apply(variables, images, train=False).logits
    np.testing.assert_allclose(
        values["mean_average_precision"],
        average_precision_score(dataset.test.labels, logits, average="macro"),
        rtol=1e-3,
    )


@pytest.mark.exhaustive
@pytest.mark.slow
def test_teacher_checkpoint_and_a_run_without_a_teacher(done, start, tmp_path):
    for word, teacher in (("bkd", [f"--config.teacher.checkpoint={done}/teacher"]), ("bce", [])):
        arguments = [f"--config={ROOT}/configs/digit_pairs.py:{word}", *SMALL, *teacher, "--config.epochs=1"]
        _, error = (process := start([*arguments, f"--workdir={tmp_path / word}"])).communicate()
        assert process.returncode == 0, error
        results = json.loads((tmp_path / word / "results.json").read_text())
        assert (results["teacher"] is None) == (word == "bce")
        if teacher:
            expected = json.loads((done / "results.json").read_text())["teacher"]["last"]
            assert results["teacher"]["last"]["mean_average_precision"] == expected["mean_average_precision"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_digits_recipe_with_multilabel_data(start, small_run, tmp_path):
    arguments = [*small_run, "--config.dataset.name=digit_pairs", f"--workdir={tmp_path}"]
    _, error = (process := start(arguments)).communicate()
    assert process.returncode == 2
    assert error.splitlines()[-1].startswith(
        "error: losses.category_structure does not work with data set 'digit_pairs'"
    )
