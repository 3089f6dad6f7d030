"""Recipes: packaged ones by name, files, and those that users wrote for an earlier version."""

import shutil
import subprocess
import sys

import pytest

from cskd_jax.errors import UserError
from cskd_jax.main import main
from cskd_jax.runs import schema
from cskd_jax.runs.recipes import load_recipe, packaged_recipes, recipe_file
from tests.conftest import ROOT
from tests.test_schema import OLD_RECIPE


def test_packaged_recipes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert packaged_recipes() == [
        "cifar10", "cifar100", "cifar100_standard", "cub200", "digit_pairs", "digits", "tiny_imagenet",
        "tiny_imagenet_standard",
    ]  # fmt: skip
    config = load_recipe("cifar100:kd", ["--config.losses.kd.temperature=2", "--config.epochs=3"])
    assert config.losses.kd.temperature == 2.0
    assert load_recipe("cifar100:R34_0.5/R18/kd", []).teacher.width == 0.5
    by_path = load_recipe(f"{ROOT}/configs/cifar100.py:kd", ["--config.losses.kd.temperature=2", "--config.epochs=3"])
    assert schema.flatten(config) == schema.flatten(by_path)


def test_a_file_wins_over_a_packaged_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / "digits.py").read_text()
    (tmp_path / "digits").write_text(text.replace("config.epochs = 30", "config.epochs = 31"))
    assert recipe_file("digits:kd").absolute() == tmp_path / "digits"
    assert load_recipe("digits:kd", []).epochs == 31
    (tmp_path / "digits").unlink()
    assert load_recipe("digits:kd", []).epochs == 30


@pytest.mark.parametrize(
    ("recipe", "meant"),
    [
        ("", ""),
        ("digit", "digits or digit_pairs"),
        ("configs/nothing.py:kd", ""),
        ("methods", ""),
        ("cifar100.py", "cifar100"),
    ],
)
def test_no_such_recipe(recipe, meant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["main", f"--config={recipe}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    known = "cifar10, cifar100, cifar100_standard, cub200, digit_pairs, digits, tiny_imagenet, tiny_imagenet_standard"
    assert line == (
        f"error: there is no recipe {recipe}; did you mean {meant}?"
        if meant
        else "error: --config=RECIPE must name a file such as configs/digits.py, or one of the recipes "
        f"{known}; got {recipe or 'none'}"
    )


def test_a_configuration_takes_no_new_keys():
    with pytest.raises(AttributeError, match="epoch"):
        load_recipe("digits:kd", []).epoch = 3


def test_recipe_that_fails(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(word): return {}[word]\n")
    with pytest.raises(UserError, match=r"^--config=.*mine.py:kd: KeyError: 'kd'$"):
        load_recipe(f"{tmp_path / 'mine.py'}:kd", [])
    with pytest.raises(UserError, match=r"get_config of .*mine.py needs a word, as in .*mine.py:WORD"):
        load_recipe(str(tmp_path / "mine.py"), [])


def test_files_that_are_no_recipes(tmp_path):
    (tmp_path / "notes.txt").write_text("remember to raise\n")
    (tmp_path / "results.json").write_text("null\n")
    (tmp_path / "empty.py").write_text("")
    for name in ("notes.txt", "results.json", "empty.py"):
        with pytest.raises(UserError, match=rf"{name} is not a recipe: it has no get_config"):
            load_recipe(f"{tmp_path / name}:kd", [])


def test_a_recipe_without_a_word(tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(): pass\n")
    with pytest.raises(UserError, match=r"get_config of .*mine.py takes no word: leave out :kd"):
        load_recipe(f"{tmp_path / 'mine.py'}:kd", [])


@pytest.mark.parametrize(
    ("value", "message"),
    [("3", "mine.py must return a ConfigDict"), ("ConfigDict({'seed': 3})", "mine.py must set the key method")],
)
def test_recipe_that_returns_something_else(value, message, tmp_path):
    (tmp_path / "mine.py").write_text(f"from ml_collections import ConfigDict\nget_config = lambda: {value}\n")
    with pytest.raises(UserError, match=message):
        load_recipe(str(tmp_path / "mine.py"), [])


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("cskd", "seed", 3),
        ("cskd_paper", "losses.category_structure.compactness_weight", 0.25),  # it does not name the key
        ("R34_0.5/R18/crd", "losses.crd.num_negatives", 64),
        ("reviewkd", "losses.reviewkd.mid_channels", 32),
    ],
)
def test_recipe_of_an_earlier_version(word, key, value, tmp_path, monkeypatch):
    """It spells out all keys, and imports `configs`."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(OLD_RECIPE, tmp_path / "mine.py")
    config = load_recipe(f"mine.py:{word}", [f"--config.{key}={value}"])
    schema.validate(config)
    expected = load_recipe(f"cifar100:{word}", [f"--config.{key}={value}"])
    assert schema.flatten(config) == schema.flatten(expected)
    assert schema.flatten(config)[key] == value


# As it is for a user: nothing else has been imported, and another `configs` lies where the command is run.
FRESH = """
import sys
from cskd_jax.runs import schema
from cskd_jax.runs.recipes import load_recipe
config = load_recipe(sys.argv[1] + ":cskd_paper", ["--config.losses.category_structure.compactness_weight=0.25"])
schema.validate(config)
print(config.method, config.losses.category_structure.compactness_weight, "configs" in sys.modules)
"""


def test_recipe_of_an_earlier_version_in_a_fresh_process(tmp_path):
    recipe, elsewhere = tmp_path / "recipes" / "mine.py", tmp_path / "elsewhere"
    recipe.parent.mkdir()
    shutil.copy(OLD_RECIPE, recipe)
    (elsewhere / "configs").mkdir(parents=True)
    (elsewhere / "configs" / "methods.py").write_text("raise ImportError('the wrong one')\n")
    command = [sys.executable, "-c", FRESH, str(recipe)]
    environment = {"PYTHONPATH": f"{ROOT}", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "cskd_paper 0.25 False\n"), done.stderr


def test_recipe_in_a_configs_package_of_its_own(tmp_path):
    """What lies beside it is what it imports."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for name in ("methods", "networks"):
        shutil.copy(ROOT / "configs" / f"{name}.py", folder)
    with (folder / "methods.py").open("a") as file:
        file.write("\nfor_all = losses\nlosses = lambda method: for_all('ce')\n")
    shutil.copy(OLD_RECIPE, folder / "mine.py")
    program = FRESH.replace("_paper", "").replace("category_structure.compactness_weight", "cross_entropy.weight")
    command = [sys.executable, "-c", program, str(folder / "mine.py")]
    environment = {"PYTHONPATH": f"{ROOT}", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "cskd 0.25 True\n"), done.stderr


def test_a_folder_that_is_called_configs_is_no_package(tmp_path):
    (tmp_path / "configs" / "editor").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    shutil.copy(OLD_RECIPE, tmp_path / "recipes" / "mine.py")
    assert load_recipe(str(tmp_path / "recipes" / "mine.py"), []).dataset.name == "cifar100"
