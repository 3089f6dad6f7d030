"""Every recipe with every method: valid, as published, and one step of it traces."""

import importlib.util

import numpy as np
import pytest

from configs.methods import METHODS, MULTILABEL_METHODS
from cskd_jax import config as config_lib
from cskd_jax.data import ImageDataset, Split
from cskd_jax.loop import Network, Phase
from cskd_jax.objective import hyperparameters, needs_teacher
from tests.conftest import ROOT

RECIPES = {
    "digits": (10, (8, 8, 1)),
    "digit_pairs": (10, (16, 16, 1)),
    "cifar10": (10, (32, 32, 3)),
    "cifar100": (100, (32, 32, 3)),
}
MULTILABEL = {"digit_pairs"}
EVERY_METHOD = METHODS + MULTILABEL_METHODS


def get_config(recipe, method="cskd"):
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "configs" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(method)


def recipe_of(method):
    return "digits" if method in METHODS else "digit_pairs"


def test_every_recipe_is_here():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "methods"}
    assert files == RECIPES.keys()


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        pytest.param(name, method, marks=[] if name.startswith("digit") else pytest.mark.slow)
        for name in RECIPES
        for method in (MULTILABEL_METHODS if name in MULTILABEL else METHODS)
    ],
)
def test_one_step_traces(recipe, method, tmp_path):
    config = get_config(recipe, method)
    config_lib.validate(config)
    num_classes, shape = RECIPES[recipe]
    labels = np.arange(config.batch_size, dtype=np.int32) % num_classes
    if recipe in MULTILABEL:
        labels = np.eye(num_classes, dtype=np.float32)[labels]
    split = Split(np.zeros((config.batch_size, *shape), np.uint8), labels)
    dataset = ImageDataset(recipe, split, split, tuple(map(str, range(num_classes))))
    student = Network.create(config.student, num_classes, config.dtype)
    teacher = None
    if needs_teacher(config.losses):
        teacher = Network.create(config.teacher, num_classes, config.dtype)
    Phase("student", config, student, config.losses, config.epochs, dataset, tmp_path, teacher)


@pytest.mark.parametrize("recipe", ["cifar10", "cifar100"])
def test_published_recipes(recipe):
    released, paper = get_config(recipe), get_config(recipe, "cskd_paper")
    for config in (released, paper):
        assert (config.batch_size, config.epochs, config.teacher.epochs) == (128, 200, 200)
        assert (config.teacher.name, config.teacher.width) == ("resnet101", 0.5)
        assert (config.student.name, config.student.width) == ("resnet18", 0.25)
        settings = config.optimizer
        assert (settings.learning_rate, settings.momentum, settings.weight_decay) == (0.1, 0.9, 1e-4)
        assert dict(config.augment) == {"crop_padding": 4, "flip": True}
        assert not config.drop_last
    assert (released.optimizer.milestones, paper.optimizer.milestones) == ((80, 120), (80, 120, 160))
    assert (released.optimizer.restart_momentum, paper.optimizer.restart_momentum) == (True, False)


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
    lines = (ROOT / "docs" / "methods.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert {len(row) for row in rows} == {6}
    names = {"ce": "cross_entropy"} | dict.fromkeys(("cskd", "cskd_paper", "intra", "inter"), "category_structure")
    names |= {"bce": "binary_cross_entropy", "bkd": "binary_kd"}
    names |= dict.fromkeys(("mlcskd", "mlcskd_reference"), "multilabel_category_structure")
    weights = {word: get_config(recipe_of(word), word).losses[names.get(word, word)].weight for word in EVERY_METHOD}
    assert {row[0].strip("`"): float(row[2]) for row in rows} == weights


def test_words_are_of_one_kind_of_data():
    assert not set(METHODS) & set(MULTILABEL_METHODS)
    for recipe, word in (("digit_pairs", "cskd"), ("digits", "bce")):
        with pytest.raises(ValueError, match=f"unknown method '{word}' after the ':' of --config; known: "):
            get_config(recipe, word)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_setting_of_a_method_is_in_its_recipe(method):
    for name, settings in get_config(recipe_of(method), method).losses.items():
        assert set(settings) >= set(config_lib.WEIGHT_RULES)
        optional = {"compactness_weight", "filter_misclassified"} if settings.get("variant") == "paper" else set()
        assert set(hyperparameters(name)) - optional == set(settings) - set(config_lib.WEIGHT_RULES)
