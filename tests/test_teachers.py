"""Several teachers as one, losses that name their teacher, and the moving average of the student as its teacher."""

import collections
import json
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import cskd_jax
from cskd_jax import Teacher
from cskd_jax.data.arrays import from_arrays
from cskd_jax.data.augment import Normalize
from cskd_jax.errors import UserError
from cskd_jax.losses import LOSSES, cross_entropy_loss, kd_loss
from cskd_jax.models import create_model
from cskd_jax.runs import schema
from cskd_jax.runs.optimization import make_training
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training.adapters import as_network
from cskd_jax.training.normalization import ResizedNetwork
from cskd_jax.training.optimizers import SeparateOptimizer
from cskd_jax.training.teachers import ForeignTeacher, network_of, variables_of
from tests.tiny import Net

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 24).astype(np.int32)
PIXELS = RNG.integers(0, 256, (24, 8, 8, 1), np.uint8)
INPUTS = (RNG.normal(size=(5, 8, 8, 1))).astype(np.float32)


def teacher(seed, width=4, **settings):
    network = Net(width)
    return Teacher(network, network.init(jax.random.key(seed), INPUTS), **settings)


def logits_of(one, images=INPUTS):
    return np.asarray(one.network.apply(one.variables, images)["logits"], np.float64)


def outputs(teachers, images=INPUTS, given=None, **settings):
    network = network_of(teachers, given, **settings)
    return network.apply(variables_of(teachers), images, train=False)[0]


def assert_close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_mean_of_logits():
    teachers = [teacher(0), teacher(1, width=6, weight=3)]
    found = outputs(teachers)
    expected = [logits_of(one) for one in teachers]
    np.testing.assert_allclose(found.logits, 0.25 * expected[0] + 0.75 * expected[1], rtol=1e-5, atol=1e-6)
    for member, logits in zip(found.members, expected, strict=True):
        np.testing.assert_allclose(member.logits, logits, rtol=1e-5, atol=1e-6)
    assert [member.features[0].shape[-1] for member in found.members] == [4, 6]


def test_mean_of_probabilities():
    teachers = [teacher(0), teacher(1), teacher(2, weight=0.0)]
    found = outputs(teachers, combine="probabilities").logits
    expected = (softmax(logits_of(teachers[0])) + softmax(logits_of(teachers[1]))) / 2
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-5)


def test_mean_of_probabilities_of_several_classes():
    teachers = [teacher(0), teacher(1, weight=2.0)]
    found = outputs(teachers, combine="probabilities", multilabel=True).logits
    first, second = (1 / (1 + np.exp(-logits_of(one))) for one in teachers)
    np.testing.assert_allclose(1 / (1 + np.exp(-np.asarray(found))), (first + 2 * second) / 3, rtol=1e-5)


def test_probabilities_of_sure_teachers_are_finite():
    sure = jax.tree.map(lambda x: 1e4 * x, teacher(0).variables)
    for multilabel in (False, True):
        found = outputs([Teacher(Net(), sure), teacher(1)], combine="probabilities", multilabel=multilabel)
        assert np.isfinite(found.logits).all()


def test_each_has_its_normalization_and_size():
    own = Normalize((0.2,), (0.5,))
    teachers = [teacher(0, normalization=own), teacher(1, image_size=4)]
    found = outputs(teachers, given=Normalize((0.5,), (0.25,))).members
    images = ((INPUTS * 0.25 + 0.5) - 0.2) / 0.5
    np.testing.assert_allclose(found[0].logits, logits_of(teachers[0], images), rtol=1e-5, atol=1e-5)
    smaller = jax.image.resize(INPUTS, (5, 4, 4, 1), "linear")
    np.testing.assert_allclose(found[1].logits, logits_of(teachers[1], smaller), rtol=1e-5, atol=1e-5)
    assert found[1].features[0].shape[1:3] == (2, 2)


@pytest.mark.slow
def test_a_resized_network_is_made_for_its_size():
    settings = {"image_size": (16, 16), "patch_size": 8, "depth": 1}
    vit = as_network(create_model("deit_tiny", num_classes=3, width=1 / 16, settings=settings))
    resized = ResizedNetwork(vit, 16)
    variables, _ = resized.init(jax.random.key(0), (8, 8, 3))
    assert resized.apply(variables, jnp.zeros((2, 8, 8, 3)), train=False)[0].logits.shape == (2, 3)


def train(losses, teachers=None, epochs=2, **settings):
    defaults = {"optimizer": optax.sgd(0.1), "mean": (0.5,), "std": (0.25,), "batch_size": 8, "devices": 1}
    data = {"train": (PIXELS, LABELS), "test": (PIXELS, LABELS)}
    settings = defaults | data | {"callbacks": ()} | settings
    return cskd_jax.distill(Net(4), losses={"cross_entropy": 1.0} | losses, teacher=teachers, epochs=epochs, **settings)


@pytest.mark.slow
def test_a_loss_reads_the_teacher_that_it_names():
    """The other teachers then change nothing."""
    teachers = [teacher(0), teacher(1, width=6)]
    for number, one in enumerate(teachers):
        alone = train({"kd": 1.0}, one.network, teacher_variables=one.variables)
        for name in (number, str(number)):
            named = train({"kd": {"weight": 1.0, "teacher": name}}, teachers)
            assert_close(named.variables, alone.variables)


@pytest.mark.slow
def test_all_teachers_teach_as_one():
    teachers = [teacher(0), teacher(1, weight=3.0)]

    def mean(variables, images, train, rngs):
        del train, rngs
        first, second = (Net().apply(variables[name], images)["logits"] for name in ("first", "second"))
        return 0.25 * first + 0.75 * second, {}

    variables = {"first": teachers[0].variables, "second": teachers[1].variables}
    expected = train({"kd": 1.0}, mean, teacher_variables=variables)
    assert_close(train({"kd": 1.0}, teachers).variables, expected.variables)


@pytest.mark.slow
def test_a_loss_of_ones_own_reads_the_teacher_that_it_names():
    teachers = [teacher(0), teacher(1, width=6)]
    expected = train({"kd": {"weight": 1.0, "teacher": 1}}, teachers).variables
    assert_close(train({"kd": LOSSES["kd"](num_classes=0, teacher=1)}, teachers).variables, expected)

    def loss(inputs):
        return kd_loss(inputs.student.logits, inputs.teacher.members[1].logits)

    assert_close(train({"mine": loss}, teachers).variables, expected)


@pytest.mark.slow
def test_features_of_the_named_teacher():
    losses = {"fitnet": {"weight": 1.0, "teacher": 1, "stage": 1}, "cross_entropy": 1.0}
    teachers = [teacher(0), teacher(1, width=6)]
    found = train(losses, teachers, epochs=1)
    losses["fitnet"] = {"weight": 1.0, "stage": 1}
    assert_close(found.variables, train(losses, teachers[1], epochs=1).variables)


@pytest.mark.slow
def test_a_single_teacher_with_its_settings():
    one = teacher(0, normalization=Normalize((0.2,), (0.5,)))
    network, variables = one.network, one.variables
    expected = train({"kd": 1.0}, network, teacher_variables=variables, teacher_mean=(0.2,), teacher_std=(0.5,))
    assert_close(train({"kd": 1.0}, one).variables, expected.variables)


@pytest.mark.slow
def test_load_teacher(done):
    """A checkpoint as a teacher knows its normalization."""
    loaded = cskd_jax.load_teacher(done / "teacher")
    assert loaded.normalization == Normalize((0.3055,), (0.3766,))
    assert loaded.image_size is None
    assert loaded.network.apply(loaded.variables, INPUTS, train=False)[0].logits.shape == (5, 10)
    with pytest.raises(UserError, match="no checkpoint in"):
        cskd_jax.load_teacher(done)


@pytest.mark.slow
def test_teachers_of_different_classes_are_not_combined():
    teachers = [teacher(0), Teacher(Net(classes=5), Net(classes=5).init(jax.random.key(1), INPUTS))]
    losses = {"kd": {"weight": 1.0, "teacher": 0}, "cosine": {"weight": 1.0, "teacher": 1}}
    train(losses, teachers, epochs=1)
    with pytest.raises(UserError, match="losses.kd: it reads the logits of the teacher, but there are several: choose"):
        train({"kd": 1.0}, teachers)
    foreign = Teacher(ForeignTeacher(as_network(teachers[1].network)), teachers[1].variables)
    train(losses, [teachers[0], foreign], epochs=1)
    with pytest.raises(UserError, match="losses.kd: it reads the logits of the teacher, which has other classes"):
        train({"kd": {"weight": 1.0, "teacher": 1}}, [teachers[0], foreign])


@pytest.mark.slow
def test_a_teacher_in_one_phase_and_the_average_in_another():
    one, average = teacher(0), {"kd": {"weight": 1.0, "teacher": "average"}}
    trainer = cskd_jax.Trainer(
        {"net": cskd_jax.Student(Net(), {"kd": 1.0}, optax.sgd(0.1), ema=0.9)},
        [one],
        data=from_arrays((INPUTS, LABELS[:5]), (INPUTS, LABELS[:5])),
        phases=[cskd_jax.Phase(1, losses=average), cskd_jax.Phase(1)],
        batch_size=5,
        devices=1,
        callbacks=(),
    )
    rows = [row for row in trainer.fit()["net"].history if row["split"] == "train"]
    assert rows[0]["kd"] == pytest.approx(0, abs=1e-6), "the average is the student itself at first"
    assert all(row["kd"] > 0 for row in rows[1:])


def test_dot_parts_the_gradient_of_the_average():
    overrides = ["losses.kd.teacher=average", "optimizer.ema_decay=0.99", "optimizer.name=dot"]
    config = load_recipe("digits:kd", [f"--config.{override}" for override in overrides])
    assert isinstance(make_training(config, 3).optimizer, SeparateOptimizer)


def test_parameters_that_are_no_dictionary():
    """A function may keep its parameters as it likes."""
    Parameters = collections.namedtuple("Parameters", ["kernel", "bias"])

    def apply(variables, images, train, rngs):
        del train, rngs
        return images.reshape(len(images), -1) @ variables["params"].kernel + variables["params"].bias, {}

    start = {"params": Parameters(jnp.zeros((64, 3)), jnp.zeros(3))}
    settings = {"train": (INPUTS, LABELS[:5]), "test": (INPUTS, LABELS[:5]), "batch_size": 5, "devices": 1}
    result = cskd_jax.distill(
        apply,
        student_variables=start,
        losses={"cross_entropy": 1.0},
        optimizer=optax.sgd(0.1),
        callbacks=(),
        epochs=1,
        **settings,
    )
    assert np.any(result.variables["params"].kernel)


@pytest.mark.parametrize("value", [1, "1"])
def test_a_number_in_a_recipe_file(value):
    config = load_recipe("digits:kd", ["--config.teacher.checkpoint=a", "--config.teacher.others=('b',)"])
    losses = config.losses.to_dict()
    losses["kd"]["teacher"] = value
    config.losses = ml_collections.ConfigDict(losses)
    schema.validate(schema.fill(config))
    assert config.losses.kd.teacher == "1"


@pytest.mark.slow
def test_on_two_devices():
    teachers = [teacher(0), teacher(1, width=6, image_size=12)]
    losses = {"kd": 1.0, "rkd": {"weight": 1.0, "teacher": 1}}
    one, two = (train(losses, teachers, devices=devices).variables for devices in (1, 2))
    assert_close(one, two)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_several_teachers_resume_bit_for_bit(tmp_path):
    teachers = [teacher(0, weight=2.0), teacher(1, width=6, image_size=12)]
    losses = {"kd": 1.0, "rkd": {"weight": 1.0, "teacher": 1}}
    whole = train(losses, teachers, epochs=3).variables
    train(losses, teachers, epochs=1, workdir=tmp_path / "run")
    again = train(losses, teachers, epochs=3, workdir=tmp_path / "run").variables
    jax.tree.map(np.testing.assert_array_equal, again, whole)


@pytest.mark.parametrize(
    ("losses", "teachers", "settings", "message"),
    [
        (
            {"fitnet": 1.0},
            2,
            {},
            "there are several: choose one with the teacher setting of the loss, a number from 0 to 1",
        ),
        ({"simkd": {"weight": 1.0, "teacher": 0}}, 2, {}, "which works only with a single teacher"),
        ({"kd": {"teacher": 2}}, 2, {}, "losses.kd: it has teacher=2; the teachers are numbered from 0 to 1"),
        ({"kd": {"teacher": 1}}, 1, {}, "losses.kd: it has teacher=1; the teachers are numbered from 0 to 0"),
        (
            {"kd": {"teacher": -1}},
            2,
            {},
            "losses.kd.teacher is -1; it must be 'average', None, or the number of a teacher",
        ),
        ({"kd": {"teacher": "mean"}}, 2, {}, "losses.kd.teacher is 'mean'; it must be 'average', None, or the number"),
        ({"kd": {"teacher": 0}}, 0, {}, "losses.kd needs a teacher"),
        ({"kd": {"teacher": "average"}}, 0, {}, "learns from the moving average of the student, but none is kept"),
        (
            {"kd": 1.0},
            2,
            {"combine_teachers": "votes"},
            "combine_teachers is 'votes'; it must be logits or probabilities",
        ),
        (
            {"kd": 1.0},
            2,
            {"teacher_mean": (0.1,)},
            "teacher_mean or teacher_std applies to a teacher that is a network",
        ),
        ({"kd": 1.0}, 2, {"teacher_head": "Dense_0"}, "teacher_head applies to a teacher that is a network"),
    ],
)
def test_wrong_teachers(losses, teachers, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train(losses, [teacher(seed) for seed in range(teachers)] or None, **settings)


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ([], "several teachers must be a non-empty list of Teacher(network, variables)"),
        ([Net(), Net()], "several teachers must be a non-empty list of Teacher(network, variables)"),
        ([teacher(0), Teacher(Net())], "one of several teachers has no variables"),
        ([teacher(0, weight=-1), teacher(1)], "the weights of the teachers are [-1, 1.0]; they must be at least 0"),
        ([teacher(0, weight=0), teacher(1, weight=0)], "and not all of them 0"),
        ([teacher(0, image_size=0)], "the image_size of a teacher is 0; it must be a positive integer"),
    ],
)
def test_teachers_that_are_none(teachers, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train({"kd": 1.0}, teachers)


def test_a_normalization_of_floats():
    floats = {"train": (INPUTS, LABELS[:5]), "test": (INPUTS, LABELS[:5]), "mean": 0.0, "std": 1.0}
    with pytest.raises(UserError, match="a teacher with its own normalization needs uint8 images"):
        train({"kd": 1.0}, [teacher(0, normalization=Normalize((0.2,), (0.5,)))], batch_size=5, **floats)


@pytest.mark.slow
def test_the_moving_average_teaches():
    """Three steps of a student that its average teaches, by hand."""
    decay, images = 0.5, jnp.asarray((PIXELS / 255 - 0.5) / 0.25, jnp.float32)
    start = moved = average = Net().init(jax.random.key(5), images)
    losses = {"kd": {"weight": 2.0, "teacher": "average", "temperature": 2.0}}
    found = train(losses, epochs=3, ema=decay, student_variables=start, batch_size=24)
    for _ in range(3):
        target = Net().apply(average, images)["logits"]

        def loss(variables, target=target):
            logits = Net().apply(variables, images)["logits"]
            return cross_entropy_loss(logits, LABELS) + 2 * kd_loss(logits, target, temperature=2.0)

        moved = jax.tree.map(lambda x, gradient: x - 0.1 * gradient, moved, jax.grad(loss)(moved))
        average = jax.tree.map(lambda a, x: decay * a + (1 - decay) * x, average, moved)
    assert_close(found.variables, average)
    without = train({}, epochs=3, ema=decay, student_variables=start, batch_size=24)
    kernels = [run.variables["params"]["Dense_0"]["kernel"] for run in (found, without)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


@pytest.mark.slow
def test_the_moving_average_of_the_global_batch_and_of_a_resumed_run(tmp_path):
    losses = {"rkd": {"weight": 1.0, "teacher": "average"}}
    one, two = (train(losses, ema=0.9, devices=devices).variables for devices in (1, 2))
    assert_close(one, two)
    train(losses, ema=0.9, epochs=1, workdir=tmp_path / "run")
    resumed = train(losses, ema=0.9, workdir=tmp_path / "run").variables
    jax.tree.map(np.testing.assert_array_equal, resumed, train(losses, ema=0.9).variables)
    settings = json.loads((tmp_path / "run" / "distillation.json").read_text())
    assert settings["losses"]["rkd"]["teacher"] == "average"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_micro_batches_and_views():
    losses = {"mlkd": {"weight": 1.0, "teacher": "average"}}
    train(
        losses,
        ema=0.9,
        accumulation_steps=2,
        epochs=1,
        train=(PIXELS.repeat(3, -1), LABELS),
        test=(PIXELS.repeat(3, -1), LABELS),
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.others=('a',)"], "teacher.others adds to teacher.checkpoint, which is None"),
        (
            ["teacher.checkpoint=a", "teacher.others=b"],
            "teacher.others is 'b'; it must be non-empty strings in parentheses",
        ),
        (
            ["teacher.checkpoint=a", "teacher.others=(1,)"],
            "teacher.others is (1,); it must be non-empty strings in parentheses",
        ),
        (["teacher.weights=(1,2)"], "teacher.weights is (1, 2); it must have as many values as there are teachers, 1"),
        (["teacher.weights=(0,)"], "teacher.weights is (0,); it must be non-negative numbers"),
        (
            ["teacher.image_sizes=(8,8)"],
            "teacher.image_sizes is (8, 8); it must have as many values as there are teachers, 1",
        ),
        (["teacher.image_sizes=(8,)"], "teacher.image_sizes applies only to given teachers"),
        (["teacher.combine=vote"], "teacher.combine is 'vote'; it must be one of logits, probabilities"),
        (["losses.kd.teacher=1"], "losses.kd.teacher is 1; the teachers are numbered from 0 to 0"),
        (["losses.kd.teacher=mine"], "losses.kd.teacher is 'mine'; it must be average, or the number of a teacher"),
        (["losses.kd.teacher=average"], "set optimizer.ema_decay, for example to 0.99"),
        (["losses.cross_entropy.teacher=0"], "unknown configuration key losses.cross_entropy.teacher"),
    ],
)
def test_wrong_configurations(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        schema.validate(load_recipe("digits:kd", [f"--config.{override}" for override in overrides]))


def test_a_student_of_its_average_needs_no_teacher():
    overrides = ["losses.kd.teacher=average", "optimizer.ema_decay=0.99", "teacher.name="]
    schema.validate(load_recipe("digits:kd", [f"--config.{override}" for override in overrides]))


@pytest.mark.slow
def test_a_run_with_two_teachers(start, small_run, done, tmp_path):
    """Both teachers of a run on the command line, combined for one loss and named by another, and what it writes."""
    others = [f"--config.teacher.checkpoint={done}", f"--config.teacher.others=('{done / 'student'}',)"]
    named = ["--config.teacher.weights=(1,3)", "--config.losses.at.teacher=1", "--config.teacher.image_sizes=(0,16)"]
    recipe = [word.replace("digits.py", "digits.py:kd+at") for word in small_run]
    process = start([*recipe, *others, *named, "--config.epochs=1", f"--workdir={tmp_path / 'run'}"])
    output, error = process.communicate()
    assert process.returncode == 0, error
    entry = json.loads((tmp_path / "run" / "results.json").read_text())["teacher"]
    assert [member["weight"] for member in entry["members"]] == [1.0, 3.0]
    assert [member["checkpoint"] for member in entry["members"]] == [str(done / "teacher"), str(done / "student")]
    assert entry["parameters"] == sum(member["parameters"] for member in entry["members"])
    assert f"teacher 1: resnet8, width 0.25, from {done / 'student'}" in output
    assert "all 2 teachers combined: top-1" in output
    process = start([str(tmp_path)], program="cskd_jax.report")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert "resnet8_0.25 + resnet8_0.25" in (tmp_path / "report" / "report.md").read_text()
