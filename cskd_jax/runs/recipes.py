"""Recipes: found, read, filled with the defaults, and changed by what stands on the command line."""

import contextlib
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

import cskd_jax.configs
from cskd_jax.configs import methods, networks
from cskd_jax.errors import UserError
from cskd_jax.runs import schema

_PACKAGED = pathlib.Path(cskd_jax.configs.__file__).parent
# What a recipe may import as `configs`, by the names that the modules have then.
_CONFIGS = {"configs": cskd_jax.configs, "configs.methods": methods, "configs.networks": networks}


def load_recipe(recipe: str, overrides: list[str]) -> ml_collections.ConfigDict:
    """Returns the configuration of a recipe, filled with the defaults, with --config.KEY=VALUE arguments applied.

    Args:
      recipe: RECIPE or RECIPE:WORD, where RECIPE is a file or the name of a packaged recipe.
      overrides: Arguments --config.KEY=VALUE.

    Raises:
      UserError: There is no such recipe, or a key or value does not fit.
    """
    file = recipe_file(recipe)
    _, colon, word = recipe.partition(":")
    argv, values = ["cskd_jax", f"--config={file}{colon}{word}"], flags.FlagValues()
    with _importable_configs(file):
        config_flags.DEFINE_config_file("config", None, "Recipe.", values, lock_config=True, sys_argv=argv)
        parse_flags(values, argv)
    config = values["config"].value
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"get_config of {file} must return a ConfigDict, as that of configs/digits.py does")
    if "method" not in config:
        raise UserError(f"get_config of {file} must set the key method, the name of the method")
    return override(schema.fill(config), overrides)


def recipe_file(recipe: str) -> pathlib.Path:
    """Returns the file of RECIPE or RECIPE:WORD; raises UserError if there is none.

    Args:
      recipe: RECIPE is a file, or else the name of a packaged recipe.
    """
    name = recipe.partition(":")[0]
    if name and pathlib.Path(name).is_file():
        return pathlib.Path(name)
    if name in packaged_recipes():
        return _PACKAGED / f"{name}.py"
    raise UserError(
        "--config=RECIPE must name a file such as configs/digits.py, or one of the recipes "
        f"{', '.join(packaged_recipes())}; got {recipe or 'none'}"
    )


def default_workdir(recipe: str, config: ml_collections.ConfigDict) -> pathlib.Path:
    """Returns the folder of a run of a recipe for which none is given."""
    word = recipe.partition(":")[2] or config.method
    return pathlib.Path("runs") / recipe_file(recipe).stem / f"{word}-seed{config.seed}"


def packaged_recipes() -> list[str]:
    """Returns the names of the recipes that the package brings along."""
    return sorted({path.stem for path in _PACKAGED.glob("*.py")} - {"__init__", "methods", "networks"})


def override(config: ml_collections.ConfigDict, overrides: list[str]) -> ml_collections.ConfigDict:
    """Returns a configuration with --config.KEY=VALUE arguments applied; raises UserError where they do not fit."""
    _check_overrides(overrides, schema.flatten(config))
    argv, values = ["cskd_jax", *overrides], flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, "Configuration.", values, sys_argv=argv)
    parse_flags(values, argv)
    overridden: Any = values["config"].value
    return overridden


def override_key(argument: str) -> str:
    """Returns KEY of --config.KEY=VALUE."""
    return argument.lstrip("-").partition("=")[0].removeprefix("config.")


def parse_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Returns the arguments that are no flags; raises UserError for one line of what is wrong."""
    try:
        return values(argv)
    except flags.Error as error:
        # The last line is the message; what comes before it is a traceback through the recipe.
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    except Exception as error:  # A recipe is code: it may raise anything.
        raise UserError(f"{' '.join(argv[1:2])}: {type(error).__name__}: {str(error).strip()}") from None


def _check_overrides(overrides: list[str], known: Iterable[str]) -> None:
    for key in map(override_key, overrides):
        if key == "method":
            raise UserError("the method is chosen behind the recipe, --config=RECIPE:METHOD, not by --config.method")
        if key not in known:
            raise schema.unknown_key(key, known)


@contextlib.contextmanager
def _importable_configs(file: pathlib.Path) -> Iterator[None]:
    """Lets a recipe import `configs`: the package in or beside its folder, or else `cskd_jax.configs`."""
    root = file.absolute().parent.parent
    if any((root / "configs").glob("*.py")):
        if str(root) not in sys.path and root / "configs" != _PACKAGED:
            sys.path.append(str(root))
        yield
        return
    before = {name: sys.modules[name] for name in list(sys.modules) if name.partition(".")[0] == "configs"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(_CONFIGS)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
            del sys.modules[name]
        sys.modules.update(before)
