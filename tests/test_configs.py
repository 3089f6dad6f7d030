"""Every recipe with every method, every published value: valid, as published, and one step of it traces."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.configs.methods import METHODS, MULTILABEL_METHODS, TOKEN_METHODS
from cskd_jax.configs.networks import network
from cskd_jax.data import DATASETS, ImageDataset, Split
from cskd_jax.distributed.devices import Devices
from cskd_jax.errors import UserError
from cskd_jax.losses import LossInputs
from cskd_jax.report import published
from cskd_jax.runs import schema
from cskd_jax.runs.build import describe_network, make_network, make_trainer
from cskd_jax.runs.loss_keys import loss_keys
from cskd_jax.runs.optimization import make_training
from cskd_jax.training.objective import Objective, needs_teacher
from cskd_jax.training.state import init_network
from cskd_jax.training.teachers import Teacher
from tests.conftest import ROOT
from tests.tiers import chosen

RECIPES = {
    "digits": (10, (8, 8, 1)),
    "digit_pairs": (10, (16, 16, 1)),
    "cifar10": (10, (32, 32, 3)),
    "cifar100": (100, (32, 32, 3)),
    "cifar100_standard": (100, (32, 32, 3)),
    "tiny_imagenet": (200, (64, 64, 3)),
    "tiny_imagenet_standard": (200, (64, 64, 3)),
    "cub200": (200, (224, 224, 3)),
}
MULTILABEL = {"digit_pairs"}
# Methods that need something else of the training step than the others do.
TRACED = ("crd", "kdgan", "ab", "mlkd", "simkd", "ofd", "wkd_l", "srd", "deit", "dml")
EVERY_METHOD = METHODS + MULTILABEL_METHODS


def read_recipe(recipe, method="cskd"):
    """What the recipe says: differences from the defaults."""
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "configs" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(method)


def get_config(recipe, method="cskd"):
    return schema.fill(read_recipe(recipe, method))


def recipe_of(method):
    return "digits" if method in METHODS else "digit_pairs"


def test_every_recipe_is_here():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "benchmark", "methods", "networks"}
    assert files == RECIPES.keys()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_method_is_valid(recipe):
    for method in MULTILABEL_METHODS if recipe in MULTILABEL else METHODS:
        schema.validate(get_config(recipe, method))


def trace_one_step(recipe, config, folder):
    """Fails unless the student's step can be traced, with its teacher, on images of the recipe's shape."""
    num_classes, shape = RECIPES[recipe]
    labels = np.arange(config.batch_size, dtype=np.int32) % num_classes
    if recipe in MULTILABEL:
        labels = np.eye(num_classes, dtype=np.float32)[labels]
    split = Split(np.zeros((config.batch_size, *shape), np.uint8), labels)
    dataset = ImageDataset(recipe, split, split, tuple(map(str, range(num_classes))))
    teachers = []
    if needs_teacher(config.losses):
        teachers = [Teacher(make_network(describe_network(config.teacher, shape), num_classes, config.dtype))]
    make_trainer("student", config, dataset, folder, Devices(), teachers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "method"),
    chosen([("digits", method) for method in METHODS], [("digits", method) for method in TRACED])
    + [("digit_pairs", method) for method in MULTILABEL_METHODS]
    + chosen([("cifar100", method) for method in ("crd", "cskd", "cskd_paper", "kdgan")], 1)
    + chosen([("tiny_imagenet_standard", f"resnet18/{name}/kd") for name in ("mobilenet_v2", "shufflenet_v2")], 1),
)
def test_one_step_of_every_method_traces(recipe, method, tmp_path):
    config = get_config(recipe, method)
    if method in TOKEN_METHODS:
        config.student.update(name="deit_tiny", patch_size=4, depth=1, distillation_token=True)
    trace_one_step(recipe, config, tmp_path)


def published_cells():
    """{(recipe, word)} of every value of the published tables."""
    words = {"both": "cskd", "neither": "kd", "teacher": "ce", "CSKD run 1": "cskd", "CSKD run 2": "cskd"}
    recipes = {"cub200_2011": "cub200"}
    return {
        (
            recipes.get(table["dataset"], table["dataset"]),
            f"{row['teacher']}/{row['student']}/{words.get(column, column)}",
        )
        for table in published.tables()
        for row in table["rows"]
        for column in table["columns"]
    }


def test_there_are_published_cells():
    assert len(published_cells()) == 137


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "word"), chosen(sorted(published_cells()), sorted(published_cells())[::12]), ids=str
)
def test_published_cell(recipe, word):
    """Every value of the published tables has a recipe: valid, with those networks, and its loss traces."""
    config = get_config(recipe, word)
    schema.validate(config)
    num_classes, shape = RECIPES[recipe]
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    described = [describe_network(settings, shape) for settings in (config.teacher, config.student)]
    networks = [make_network(description, num_classes, "float32") for description in described]
    teacher, student = (jax.eval_shape(init_network, network, key, shape)[1] for network in networks)
    indices = jax.ShapeDtypeStruct((2,), jnp.int32)
    inputs = LossInputs(student, teacher, indices, indices, key)
    objective = Objective.create(config.losses, num_classes=num_classes, num_examples=50_000)

    def loss(key, inputs):
        params, memory = objective.init(key, inputs)
        return objective(params, memory, inputs, 0)[0]

    assert jax.eval_shape(loss, key, inputs).shape == ()
    assert student.features[-1].shape[:3] == teacher.features[-1].shape[:3]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("R101_0.5", ("resnet101", 0.5)),
        ("r152", ("resnet152", 1.0)),
        ("ResNet50_0.25", ("resnet50", 0.25)),
        ("Inception-v3", ("inception_v3", 1.0)),
        ("mobilenet_v2_0.5", ("mobilenet_v2", 0.5)),
        ("wrn_40_2", ("wrn_40_2", 1.0)),
        ("resnet8x4", ("resnet8x4", 1.0)),
    ],
)
def test_words_of_networks(word, expected):
    assert network(word) == expected
    assert network("R50_0.5", small_images=False) == ("resnet50_224", 0.5)


@pytest.mark.parametrize("word", ["R50/kd", "kd/", "R50/R18/kd/kd", "/R18/kd", "R50//kd", "R50/R18/nothing"])
def test_wrong_words(word):
    with pytest.raises(ValueError, match="must be METHOD or TEACHER/STUDENT/METHOD|unknown method 'nothing'"):
        get_config("digits", word)


@pytest.mark.parametrize("recipe", ["cifar10", "cifar100"])
def test_published_recipes(recipe):
    released, paper = get_config(recipe), get_config(recipe, "cskd_paper")
    for config in (released, paper):
        assert (config.batch_size, config.epochs, config.teacher.epochs) == (128, 200, 200)
        assert (config.teacher.name, config.teacher.width) == ("resnet101", 0.5)
        assert (config.student.name, config.student.width) == ("resnet18", 0.25)
        settings = config.optimizer
        assert (settings.learning_rate, settings.momentum, settings.weight_decay) == (0.1, 0.9, 1e-4)
        assert {"resize": 0, "crop_padding": 4, "flip": True}.items() <= dict(config.augment).items()
        assert not config.drop_last
    assert (released.optimizer.milestones, paper.optimizer.milestones) == ((80, 120), (80, 120, 160))
    assert (released.optimizer.restart_momentum, paper.optimizer.restart_momentum) == (True, False)


@pytest.mark.parametrize("method", ["cskd", "cskd_paper", "kd"])
def test_published_recipe_of_tiny_imagenet(method):
    config = get_config("tiny_imagenet", method)
    assert (config.batch_size, config.epochs, config.teacher.epochs) == (200, 200, 200)
    assert (config.teacher.name, config.teacher.width) == ("resnet152", 1)
    assert (config.student.name, config.student.width) == ("resnet18", 0.25)
    settings = config.optimizer
    assert (settings.learning_rate, settings.momentum, settings.weight_decay) == (0.1, 0.9, 5e-4)
    assert (settings.milestones, settings.decay_factor, settings.restart_momentum) == ((50, 100, 150), 0.1, False)
    assert {"resize": 72, "crop_padding": 0, "flip": True}.items() <= dict(config.augment).items()


def test_only_the_process_that_reads_the_teacher_needs_it():
    config = get_config("digits", "kd")
    config.teacher.checkpoint = "/no/such"
    schema.validate(config)
    with pytest.raises(UserError, match="/no/such does not exist"):
        schema.check_teacher_exists(config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_data_set_of_a_recipe(recipe):
    config = get_config(recipe, "mlcskd" if recipe in MULTILABEL else "cskd")
    schema.validate(config)
    assert config.dataset.name in DATASETS
    assert len(config.dataset.mean) == RECIPES[recipe][1][2]


def test_weights_of_the_variants():
    reference, paper = (get_config("cifar100", method).losses for method in ("cskd", "cskd_paper"))
    structure = {"weight": 1.0, "variant": "reference", "intra_weight": 0.002, "inter_weight": 0.04}
    structure |= {"compactness_weight": 0.1, "filter_misclassified": True}
    assert structure.items() <= reference.category_structure.to_dict().items()
    assert (reference.cross_entropy.weight, reference.mse_logits.weight) == (0.9, pytest.approx(0.1 * 1e-5))
    structure = {"weight": 1.0, "variant": "paper", "intra_weight": 0.01, "inter_weight": 0.2}
    assert structure.items() <= paper.category_structure.to_dict().items()
    assert (paper.cross_entropy.weight, paper.mse_logits.weight) == (0.1, 0.9)


@pytest.mark.parametrize(
    ("method", "zero"), [("intra", {"inter_weight"}), ("inter", {"intra_weight", "compactness_weight"})]
)
def test_ablations_leave_one_part_out(method, zero):
    structure = get_config("cifar100", method).losses.category_structure
    assert {key for key in structure if key.endswith("_weight") and structure[key] == 0} == zero


def test_methods_document_lists_every_word_with_its_weight():
    overview, _ = (ROOT / "docs" / "methods.md").read_text().split("\n## ", 1)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in overview.splitlines()
        if line.startswith("| `")
    ]
    assert {len(row) for row in rows} == {6}
    names = {"ce": "cross_entropy"} | dict.fromkeys(("cskd", "cskd_paper", "intra", "inter"), "category_structure")
    names |= {"bce": "binary_cross_entropy", "bkd": "binary_kd"}
    names |= dict.fromkeys(("mlcskd", "mlcskd_reference"), "multilabel_category_structure")
    names |= {word: word.removesuffix("_ls") for word in ("ctkd_ls", "dkd_ls", "mlkd_ls")}
    weights = {word: get_config(recipe_of(word), word).losses[names.get(word, word)].weight for word in EVERY_METHOD}
    assert {row[0].strip("`"): float(row[2]) for row in rows} == weights


def test_words_are_of_one_kind_of_data():
    assert not set(METHODS) & set(MULTILABEL_METHODS)
    for recipe, word in (("digit_pairs", "cskd"), ("digits", "bce")):
        with pytest.raises(ValueError, match=f"unknown method '{word}'; known: |{word} is a method for images with"):
            get_config(recipe, word)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("kd+at", {"cross_entropy": 1.0, "kd": 0.9, "at": 1000.0}),
        ("crd+kd", {"cross_entropy": 1.0, "kd": 1.0, "crd": 0.8}),  # as its authors combine them
        ("ce+lskd", {"cross_entropy": 1.0, "lskd": 9.0}),
        ("R34_0.25/R18_0.125/rkd+pkt+sp", {"cross_entropy": 1.0, "rkd": 1.0, "pkt": 30000.0, "sp": 3000.0}),
    ],
)
def test_combined_methods(method, weights):
    config = get_config("digits", method)
    schema.validate(config)
    assert config.method == "+".join(sorted(method.rpartition("/")[2].split("+")))
    assert {name: settings.weight for name, settings in config.losses.items()} == weights
    networks, slash, words = method.rpartition("/")
    reverse = "+".join(reversed(words.split("+")))
    assert get_config("digits", f"{networks}{slash}{reverse}") == config, "whatever their order"


@pytest.mark.parametrize(
    ("method", "settings", "losses"),
    [
        ("at+fsp", {"fsp": {}}, {"at": (4, None), "cross_entropy": (4, None)}),
        ("ab", {"ab": {"margin": 1.0}}, {"cross_entropy": (4, None)}),
        ("ft", {"ft": {"trains": "paraphraser"}}, {"cross_entropy": (4, None), "ft": (4, None)}),
    ],
)
def test_other_methods_wait_for_the_first_phase_of_one(method, settings, losses):
    config = get_config("digits", method)
    schema.validate(config)
    training = make_training(config, steps_per_epoch=3)
    first, later = training.phases
    assert (first.epochs, later.epochs) == (4, 30)
    assert first.losses.keys() == settings.keys()
    for name, expected in settings.items():
        assert first.losses[name].items() >= ({"weight": 1.0} | expected).items()
    assert {name: (s["start_epoch"], s["end_epoch"]) for name, s in training.losses.items()} == losses
    assert training.losses.get("ft", {"trains": "student"})["trains"] == "student"
    assert first.schedule(0) == pytest.approx(0.01 if method == "ft" else 0.05)
    paths = [("stem", "kernel"), ("stage1_block1", "conv1", "kernel"), ("head", "kernel"), ("classifier", "bias")]
    assert [first.trainable(path) for path in paths] == [method != "ft"] * 2 + [False] * 2


@pytest.mark.parametrize(
    ("word", "changes", "message"),
    [
        ("kd", {"first_phase.epochs": 3}, "first_phase.epochs is 3; it must be 0 unless one of the losses has a first"),
        (
            "ab",
            {"optimizer.name": "dot", "optimizer.restart_momentum": False},
            "optimizer.name is dot, which has no first phase: set first_phase.epochs to 0",
        ),
        ("kd", {"optimizer.name": "dot"}, "optimizer.restart_momentum is True; with optimizer.name dot it must be"),
        (
            "cskd_paper",
            {"optimizer.name": "dot", "optimizer.delta": 0.2},
            "optimizer.delta is 0.2 and optimizer.momentum is 0.9; delta must be at most momentum, and their sum less",
        ),
    ],
)
def test_first_phases_and_optimizers_that_make_no_sense(word, changes, message):
    config = get_config("digits", word)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config[section][name] = value
    with pytest.raises(UserError, match=re.escape(message)):
        schema.validate(config)


@pytest.mark.parametrize(
    ("recipe", "method", "message"),
    [
        ("digits", "kd+at+kd", "at+kd+kd: a method is named twice"),
        ("digits", "cskd+cskd_paper", "the loss mse_logits is used by cskd_paper and by another method"),
        ("digits", "ab+kd+fsp", "ab and fsp each need their own first phase"),
        ("digits", "kd+", "unknown method ''; known: cskd, "),
        ("digit_pairs", "mlcskd+bkd", "the loss binary_kd is used by mlcskd and by another method"),
    ],
)
def test_methods_that_do_not_go_together(recipe, method, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        get_config(recipe, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd+at", "crd+kd", "fitnet+rkd"])
def test_one_step_of_combined_methods_traces(method, tmp_path):
    trace_one_step("digits", get_config("digits", method), tmp_path)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_method_names_only_what_differs_from_the_class_of_its_loss(method):
    losses, filled = read_recipe(recipe_of(method), method).losses, get_config(recipe_of(method), method).losses
    for name, settings in losses.items():
        known = loss_keys(name)
        assert [key for key, value in settings.items() if value == known[key].default] == []
        assert set(filled[name]) == known.keys()
        for key in known.keys() - set(settings):
            assert filled[name][key] == known[key].default


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_on_one_screen(recipe):
    assert len((ROOT / "configs" / f"{recipe}.py").read_text().splitlines()) <= 35
