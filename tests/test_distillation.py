"""`distill` and the trainer with networks, losses and optimizers of one's own, on one device and on two."""

import dataclasses
import json
import signal
import threading
from typing import Any, ClassVar, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cskd_jax
from cskd_jax.__main__ import main
from cskd_jax.data import ImageDataset, Split
from cskd_jax.distillation import _describe_loss
from cskd_jax.errors import InterruptedRun, UserError
from cskd_jax.losses import KD
from cskd_jax.training.checkpoint import Checkpoints, load_variables
from cskd_jax.training.objective import Objective
from cskd_jax.training.phases import make_parts
from tests.conftest import Stop
from tests.tiers import chosen

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.normal(size=(24, 4, 4, 1)).astype(np.float32), np.arange(24) % 3
TRAIN, TEST = (IMAGES[:16], LABELS[:16]), (IMAGES[16:], LABELS[16:])
UINT8 = {split: ((255 * (IMAGES > 0)).astype(np.uint8), LABELS) for split in ("train", "test")}
QUIET = {"train": TRAIN, "test": TEST, "batch_size": 8, "epochs": 2, "callbacks": (), "devices": 1}


class Net(nn.Module):
    """Dense layers, optionally with what depends on how a batch is split."""

    dropout: float = 0.0
    norm: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, name="hidden")(x.reshape(len(x), -1))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="head")(x)


def spread(inputs):
    """A loss that relates the samples of a batch."""
    logits = inputs.student.logits
    return jnp.mean(jnp.square(logits[:, None] - logits)) + 0 * jnp.mean(inputs.labels.astype(logits.dtype))


def distill(student, **settings):
    defaults = QUIET | {"losses": {"cross_entropy": 1.0}, "optimizer": optax.adamw(1e-2)}
    return cskd_jax.distill(student, **defaults | settings)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_result():
    result = distill(Net(), log_every=1)
    assert result.metrics["test"].keys() == {"top1", "loss"}
    assert {"loss", "cross_entropy", "top1", "gradient_norm"} <= result.metrics["train"].keys()
    assert [row["step"] for row in result.history if row["split"] == "train"] == [1, 2, 3, 4]
    assert result.last["epoch"] == 2
    assert repr(result) == f"Result(metrics={result.metrics})"
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(result.variables))


@pytest.mark.slow
def test_the_order_of_losses_does_not_matter():
    losses = {"kd": 0.5, "cross_entropy": 0.5, "cc": 0.1}
    teacher = {"teacher": Net(), "teacher_variables": distill(Net()).variables}
    paths = {"student_embedding": "hidden", "teacher_embedding": "hidden"}
    results = [distill(Net(), losses=dict(o), **teacher, **paths) for o in (losses.items(), reversed(losses.items()))]
    assert_equal(*(result.variables for result in results))


@pytest.mark.slow
def test_student_variables_are_where_it_starts():
    variables = distill(Net()).variables
    result = distill(Net(), student_variables=variables, optimizer=optax.sgd(0.0), epochs=1)
    assert_equal(result.variables, variables)


@pytest.mark.slow
def test_uint8_images_are_normalized_and_floats_taken_as_they_are():
    pixels = RNG.integers(256, size=(24, 4, 4, 1), dtype=np.uint8)
    floats = (pixels.astype(np.float32) / 255 - 0.5) / 0.25
    results = [
        distill(Net(), train=(images[:16], LABELS[:16]), test=(images[16:], LABELS[16:]), **normalization)
        for images, normalization in ((pixels, {"mean": [0.5], "std": [0.25]}), (floats, {}))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *(r.variables for r in results))


@pytest.mark.slow
def test_resumes_bit_for_bit_and_is_extended(tmp_path, capsys):
    expected = distill(Net(dropout=0.3, norm=True), epochs=3)
    short = distill(Net(dropout=0.3, norm=True), epochs=2, workdir=tmp_path)
    again = distill(Net(dropout=0.3, norm=True), epochs=2, workdir=tmp_path)
    assert_equal(again.variables, short.variables)
    longer = distill(Net(dropout=0.3, norm=True), epochs=3, workdir=tmp_path)
    assert_equal(longer.variables, expected.variables)
    assert longer.history == expected.history
    network, variables, results = cskd_jax.load_run(tmp_path, student=Net(dropout=0.3, norm=True))
    assert_equal(variables, expected.variables)
    assert results["student"]["last"] == expected.last
    assert network.apply(variables, IMAGES, train=False).shape == (24, 3)
    with pytest.raises(
        UserError, match=r"holds a Net, which is not .*: .*load_run\(workdir, student=MODULE\) reads it"
    ):
        cskd_jax.load_run(tmp_path)
    for command in (["evaluate", str(tmp_path)], ["evaluate", str(tmp_path / "student")], ["report", str(tmp_path)]):
        assert main(["cskd-jax", *command]) == 2
        message = (
            f"{tmp_path} holds a run of cskd_jax.distill, not of a recipe: cskd_jax.load_run('{tmp_path}', student="
        )
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_another_run_in_the_same_workdir_is_refused(tmp_path, capsys):
    distill(Net(), workdir=tmp_path)
    named = {"train": "data", "student_features": "paths"}
    other = {"seed": 1, "losses": {"cross_entropy": 0.5}, "epochs": 1, "train": TEST, "student_features": ["hidden"]}
    for key, value in other.items():
        with pytest.raises(UserError, match=f"holds another run .*{named.get(key, key)}"):
            distill(Net(), workdir=tmp_path, **{key: value})
    # A name that reads the same is not the same loss.
    assert _describe_loss(KD(num_classes=3, temperature=1.0)) != _describe_loss(KD(num_classes=3, temperature=9.0))
    assert capsys.readouterr() == ("", "")
    distill(Net(), workdir=tmp_path, callbacks=[cskd_jax.Console()])
    output = capsys.readouterr().out
    assert f"workdir {tmp_path}: already done; " in output
    assert "cannot be compared with those of the earlier run" in output
    distill(Net(), workdir=tmp_path, callbacks=[cskd_jax.Console()], epochs=3)
    assert f"workdir {tmp_path}: resuming; " in capsys.readouterr().out


@pytest.mark.slow
def test_rows_of_the_test_split_are_written_once(tmp_path, monkeypatch):
    """Even if the run ends before its last checkpoint is written."""
    # The best epoch is the first, whose test row has its step.
    settings = {"validation": TEST, "epochs": 3, "optimizer": optax.sgd(-0.1)}
    expected = distill(Net(), **settings, workdir=tmp_path / "undisturbed")
    assert [row["step"] for row in expected.history if row["split"] == "test"] == [2, 6]

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fail)
        with pytest.raises(OSError, match="no space left"):
            distill(Net(), **settings, workdir=tmp_path / "again")
    assert distill(Net(), **settings, workdir=tmp_path / "again").history == expected.history


@pytest.mark.slow
def test_names_with_slashes(tmp_path):
    """As those of Haiku's modules, which a function may use."""

    def network(variables, images, train, rngs):
        layer = variables["params"]["mlp/~/linear"]
        return images.reshape(len(images), -1) @ layer["w"], {}

    start = {"params": {"mlp/~/linear": {"w": np.full((16, 3), 0.1, np.float32)}}}

    def make(workdir):
        student = cskd_jax.Student(network, {"cross_entropy": 1.0}, optax.adam(0.1), variables=start)
        return cskd_jax.Trainer(
            {"net": student}, data=DATA, phases=[cskd_jax.Phase(2)], batch_size=8, workdir=workdir, callbacks=(),
            devices=1,
        )  # fmt: skip

    expected = make(None).fit()["net"].variables
    with pytest.raises(InterruptedRun):
        make(tmp_path).fit(Stop(2))
    assert_equal(make(tmp_path).fit()["net"].variables, expected)
    assert_equal(load_variables(str(tmp_path / "net")).variables, expected)


@pytest.mark.slow
def test_an_extension_that_is_refused_changes_nothing(tmp_path):
    expected = distill(Net(), workdir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(UserError, match="the arrays of the checkpoint do not match"):
        distill(Net(), workdir=tmp_path, epochs=3, optimizer=optax.sgd(0.1, momentum=0.9))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert_equal(distill(Net(), workdir=tmp_path).variables, expected.variables)


@pytest.mark.slow
def test_a_loaded_student_is_the_one_that_was_trained(tmp_path):
    distill(Net(), workdir=tmp_path, epochs=1)
    for other in nn.Dense(3), nnx.Linear(1, 3, rngs=nnx.Rngs(0)):
        with pytest.raises(UserError, match="student does not hold this network: params/bias is nothing instead"):
            cskd_jax.load_run(tmp_path, student=other)


class NnxNet(nnx.Module):
    def __init__(self):
        self.head = nnx.Linear(16, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(x.reshape(len(x), -1))


@pytest.mark.slow
def test_a_loaded_nnx_module_holds_its_variables(tmp_path):
    result = distill(NnxNet(), workdir=tmp_path, epochs=1)
    logits = cskd_jax.load_run(tmp_path, student=NnxNet()).network(IMAGES)
    kernel, bias = (result.variables["params"]["head"][name] for name in ("kernel", "bias"))
    np.testing.assert_allclose(logits, IMAGES.reshape(24, 16) @ kernel + bias, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_parameters_that_are_not_trained():
    frozen, free = (
        distill(Net(), epochs=1, trainable=trainable) for trainable in (lambda path: path[0] == "head", None)
    )
    before = distill(Net(), epochs=1, optimizer=optax.sgd(0.0)).variables["params"]
    assert_equal(frozen.variables["params"]["hidden"], before["hidden"])
    for result, name in (frozen, "head"), (free, "hidden"):
        assert not np.array_equal(result.variables["params"][name]["kernel"], before[name]["kernel"])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_teacher_in_float32_with_64_bit_types():
    """As other people's modules are."""
    with jax.enable_x64(False):
        teacher = distill(Net(), epochs=1).variables
    result = distill(Net(), teacher=Net(), teacher_variables=teacher, losses={"kd": 1.0}, epochs=1)
    assert np.isfinite(result.last["loss"])


@pytest.mark.slow
def test_a_teacher_that_no_loss_reads_is_mentioned(capsys):
    teacher = {"teacher": Net(), "teacher_variables": distill(Net(), epochs=1).variables}
    for losses, count in ({"cross_entropy": 1.0}, 1), ({"kd": 1.0}, 0):
        distill(Net(), losses=losses, epochs=1, callbacks=[cskd_jax.Console()], **teacher)
        assert capsys.readouterr().out.count("no loss reads the teacher: it is not used") == count


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "count"), [(1, 1), (-1, 0)])
def test_images_with_their_channels_first_are_mentioned(axis, count, capsys):
    train, test = ((np.moveaxis(np.zeros((8, 8, 8, 1), np.float32), -1, axis), LABELS[:8]) for _ in range(2))
    distill(Net(), train=train, test=test, epochs=1, callbacks=[cskd_jax.Console()])
    assert capsys.readouterr().out.count("if the channels come first, give np.moveaxis(images, 1, -1)") == count


@pytest.mark.slow
def test_a_workdir_of_something_else_is_left_alone(tmp_path):
    make_trainer(tmp_path / "trainer").fit()
    with pytest.raises(UserError, match="holds checkpoints that were not made by distill"):
        distill(Net(), workdir=tmp_path / "trainer")
    distill(Net(), workdir=tmp_path / "distill")
    with pytest.raises(UserError, match="holds checkpoints that were not made by a recipe"):
        cskd_jax.run("digits:ce", tmp_path / "distill")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "student").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="student is a symbolic link"):
        distill(Net(), workdir=tmp_path / "linked")


@pytest.mark.slow
def test_a_longer_training_than_asked_for_is_left_alone(tmp_path):
    make_trainer(tmp_path).fit()
    shorter = cskd_jax.Trainer(
        {"net": cskd_jax.Student(Net(), {"cross_entropy": 1.0}, optax.sgd(0.1, momentum=0.9))},
        data=DATA, phases=[cskd_jax.Phase(1)], batch_size=8, workdir=tmp_path, callbacks=(), devices=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="instead of|more than the 2"):
        shorter.fit()


@pytest.mark.slow
def test_a_longer_training_that_stopped_at_the_end_of_a_shorter_one(tmp_path):
    """It is not done: its best and last epochs are not known."""

    def make(epochs):
        return cskd_jax.Trainer(
            {"net": cskd_jax.Student(Net(), {"cross_entropy": 1.0}, optax.sgd(0.1))},
            data=DATA, phases=[cskd_jax.Phase(epochs)], batch_size=8, workdir=tmp_path, callbacks=(), devices=1,
        )  # fmt: skip

    with pytest.raises(InterruptedRun):
        make(3).fit(Stop(2))
    with pytest.raises(UserError, match="a training run of more than the 2 steps requested, with 2 of them done"):
        make(1).fit()


@pytest.mark.slow
def test_a_teacher_that_no_loss_reads_is_left_out():
    variables = distill(Net(), epochs=1).variables
    expected = distill(Net())
    assert_equal(distill(Net(), teacher=Net(), teacher_variables=variables).variables, expected.variables)


@pytest.mark.slow
def test_losses_may_be_given_as_numbers_of_numpy():
    expected = distill(Net(), losses={"cross_entropy": 0.5})
    for weight in (np.float32(0.5), np.float64(0.5), {"weight": np.float64(0.5)}):
        assert_equal(distill(Net(), losses={"cross_entropy": weight}).variables, expected.variables)


class Sows(nn.Module):
    """An auxiliary loss is sown, as modules of mixtures of experts do."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3)(x.reshape(len(x), -1))
        self.sow("losses", "auxiliary", x.sum())
        return x


class Grows(nn.Module):
    """A variable changes its shape from step to step."""

    @nn.compact
    def __call__(self, x, train):
        seen = self.variable("seen", "images", jnp.zeros, (2, 3))
        x = nn.Dense(3)(x.reshape(len(x), -1))
        if train:
            seen.value = x
        return x


@pytest.mark.slow
def test_what_is_sown_is_not_kept():
    assert distill(Sows()).variables.keys() == {"params"}


@pytest.mark.slow
def test_a_network_without_training_mode_is_told_of(capsys):
    class NeverTrains(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x.reshape(len(x), -1)))

    distill(NeverTrains(), epochs=1, callbacks=[cskd_jax.Console()], train=TEST)
    assert "no argument for training mode" in capsys.readouterr().out


LAYERS = [(RNG.normal(size=(16, 8)), np.zeros(8)), (RNG.normal(size=(8, 3)), np.zeros(3))]
LAYERS = jax.tree.map(np.float32, LAYERS)


class Layer(NamedTuple):
    weights: Any
    biases: Any


def layers(variables, images, train, rngs):
    """A network whose parameters are in a list, as in many examples of JAX."""
    (weights, biases), head = variables["params"]
    hidden = jnp.tanh(images.reshape(len(images), -1) @ weights + biases)
    return hidden @ head[0] + head[1], {}


@pytest.mark.slow
def test_parameters_in_lists(tmp_path):
    """Trained in part, and the best epoch is read again to be measured."""
    validation = IMAGES[16:], (LABELS[16:] + 1) % 3  # The longer the training, the worse.
    settings = {"student_variables": {"params": LAYERS}, "validation": validation, "optimizer": optax.sgd(1.0)}
    alone, kept = distill(layers, **settings), distill(layers, **settings, workdir=tmp_path)
    assert kept.best["epoch"] == 1 < kept.last["epoch"]
    assert (kept.best, kept.last) == (alone.best, alone.last)

    def train_head(path):
        return path[0] == "1" and path[1] == "weights"

    parameters = [Layer(*layer) for layer in LAYERS]
    student = cskd_jax.Student(layers, {"cross_entropy": 1.0}, optax.sgd(1.0), variables={"params": parameters})
    data = ImageDataset("small", Split(*TRAIN), Split(*TEST), ("a", "b", "c"))
    phases = [cskd_jax.Phase(1, trainable=train_head)]
    result = cskd_jax.Trainer({"net": student}, data=data, phases=phases, batch_size=8, callbacks=()).fit()["net"]
    first, head = result.variables["params"]
    assert_equal(first, parameters[0])
    assert_equal(head.biases, parameters[1].biases)
    assert not np.array_equal(head.weights, parameters[1].weights)


@pytest.mark.slow
def test_variables_of_older_flax():
    trained = distill(Net(norm=True), epochs=1).variables
    frozen = flax.core.freeze(trained)
    results = [distill(Net(norm=True), epochs=1, student_variables=start) for start in (trained, frozen)]
    assert_equal(results[0].variables, results[1].variables)


@pytest.mark.slow
def test_an_optimizer_with_a_random_key_resumes(tmp_path):
    noisy = optax.noisy_sgd(0.1, key=3)
    expected = distill(Net(), optimizer=noisy)
    distill(Net(), optimizer=noisy, epochs=1, workdir=tmp_path)
    assert_equal(distill(Net(), optimizer=noisy, workdir=tmp_path).variables, expected.variables)


class Typed(cskd_jax.Method):
    """A loss whose settings are not all JSON."""

    needs_teacher: ClassVar[bool] = False
    mixes: ClassVar[bool] = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        return jnp.mean(jnp.square(inputs.student.logits.astype(self.dtype))), {}


@pytest.mark.slow
def test_what_a_workdir_says_of_unusual_objects(tmp_path):
    """Numbers as names of classes, types as settings, a mixture of one's own: the same call resumes."""

    @dataclasses.dataclass(frozen=True)
    class Keeps:
        share: float

        def __call__(self, images, key, axis_name):
            return images, jnp.full(len(images), self.share)

    settings = {
        "categories": [0, 1, 2],
        "losses": {"cross_entropy": 1.0, "typed": {"loss": Typed(num_classes=3), "weight": np.float32(0.1)}},
        "mix": Keeps(1.0),
        "workdir": tmp_path,
    }
    first = distill(Net(), **settings, epochs=1)
    again = distill(Net(), **settings, epochs=1)
    assert_equal(again.variables, first.variables)
    described = json.loads((tmp_path / "distillation.json").read_text())
    assert described["losses"]["typed"]["loss"]["dtype"] == "float32"
    assert described["mix"] == {"share": 1.0}
    with pytest.raises(UserError, match="holds another run .mix "):
        distill(Net(), **settings | {"mix": Keeps(0.5)}, epochs=1)
    arrays = [_describe_loss({"loss": Typed(num_classes=3, dtype=np.full(2, value))}) for value in (0.0, 1.0)]
    assert arrays[0] != arrays[1]


def test_a_description_that_could_not_be_read_again(tmp_path):
    student = cskd_jax.Student(
        Net(), {"cross_entropy": 1.0}, optax.sgd(0.1), description={"name": "net", "settings": {"drop": None}}
    )
    with pytest.raises(UserError, match="net: checkpoints could not be read again: its record has no valid network"):
        cskd_jax.distill(students={"net": student}, **QUIET, workdir=tmp_path)
    assert not any(tmp_path.glob("*/checkpoints"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": Grows()}, r"a step changes .*seen.*images.* from float32.2, 3. to float32.8, 3."),
        ({"student": nn.Dense(3)}, r"logits of two images have shape .2, 4, 4, 3.; the data have 3 classes"),
        ({"student": Net(), "categories": ("a", "b", "c", "d")}, "the data have 4 classes"),
        ({"losses": {"loss": spread}}, "a loss cannot be named loss"),
        ({"losses": {"a/b": spread}}, "a loss cannot be named a/b: a slash separates a loss from its terms"),
        ({"losses": {"mine": lambda inputs: inputs.student.logits}}, r"losses.mine must be a scalar; got shape .8, 3."),
        ({"losses": {"mine": lambda inputs: None}}, "losses.mine must be a scalar; got NoneType"),
        ({"losses": {"mine": lambda inputs: (0.0, 1.0)}}, "a scalar and a dictionary of scalars"),
        ({"losses": {"cross_entropy": -1.0}}, "losses.cross_entropy.weight is -1.0"),
        ({"losses": {}}, "losses must name at least one loss"),
        ({"log_every": 0}, "log_every is 0; it must be an integer, at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be an integer, at least 1"),
        ({"mean": (0.0, 0.0, 0.0)}, "mean has 3 values, but the images have 1 channels"),
        ({"train": (IMAGES, np.eye(3)[LABELS])},
         r"train and test differ: float32 images \[N, 4, 4, 1\] with labels \[N, 3\], and .* with labels \[N\]; "
         r"if labels \[N, K\] are one-hot, give labels.argmax\(1\)"),
        ({"test": None}, r"test must be a pair \(images, labels\); got NoneType"),
        ({"train": IMAGES}, r"train must be a pair \(images, labels\); got ndarray"),
        ({"train": (IMAGES,)}, r"train must be a pair \(images, labels\); got tuple of 1"),
        ({"train": (IMAGES, LABELS[:, None])}, r"the shape must be .N."),
        ({"train": (IMAGES, LABELS[:3])}, "train must be images .* got shapes .24, 4, 4, 1. and .3,."),
        ({"train": (IMAGES, LABELS.astype(float))}, "train labels are float64; they must be integer"),
        ({"train": (IMAGES.astype(int), LABELS)}, "train images are int64; they must be uint8 or floats"),
        ({"test": (IMAGES[:, :2], LABELS)}, "train and test differ"),
        ({"categories": ("a", "b")}, "labels must be from 0 to 1"),
        ({"losses": {"nothing": 1.0}}, "losses.nothing is unknown; give a function"),
        ({"losses": {"KD": 1.0}}, r"losses.KD is unknown; did you mean kd\?"),
        ({"losses": {"kd": {"weight": 1.0, "heat": 4.0}}}, "losses.kd has no setting heat; it has .*temperature"),
        ({"losses": {"kd": {"wieght": 1.0}}}, r"losses.kd has no setting wieght; did you mean weight\?"),
        ({"losses": ["kd"]}, r"losses is \['kd'\]; it must be a dictionary of losses, such as {'kd': 0.9}"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; it must be an optimizer of optax, such as optax.adamw"),
        ({"teacher": Net(), "teacher_variables": {"head": {}}, "losses": {"kd": 1.0}},
         "teacher_variables must be {'params': ...}, with the other collections .*; got the keys head"),
        ({"student_variables": [1]}, "student_variables must be {'params': ...}, .*; got list"),
        ({"student": layers, "student_variables": {"layers": LAYERS}}, "student_variables must .* got the keys layers"),
        ({"losses": {"kd": 1.0}}, "student: losses.kd needs a teacher"),
        ({"losses": {"kd": 1.0}, "teacher": Net()}, "a teacher needs teacher_variables"),
        ({"batch_size": 5, "devices": 2}, "batch_size is 5, which does not split evenly across the 2 devices"),
        ({"devices": 99}, "devices is 99; it must be from 1 to 8"),
        ({"devices": [0]}, r"devices is \[0\]; it must be a number, or devices such as"),
        ({"devices": []}, r"devices is \[\]; it must be a number, or devices such as"),
        ({"seed": 2**32}, "seed is 4294967296; it must be an integer from 0 to 4294967295"),
        ({"batch_size": 32}, "batch_size is 32; it must not be more than the 16 training examples"),
        ({"epochs": 0}, "epochs is 0; it must be an integer, at least 1"),
        ({"student_features": ["hiden"]}, "Net has no output at path 'hiden'; the nearest are hidden"),
        ({"student_features": "hidden"}, r"student_features is 'hidden'; it must be a list of paths, such as \['hidd"),
        ({"callbacks": cskd_jax.Console()}, "callbacks must be a list of instances of cskd_jax.Callback"),
        ({"callbacks": [print]}, "callbacks must be a list of instances of cskd_jax.Callback"),
        ({"mix": 0.2}, "mix is 0.2; it must be a function"),
        ({"mean": 0.5}, "mean and std need uint8 images; float images are used as they are"),
        ({"mean": "a"}, "mean and std must be numbers"),
        ({"mean": [128], **UINT8}, r"mean is \(128.0,\); it must be that of pixels in \[0, 1\]: divide it by 255"),
        ({"train": ([(IMAGES, LABELS), (IMAGES[:3], LABELS)], LABELS[:2])}, "images are a list that does not form"),
        ({"train": (np.full_like(IMAGES, np.nan), LABELS)}, "train images hold values that are not finite"),
        ({"test": (IMAGES, None)}, "test needs labels to evaluate the students with"),
        ({"train": (IMAGES, LABELS + 2**32)}, "train labels are from 4294967296 to 4294967298"),
        ({"train": (IMAGES, LABELS + 1), "test": (IMAGES, LABELS + 1)},
         r"the data have 4 classes, so it must be \(2, 4\) \(the largest label is 3; .* categories\), and no training"),
        ({"train": (IMAGES, np.eye(3)[LABELS]), "test": (IMAGES, np.eye(3)[LABELS])},
         r"images have any number of classes .*; if each image has one class, give labels \[N\], such as labels.argm"),
        ({"student": Net().bind({})}, r"the Net is bound to variables, .*: give module.unbind\(\)\[0\]"),
        ({"augment": lambda images: images}, "augment: .*takes 1 positional argument"),
        ({"losses": {"cskd": 1.0}}, r"cskd is a method, whose losses are cskd_jax.configs.methods.losses\('cskd'\)"),
        ({"losses": {"bkd": 1.0}}, r"whose losses are cskd_jax.configs.methods.losses\('bkd', multilabel=True\)"),
        ({"losses": {"kd": {"temperature": "4"}}}, "losses.kd.temperature is '4'; it must be a number greater than 0"),
        ({"losses": {"kd": {"standardize": "no"}}}, "losses.kd.standardize is 'no'; it must be true or false"),
        ({"losses": {"ctkd": {"variant": "KD"}}}, r"losses.ctkd.variant is 'KD'; did you mean kd\?"),
        ({"losses": {"srd": {"variant": "diff"}}}, r"losses.srd.variant is 'diff'; did you mean difference\?"),
        ({"losses": {"kd": cskd_jax.LOSSES["kd"](num_classes=3, temperature=-1.0)}}, "losses.kd.temperature is -1.0"),
        ({"losses": {"kd": {"warmup_epochs": 1.5}}}, "losses.kd.warmup_epochs is 1.5; it must be an integer"),
        ({"losses": {"kd": {"start_epoch": -3}}}, "losses.kd.start_epoch is -3; it must be an integer from 0"),
        ({"losses": {"mine": lambda inputs: inputs.teacher.logits}}, "losses.mine: AttributeError: 'NoneType' object"),
        ({"losses": {"mine": lambda student, teacher: 0.0}}, "losses.mine: TypeError: .* missing 1 required"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_compiles(settings, message):
    with pytest.raises(UserError, match=message):
        distill(**{"student": Net()} | settings)


def test_epochs_are_checked_before_a_workdir_is_used(tmp_path):
    with pytest.raises(UserError, match="epochs is '2'; it must be an integer, at least 1"):
        distill(Net(), epochs="2", workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_says_what_the_network_does_not_return():
    teacher = {"teacher": Net(), "teacher_variables": distill(Net(), epochs=1).variables}
    advice = (
        r"name submodules .* with student_features=\['PATH', ...\] and, unless .*, teacher_features=\['PATH', ...\]"
    )
    with pytest.raises(UserError, match=f"losses.at: it reads the features of the student, .*: {advice}") as caught:
        distill(Net(), losses={"at": 1.0}, **teacher)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(UserError, match="losses.at: it reads the features of the teacher, .* return {'logits': ..., "):
        distill(Net(), losses={"at": 1.0}, student_features=["hidden"], **teacher)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_function_sees_the_whole_batch():
    results = [
        distill(Net(), losses={"cross_entropy": 1.0, "spread": {"loss": spread, "weight": 0.3}}, devices=devices)
        for devices in (1, 2)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *(r.variables for r in results))


@pytest.mark.slow
def test_what_depends_on_the_number_of_devices_is_said_once(capsys):
    shown = {"callbacks": [cskd_jax.Console()]}
    one = distill(Net(norm=True, dropout=0.5), **shown)
    assert "depend" not in capsys.readouterr().out
    two = distill(Net(norm=True, dropout=0.5), devices=2, **shown)
    assert capsys.readouterr().out.count("student: results depend on the number of devices, 2: its batch_stats") == 1
    distill(Net(), devices=2, **shown)
    assert "depend" not in capsys.readouterr().out
    assert not np.array_equal(one.variables["batch_stats"]["BatchNorm_0"]["mean"],
                              two.variables["batch_stats"]["BatchNorm_0"]["mean"])  # fmt: skip


class Sees(nn.Module):
    """Logits that are the images and the mask that dropout draws: what every device has seen and drawn."""

    @nn.compact
    def __call__(self, x, train):
        bias = self.param("bias", nn.initializers.zeros, (3,))
        seen = self.variable("seen", "mean", jnp.zeros, (), jnp.float32)
        mask = nn.Dropout(0.5, deterministic=not train)(jnp.ones((len(x), 64)))
        drawn = self.variable("drawn", "mask", jnp.zeros, (64,), jnp.float32)
        if train:
            seen.value, drawn.value = x.mean(), mask[0]
        return bias + x.reshape(len(x), -1)[:, :3]


@pytest.mark.slow
def test_devices_draw_different_masks_and_their_averages_are_averaged():
    settings = {"batch_size": 16, "epochs": 1, "optimizer": optax.sgd(0.1)}
    one, two = (distill(Sees(), devices=devices, **settings).variables for devices in (1, 2))
    np.testing.assert_allclose(two["seen"]["mean"], one["seen"]["mean"], rtol=1e-5)
    # Of two different masks of 0 and 2, the average has ones.
    assert set(np.unique(one["drawn"]["mask"])) == {0, 2}
    assert set(np.unique(two["drawn"]["mask"])) == {0, 1, 2}


DATA = ImageDataset(
    "noise", Split(TRAIN[0], TRAIN[1].astype(np.int32)), Split(TEST[0], TEST[1].astype(np.int32)), tuple("abc")
)


def make_trainer(workdir=None, callbacks=()):
    """Three phases: without the head, all with a new optimizer, and on with the same but other losses."""
    return cskd_jax.Trainer(
        {"net": cskd_jax.Student(Net(dropout=0.2), {"cross_entropy": 1.0}, optax.adam(1e-2), schedule=1e-2)},
        data=DATA,
        phases=[
            cskd_jax.Phase(2, trainable=lambda path: path[0] != "head"),
            cskd_jax.Phase(1, optimizer=(sgd := optax.sgd(0.1, momentum=0.9)), schedule=0.1),
            cskd_jax.Phase(1, losses={"cross_entropy": 1.0, "spread": spread}, optimizer=sgd, schedule=0.1),
        ],
        batch_size=8,
        workdir=workdir,
        callbacks=callbacks,
        devices=1,
        log_every=1,
    )


@pytest.mark.slow
def test_phases():
    seen = {}

    class Watch(cskd_jax.Callback):
        def on_row(self, row):
            seen[row["split"], row["step"]] = row

    trainer = make_trainer(callbacks=[Watch()])
    result = trainer.fit()["net"]
    rates = [seen["train", step]["learning_rate"] for step in range(1, 9)]
    assert rates == [1e-2] * 4 + [0.1] * 4
    assert ["spread" in seen["train", step] for step in range(1, 9)] == [False] * 6 + [True] * 2
    assert trainer.evaluate("net") == {name: result.last[name] for name in ("top1", "loss")}
    assert int(trainer.state["net"].step) == 8


@pytest.mark.slow
@pytest.mark.parametrize("steps", chosen([5, 3, 4, 7], 1))
def test_stopped_in_any_phase_it_goes_on_bit_for_bit(steps, tmp_path):
    expected = make_trainer().fit()["net"]
    with pytest.raises(InterruptedRun, match=f"stopped by test, saved at step {steps} of the net"):
        make_trainer(tmp_path).fit(Stop(steps))
    before = load_variables(str(tmp_path / "net")).variables["params"]["head"]
    first = distill(Net(dropout=0.2), epochs=1, optimizer=optax.sgd(0.0)).variables["params"]["head"]
    if steps <= 4:  # The head has not been trained, nor decayed.
        assert_equal(before, first)
    actual = make_trainer(tmp_path).fit()["net"]
    assert_equal(actual.variables, expected.variables)
    assert actual.history == expected.history


@pytest.mark.slow
def test_fit_again_after_an_interruption(tmp_path):
    """In a notebook: what was in flight is done anew, and counted once."""
    expected = make_trainer().fit()["net"]
    trainer = make_trainer(tmp_path)
    with pytest.raises(InterruptedRun):
        trainer.fit(Stop(4))
    trainer._participants["net"]._pending.append((8, 8, {"loss": jnp.float32(9)}))
    result = trainer.fit()["net"]
    assert_equal(result.variables, expected.variables)
    assert result.history == expected.history


class Interrupt(cskd_jax.Callback):
    """Ctrl-C at the end of an epoch, whose step is given; the rows of single steps may come later."""

    def __init__(self, step):
        self._step = step

    def on_row(self, row):
        if (row["step"], row["split"]) == (self._step, "test"):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4], ids=["stopped", "at the end"])
def test_ctrl_c(step, tmp_path, request):
    """It saves, and then does what it does everywhere."""
    # A shell starts commands in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    expected = distill(Net())
    with pytest.raises(KeyboardInterrupt):
        distill(Net(), workdir=tmp_path, callbacks=[Interrupt(step)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "results.json").exists() == (step == 4)
    assert load_variables(str(tmp_path / "student")).step == step
    assert_equal(distill(Net(), workdir=tmp_path).variables, expected.variables)


@pytest.mark.slow
def test_an_ignored_signal_remains_ignored(tmp_path, request):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    result = distill(Net(), workdir=tmp_path, callbacks=[Interrupt(2)])
    assert result.last["epoch"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("schedule", [None, lambda step: 0.1])
def test_an_optimizer_that_continues(schedule):
    """Whatever is known of its learning rate."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    phases = [cskd_jax.Phase(1), cskd_jax.Phase(1, optimizer=optimizer)]
    parts = make_parts(
        phases, {"cross_entropy": 1.0}, optimizer, schedule, steps_per_epoch=2,
        create=lambda losses: Objective.create(losses, num_classes=3, axis_name=None),
    )  # fmt: skip
    assert [part.fresh for part in parts] == [True, False]


def test_splits_that_are_not_there():
    trainer = make_trainer()
    for split, message in {"val": "there is no split 'val'", "validation": "the splits are test, train"}.items():
        with pytest.raises(UserError, match=message):
            trainer.evaluation("net", split)


@pytest.mark.slow
def test_nothing_of_the_process_is_changed():
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_numpy_dtype_promotion")}
    results = []
    thread = threading.Thread(target=lambda: results.append(distill(Net(), epochs=1)))
    thread.start()
    thread.join()
    assert results[0].last["epoch"] == 1
    assert before == {name: getattr(jax.config, name) for name in before}


@pytest.mark.slow
def test_without_callbacks_it_is_quiet(capsys):
    distill(Net(norm=True), epochs=1, devices=2)
    assert capsys.readouterr() == ("", "")


def test_public_names_are_there():
    for name in cskd_jax.__all__:
        assert getattr(cskd_jax, name) is not None
    assert set(cskd_jax.__all__) == set(cskd_jax._MODULES)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        cskd_jax.nothing  # noqa: B018
