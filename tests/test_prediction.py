"""Layers of networks that losses read, and students that predict by a loss."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cskd_jax
from cskd_jax.commands import train
from cskd_jax.data import load_dataset
from cskd_jax.data.arrays import from_arrays
from cskd_jax.data.augment import Normalize
from cskd_jax.errors import InterruptedRun, UserError
from cskd_jax.evaluate import __main__ as evaluate
from cskd_jax.interop import export
from cskd_jax.losses import LOSSES
from cskd_jax.models import BasicBlock, Bottleneck, ModelOutput, ResNet, create_model
from cskd_jax.training.adapters import LinenNetwork, as_network
from cskd_jax.training.layers import layers_of
from cskd_jax.training.phases import Phase
from cskd_jax.training.prediction import PREDICTION, PredictingNetwork
from cskd_jax.training.state import init_network
from tests.conftest import Stop

NUM_CLASSES, IMAGE = 3, (8, 8, 3)
RNG = np.random.default_rng(0)
LABELS = (np.arange(24) % NUM_CLASSES).astype(np.int32)
IMAGES = (RNG.normal(size=(24, *IMAGE)) + LABELS[:, None, None, None]).astype(np.float32)
QUIET = {"train": (IMAGES[:16], LABELS[:16]), "test": (IMAGES[16:], LABELS[16:]), "callbacks": (), "devices": 1}


def student():
    return ResNet(NUM_CLASSES, (1, 1), BasicBlock, stage_widths=(4, 6))


def teacher():
    module = ResNet(NUM_CLASSES, (1, 1), Bottleneck, stage_widths=(4, 6))
    variables = jax.jit(lambda key: init_network(LinenNetwork(module), key, IMAGE)[0])(jax.random.PRNGKey(7))
    return module, jax.device_get(variables)


def distill(losses, **changes):
    module, variables = teacher()
    settings = QUIET | {"optimizer": optax.sgd(0.05), "batch_size": 8, "epochs": 2} | changes
    return cskd_jax.distill(student(), teacher=module, teacher_variables=variables, losses=losses, **settings)


# Layers.


KINDS = (
    "resnet8",
    "resnet8_stem64",
    "resnet20_option_a",
    "resnet50",
    "wrn_16_2",
    "vgg11",
    "mobilenet_v2",
    "shufflenet_v1",
)


@pytest.mark.parametrize("name", KINDS)
def test_norms_have_the_channels_of_the_preactivations(name):
    network = LinenNetwork(create_model(name, num_classes=NUM_CLASSES))
    variables, output = jax.eval_shape(lambda: init_network(network, jax.random.PRNGKey(0), (32, 32, 3)))
    head, norms = layers_of(network, variables)
    assert head.kernel.shape == (output.embedding.shape[1], NUM_CLASSES)
    if name == "shufflenet_v1":
        assert norms is None
    else:
        assert [norm.scale.shape[0] for norm in norms] == [x.shape[-1] for x in output.preactivations]


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(NUM_CLASSES, use_bias=False, name="last")(nn.Dense(5, name="first")(x).mean((1, 2)))


def test_a_classifier_by_path_and_without_bias():
    network = as_network(Plain(), head="last")
    variables, _ = network.init(jax.random.PRNGKey(0), IMAGE)
    head = layers_of(network, variables).head
    np.testing.assert_array_equal(head.kernel, variables["params"]["last"]["kernel"])
    np.testing.assert_array_equal(head.bias, np.zeros(NUM_CLASSES))
    assert layers_of(as_network(Plain()), variables) == (None, None)


def test_a_path_without_a_classifier():
    network = as_network(Plain(), head="end")
    with pytest.raises(ValueError, match=r"^there is no linear layer, .* at 'end'; the network has them at '"):
        layers_of(network, network.init(jax.random.PRNGKey(0), IMAGE)[0])


def test_a_function_and_an_nnx_module_name_their_classifier():
    def function(variables, images, train, rngs):
        del train, rngs
        return images.mean((1, 2)) @ variables["params"]["end"]["kernel"], {}

    variables = {"params": {"end": {"kernel": np.ones((3, NUM_CLASSES), np.float32)}}}
    assert layers_of(as_network(function, head="end"), variables).head.kernel.shape == (3, NUM_CLASSES)


# Students that predict by a loss.


@pytest.mark.slow
def test_a_student_predicts_by_the_teachers_classifier(tmp_path):
    result = distill({"simkd": 1.0}, workdir=tmp_path)
    own = result.variables[PREDICTION]["memory"]
    _, variables = teacher()
    np.testing.assert_array_equal(own["kernel"], variables["params"]["classifier"]["kernel"])
    loss = LOSSES["simkd"](num_classes=NUM_CLASSES)
    images, labels = QUIET["test"]
    output, _ = PredictingNetwork(LinenNetwork(student()), loss).apply(result.variables, images, train=False)
    assert np.mean(np.argmax(output.logits, axis=1) == labels) == result.metrics["test"]["top1"]
    loaded = cskd_jax.load_run(tmp_path, student())
    found = loaded.network.apply(loaded.variables, images, train=False).logits
    np.testing.assert_allclose(found, output.logits, rtol=1e-6)
    plain = student().apply(result.variables, images, train=False).logits
    assert not np.allclose(plain, output.logits)


@pytest.mark.slow
def test_a_student_that_predicts_by_a_loss_resumes_bit_for_bit(tmp_path):
    module, variables = teacher()
    made = {
        "teachers": [cskd_jax.Teacher(module, variables)],
        "data": from_arrays(QUIET["train"], QUIET["test"]),
        "phases": [Phase(3)], "batch_size": 8, "callbacks": (), "devices": 1,
    }  # fmt: skip

    def trainer(workdir):
        one = cskd_jax.Student(student(), {"simkd": 1.0, "sdd_kd": 0.1}, optax.sgd(0.05, 0.9))
        return cskd_jax.Trainer({"one": one}, **made, workdir=workdir)

    expected = trainer(tmp_path / "whole").fit()["one"]
    with pytest.raises(InterruptedRun):
        trainer(tmp_path / "parts").fit(Stop(3))
    found = trainer(tmp_path / "parts").fit()["one"]
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
    assert found.metrics["test"] == expected.metrics["test"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "changes", "text"),
    [
        ({"simkd": 1.0}, {"ema": 0.9}, "student: losses.simkd predicts with its own parameters"),
        ({"simkd": 1.0, "other": {"loss": LOSSES["simkd"]}}, {}, "losses.other and losses.simkd both replace"),
        ({"srrl": 1.0}, {"teacher_head": "nothing"}, "teacher: there is no linear layer"),
    ],
)
def test_refusals(losses, changes, text):
    with pytest.raises(UserError, match=f"^{text}"):
        distill(losses, **changes)


class Tiny(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        features = nn.relu(nn.Dense(self.width, name="stage")(x))
        embedding = features.mean((1, 2))
        return ModelOutput(nn.Dense(NUM_CLASSES, name="end")(embedding), (features,), embedding)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_layers_stay_whole_in_micro_batches_and_on_two_devices():
    # A function sees the gathered batch.
    losses = {"own": lambda inputs: jnp.mean(jnp.square(inputs.student_head.bias - inputs.teacher_head.bias))}
    losses |= dict.fromkeys(("simkd", "sdd_kd", "srrl"), 0.1)
    variables = Tiny(6).init(jax.random.PRNGKey(5), jnp.zeros((1, *IMAGE)))
    settings = QUIET | {"optimizer": optax.sgd(0.05), "batch_size": 8, "epochs": 1, "accumulation_steps": 2}
    settings |= {"teacher": Tiny(6), "teacher_variables": variables, "teacher_head": "end", "student_head": "end"}
    one, two = (
        cskd_jax.distill(Tiny(4), losses=losses, **settings | {"devices": devices}).variables for devices in (1, 2)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), one, two)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_commands_predict_by_the_loss(small_run, tmp_path):
    workdir, exported = tmp_path / "run", tmp_path / "exported"
    config, *changes = small_run
    assert train.main(["train", f"{config}:simkd", *changes, "--config.epochs=2", f"--workdir={workdir}"]) == 0
    results = json.loads((workdir / "results.json").read_text())["student"]
    assert evaluate.main(["evaluate", str(workdir)]) == 0
    found = json.loads((workdir / "evaluation.json").read_text())["networks"]["student"]
    assert (found["top1"], found["parameters"]) == (results["last"]["top1"], results["parameters"])
    assert export.main(["export", str(workdir), f"--out={exported}"]) == 0
    assert sorted(path.name for path in exported.iterdir()) == ["network.jax_export", "network.json"]
    images = load_dataset("digits", data_dir=changes[0].partition("=")[2]).test
    network = jax.export.deserialize(bytearray((exported / "network.jax_export").read_bytes()))
    assert np.mean(np.argmax(network.call(images.images), axis=1) == images.labels) == found["top1"]
    loaded = cskd_jax.load_run(workdir)
    normalized = Normalize((0.3053,), (0.3760,))(jnp.asarray(images.images[:4]))
    assert loaded.network.apply(loaded.variables, normalized, train=False).logits.shape == (4, 10)
