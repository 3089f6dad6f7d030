"""The standard benchmark: every cell against the published protocol, every pair with every method, and real steps.

The facts are in golden/protocol_cifar100_standard.json, or in the file of that form that CSKD_PROTOCOL names.
"""

import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.configs.methods import METHODS, TOKEN_METHODS
from cskd_jax.data import ImageDataset, Split
from cskd_jax.distributed.devices import Devices
from cskd_jax.losses import LossInputs, View
from cskd_jax.models import create_model
from cskd_jax.runs import build, optimization, schema
from cskd_jax.runs.build import describe_network, make_network, make_trainer
from cskd_jax.runs.recipes import load_recipe, load_sources
from cskd_jax.training.layers import layers_of
from cskd_jax.training.objective import Objective
from cskd_jax.training.state import init_network
from cskd_jax.training.teachers import Teacher
from tests.conftest import ROOT
from tests.tiers import chosen

FACTS = pathlib.Path(os.environ.get("CSKD_PROTOCOL", ROOT / "tests" / "golden" / "protocol_cifar100_standard.json"))
PAIRS = (
    "resnet56/resnet20", "resnet110/resnet20", "resnet110/resnet32", "resnet32x4/resnet8x4", "wrn_40_2/wrn_16_2",
    "wrn_40_2/wrn_40_1", "vgg13/vgg8", "resnet32x4/shufflenet_v1", "wrn_40_2/shufflenet_v1", "vgg13/mobilenet_v2",
    "resnet50/mobilenet_v2", "resnet50/vgg8", "resnet32x4/shufflenet_v2", "resnet32x4/wrn_16_2",
    "resnet32x4/wrn_40_2", "wrn_40_2/resnet8x4", "wrn_40_2/mobilenet_v2",
)  # fmt: skip
# Pairs of networks of different kinds, and with different numbers of stages.
IN_CI = ("resnet32x4/shufflenet_v1", "wrn_40_2/mobilenet_v2")
# Parameters of the networks with 100 classes in CRD's reference code.
PARAMETERS = {
    "resnet20": 278324, "resnet32": 472756, "resnet56": 861620, "resnet110": 1736564, "resnet8x4": 1233540,
    "resnet32x4": 7433860, "wrn_16_2": 703284, "wrn_40_1": 569780, "wrn_40_2": 2255156, "vgg8": 3965028,
    "vgg13": 9462180, "resnet50": 23705252, "mobilenet_v2": 812836, "shufflenet_v1": 949258, "shufflenet_v2": 1355528,
}  # fmt: skip
# Names in the facts of the methods whose weights are gamma (labels), alpha (KD) and beta (the method).
NAMES = {
    "kd": "kd", "fitnet": "fitnet (hint)", "at": "at (attention)", "sp": "sp (similarity)", "cc": "cc (correlation)",
    "vid": "vid", "rkd": "rkd", "pkt": "pkt", "nst": "nst", "crd": "crd", "ft": "ft (factor)",
}  # fmt: skip
# Loss settings, with their names in the facts.
SETTINGS = {
    "kd": {"temperature": "T"},
    "cc": {"embedding_size": "feat_dim"},
    "vid": {"initial_variance": "init_pred_var"},
    "rkd": {"distance_weight": "w_d", "angle_weight": "w_a"},
    "pkt": {"epsilon": "eps"},
    "crd": {"embedding_size": "feat_dim", "num_negatives": "nce_k", "temperature": "nce_t", "momentum": "nce_m"},
}


OF_MAPS = [method for method in METHODS if method not in TOKEN_METHODS]
# Peers are made by a trainer, and pairs are traced without one.
TRACED = [method for method in OF_MAPS if method != "dml"]


@functools.cache
def facts():
    return json.loads(FACTS.read_text(encoding="utf-8"))


def cell(pair, method):
    return load_recipe(f"cifar100_standard:{pair}/{method}", [])


@pytest.mark.parametrize("pair", chosen(PAIRS, IN_CI))
def test_protocol_of_every_cell(pair):
    common, student = facts()["common_repdistiller"], pair.partition("/")[2]
    slow = student.startswith(("mobilenet", "shufflenet"))
    rate = common["learning_rate_mobilenet_v2_shufflenets" if slow else "learning_rate"]
    for method in METHODS:
        config = cell(pair, method)
        schema.validate(config)
        settings = config.optimizer
        # Epochs count from the end of the first phase.
        first = common["init_epochs"] if method in ("ab", "fsp", "ft") else 0
        assert (config.epochs, config.first_phase.epochs) == (common["epochs"], first)
        assert settings.milestones == tuple(common["lr_decay_epochs"])
        assert (config.teacher.epochs, config.teacher.learning_rate) == (common["epochs"], common["learning_rate"])
        assert (config.batch_size, config.drop_last) == (common["batch_size"], common["drop_last"])
        assert (settings.name, settings.schedule, settings.learning_rate) == ("sgd", "step", rate)
        assert (settings.decay_factor, settings.momentum) == (common["lr_decay_rate"], common["momentum"])
        assert (settings.weight_decay, settings.decay_all) == (common["weight_decay"], True)
        changes = settings.nesterov, settings.restart_momentum, settings.warmup_epochs, settings.clip_norm
        assert not any(changes)
        assert (config.augment.crop_padding, config.augment.flip, config.augment.resize) == (4, True, 0)
        assert (config.dataset.name, config.method) == ("cifar100", method)
        if FACTS.parent.name == "golden":
            normalization = facts()["normalization"]
            assert [*config.dataset.mean] == normalization["mean"]
            assert [*config.dataset.std] == normalization["std"]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_networks_of_every_pair(pair):
    config = cell(pair, "kd")
    images = jnp.zeros((1, 32, 32, 3))
    for name, role in zip(pair.split("/"), ("teacher", "student"), strict=True):
        settings = config[role]
        model = create_model(settings.name, num_classes=100, width=settings.width)
        shapes = jax.eval_shape(lambda key, m=model: m.init(key, images, train=False), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == PARAMETERS[name]


@pytest.mark.parametrize("method", NAMES)
def test_weights_of_the_reference_code(method):
    entry = facts()["methods_repdistiller"][NAMES[method]]
    for pair in PAIRS:
        losses = cell(pair, method).losses
        weight = entry["alpha"] if method == "kd" else entry["beta"]
        assert (losses.cross_entropy.weight, losses[method].weight) == (entry["gamma"], weight)
        for setting, name in SETTINGS.get(method, {}).items():
            assert losses[method][setting] == entry[name]
        phases = [(loss.start_epoch, loss.end_epoch, loss.warmup_epochs) for loss in losses.values()]
        assert phases == [(0, None, 0)] * 2


def test_first_phase_of_ft():
    rates = [cell(pair, "ft").first_phase.learning_rate for pair in ("resnet56/resnet20", "vgg13/vgg8")]
    assert rates == [0.01, None]


@pytest.mark.parametrize("method", ["ab", "fsp"])
def test_first_phase_of_the_method_alone(method):
    entry = facts()["methods_repdistiller"][{"ab": "ab (abound)"}.get(method, method)]
    epochs = facts()["common_repdistiller"]["init_epochs"]
    assert entry["first_phase"].startswith(f"{epochs} epochs, lr = learning_rate")
    config = cell("resnet56/resnet20", method)
    assert (config.first_phase.epochs, config.first_phase.learning_rate) == (epochs, None)
    assert config.losses[method].weight == 1.0


@pytest.mark.parametrize("pair", PAIRS)
def test_weights_of_single_pairs(pair):
    dkd, review = facts()["mdistiller"]["dkd"], facts()["reviewkd_original"]
    losses = cell(pair, "dkd").losses
    expected = (dkd["ce"], dkd["alpha"], dkd["beta"].get(pair, 8), dkd["T"], dkd["warmup_epochs"])
    found = losses.dkd
    assert (losses.cross_entropy.weight, found.alpha, found.beta, found.temperature, found.warmup_epochs) == expected
    losses = cell(pair, "reviewkd").losses
    assert losses.reviewkd.weight == review["weight"].get(pair, 1.0)
    assert losses.reviewkd.warmup_epochs == review["warmup_epochs_of_weight"]
    scaled = facts()["logit_standardization"]
    temperature, weight = scaled["kd"].get(pair, (scaled["default"]["T"], scaled["default"]["kd_weight"]))
    losses = cell(pair, "lskd").losses
    assert (losses.lskd.temperature, losses.lskd.weight, losses.cross_entropy.weight) == (
        temperature, weight, scaled["ce"],
    )  # fmt: skip
    losses, dist = cell(pair, "dist").losses, facts()["dist"]
    assert (losses.cross_entropy.weight, losses.dist.weight) == (dist["ce"], dist["dist"])
    assert (losses.dist.beta, losses.dist.gamma, losses.dist.temperature) == (dist["beta"], dist["gamma"], dist["T"])


@pytest.mark.parametrize("pair", PAIRS)
def test_weights_of_luminet_for_single_pairs(pair):
    alpha, temperature, cross_entropy = facts()["luminet"]["alpha_T_ce"].get(pair, (31, 4, 2))
    losses = cell(pair, "luminet").losses
    assert (losses.luminet.alpha, losses.luminet.temperature) == (alpha, temperature)
    assert (losses.luminet.weight, losses.cross_entropy.weight) == (1.0, cross_entropy)


def test_curriculum_of_the_published_code():
    entry, losses = facts()["ctkd"]["kd+ctkd+LS"], cell("resnet56/resnet20", "ctkd").losses
    settings = losses.ctkd
    assert entry["cosine_decay"] == f"{settings.maximum:g} to {settings.minimum:g} in {settings.loops} loops"
    assert losses.cross_entropy.weight == entry["gamma"]


def test_sums_of_methods():
    entry = facts()["methods_repdistiller"]["crd+kd"]
    for word in ("crd+kd", "kd+crd"):
        losses = cell("resnet56/resnet20", word).losses
        weights = {"cross_entropy": entry["gamma"], "kd": entry["alpha"], "crd": entry["beta"]}
        assert {name: loss.weight for name, loss in losses.items()} == weights
    losses = cell("resnet32x4/resnet8x4", "at+dkd").losses
    assert {name: loss.weight for name, loss in losses.items()} == {"at": 1000.0, "cross_entropy": 1.0, "dkd": 1.0}
    assert (losses.dkd.beta, cell("vgg13/vgg8", "at+dkd").losses.dkd.beta) == (8.0, 6.0)


def test_every_published_value_has_a_source():
    for method in ("kd", "dkd", "reviewkd", "crd+kd", "at+dkd", "ab"):
        config, sources = cell("vgg13/vgg8", method), load_sources(f"cifar100_standard:vgg13/vgg8/{method}")
        flat = schema.flatten(config)
        assert all(sources.values())
        assert sources.keys() <= flat.keys()
        assert {"epochs", "optimizer.milestones", "optimizer.learning_rate"} <= sources.keys()
        assert {key for key in flat if key.startswith("losses.") and key.endswith("weight")} - sources.keys() <= {
            "losses.cross_entropy.weight"
        }
    sources = load_sources("cifar100_standard:vgg13/vgg8/dkd")
    assert sources["losses.dkd.beta"] == "megvii-research/mdistiller:configs/cifar100/dkd, for this pair"
    assert "without a value" in load_sources("cifar100_standard:resnet50/vgg8/dkd")["losses.dkd.beta"]


def test_pairs_that_were_not_published_and_networks_by_their_own_names():
    config = cell("resnet56/resnet8", "dkd")
    assert (config.student.name, config.losses.dkd.beta) == ("resnet8", 8.0)
    by_own_name = cell("resnet50_crd/mobilenet_v2_crd_0.5", "kd")
    assert schema.flatten(by_own_name) == schema.flatten(cell("resnet50/mobilenet_v2", "kd"))
    assert by_own_name.optimizer.learning_rate == 0.01


def outputs_of(pair, batch=8):
    """Shapes of the outputs of teacher and student, and of their layers that losses read."""
    config, key = cell(pair, "kd"), jax.ShapeDtypeStruct((2,), jnp.uint32)
    described = [describe_network(settings, (32, 32, 3)) for settings in (config.teacher, config.student)]
    networks = [make_network(description, 100, "float32") for description in described]
    found = [jax.eval_shape(init_network, network, key, (32, 32, 3)) for network in networks]
    outputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), [output for _, output in found]
    )
    return *outputs, *(layers_of(network, variables) for network, (variables, _) in zip(networks, found, strict=True))


# Methods that pair stages one to one, which a teacher of three stages and a student of four do not allow.
OF_PAIRED_STAGES = {"ab", "at", "fitnet", "fsp", "irg", "nst", "ofd", "reviewkd", "vid"}


@functools.cache
def trace(method, losses, shapes):
    """Fails unless the losses of a method take outputs of these shapes; many pairs have the same."""
    teacher, student, teacher_layers, student_layers = shapes
    labels, key = jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.uint32)
    objective = Objective.create(json.loads(losses), num_classes=100, num_examples=50_000)

    def loss(key, inputs):
        params, memory = objective.init(key, inputs)
        return objective(params, memory, inputs, jnp.int32(0))[0]

    layers = {
        "student_head": student_layers.head,
        "teacher_head": teacher_layers.head,
        "teacher_norms": teacher_layers.norms,
    }
    epoch = jax.ShapeDtypeStruct((), jnp.int32)
    inputs = LossInputs(student, teacher, labels, labels, key, epoch=epoch, views=(View(student, teacher),), **layers)
    assert jax.eval_shape(loss, key, inputs).shape == (), method


@pytest.mark.slow
@pytest.mark.parametrize("pair", chosen(PAIRS, IN_CI[1:]))
def test_every_method_with_every_pair(pair):
    shapes = outputs_of(pair)
    teacher, student, *_ = shapes
    unequal = len(teacher.features) != len(student.features)
    assert unequal == (pair == "wrn_40_2/mobilenet_v2")
    for method in TRACED:
        losses = cell(pair, method).losses.to_json()
        if unequal and method in OF_PAIRED_STAGES:
            with pytest.raises(ValueError, match="student has 4 stages and teacher 3"):
                trace(method, losses, shapes)
        else:
            trace(method, losses, shapes)


# Pairs of the shallowest networks, which compile fastest: of three and of four stages, and with last maps of two sizes.
KINDS = (
    "resnet14/resnet8", "vgg11/vgg8", "resnet8/shufflenet_v1", "wrn_16_2/wrn_16_1", "resnet8/shufflenet_v2",
    "vgg8/mobilenet_v2",
)  # fmt: skip
STEPS = [(pair, "at+cskd") for pair in KINDS] + [(KINDS[0], method) for method in OF_MAPS]


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "method"), chosen(STEPS, 1))
def test_two_steps(pair, method):
    """Each kind of student with a sum of methods, and one with every method: both steps move what is trained."""
    config, rng = cell(pair, method), np.random.default_rng(0)
    for role in ("teacher", "student"):
        config[role].width *= 0.125
    config.update(epochs=1, batch_size=8)
    config.first_phase.epochs = min(1, config.first_phase.epochs)
    config.optimizer.weight_decay = 0.0  # So that a momentum is 0 only where all gradients were.
    images, labels = rng.integers(0, 256, (16, 32, 32, 3), np.uint8), np.arange(16, dtype=np.int32) % 4
    dataset = ImageDataset("cifar100", Split(images, labels), Split(images[:2], labels[:2]), tuple("abcd"))
    teacher = Teacher(make_network(describe_network(config.teacher, dataset.image_shape), 4, "float32"))
    init = jax.jit(lambda key: init_network(teacher.network, key, dataset.image_shape)[0])
    teacher.variables = init(jax.random.PRNGKey(1))
    trainer = make_trainer("student", config, dataset, None, Devices(1), [teacher])
    (result,) = trainer.fit().values()
    state = trainer.state["student"]
    assert state.step == 2 * (1 + config.first_phase.epochs)
    momenta = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state.opt_state)}
    for name in ("network", "sigma") if "cskd" in method else ("network",):
        assert any(name in path and np.any(leaf) for path, leaf in momenta.items()), name
    assert np.isfinite(result.last["loss"])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_teacher_keeps_its_learning_rate(monkeypatch):
    """A student of another kind has its own."""
    rates, images = [], np.zeros((64, 32, 32, 3), np.uint8)
    split = Split(images, np.arange(64, dtype=np.int32) % 4)
    dataset = ImageDataset("cifar100", split, split, tuple("abcd"))
    whole = optimization.make_optimizer

    def record(settings, *arguments, **others):
        rates.append(settings.learning_rate)
        return whole(settings, *arguments, **others)

    for module in (build, optimization):
        monkeypatch.setattr(module, "make_optimizer", record)
    config = cell("vgg8/shufflenet_v1", "ce")
    for role in ("teacher", "student"):
        make_trainer(role, config, dataset, None, Devices(1))
    assert rates == [0.05, 0.01]
    assert config.optimizer.learning_rate == 0.01
