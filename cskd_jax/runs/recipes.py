"""Recipes: read, and changed by what stands on the command line."""

import pathlib
import sys

import ml_collections
from absl import flags
from ml_collections import config_flags

from cskd_jax.errors import UserError
from cskd_jax.runs import schema


def load_recipe(recipe: str, overrides: list[str]) -> ml_collections.ConfigDict:
    """The configuration of FILE[:WORD] with --config.KEY=VALUE arguments applied.

    Raises:
      UserError: there is no such recipe, or a key or value does not fit.
    """
    file = recipe_file(recipe)
    # A recipe may import its neighbours, wherever the command is run.
    if str(file.absolute().parent.parent) not in sys.path:
        sys.path.append(str(file.absolute().parent.parent))
    config = _read_recipe(recipe, [])
    if not isinstance(config, ml_collections.ConfigDict) or not {"method", "seed"} <= set(config):
        raise UserError(f"get_config of {file} must return a ConfigDict with all the keys of configs/digits.py")
    _check_overrides(overrides, schema.flatten(config))
    return _read_recipe(recipe, overrides)


def recipe_file(recipe: str) -> pathlib.Path:
    """FILE of FILE[:WORD]; raises UserError unless it exists."""
    file = pathlib.Path(recipe.split(":")[0])
    if not recipe or not file.is_file():
        raise UserError(f"--config=RECIPE must name a file such as configs/digits.py; got {recipe or 'none'}")
    return file


def override(config: ml_collections.ConfigDict, overrides: list[str]) -> ml_collections.ConfigDict:
    """A configuration with --config.KEY=VALUE arguments applied; raises UserError where they do not fit."""
    _check_overrides(overrides, schema.flatten(config))
    argv, values = ["cskd_jax", *overrides], flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, "Configuration.", values, sys_argv=argv)
    parse_flags(values, argv)
    return values["config"].value


def override_key(argument: str) -> str:
    """KEY of --config.KEY=VALUE."""
    return argument.lstrip("-").partition("=")[0].removeprefix("config.")


def _read_recipe(recipe, overrides):
    argv, values = ["cskd_jax", f"--config={recipe}", *overrides], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "Recipe, FILE[:METHOD].", values, lock_config=True, sys_argv=argv)
    parse_flags(values, argv)
    return values["config"].value


def _check_overrides(overrides, known):
    for key in map(override_key, overrides):
        if key == "method":
            raise UserError("the method is chosen behind the recipe, --config=RECIPE:METHOD, not by --config.method")
        if key not in known:
            raise schema.unknown_key(key, known)


def parse_flags(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Returns the arguments that are no flags; raises UserError for one line of what is wrong."""
    try:
        return values(argv)
    except flags.Error as error:
        # The last line is the message; what comes before it is a traceback through the recipe.
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    except Exception as error:  # A recipe is code: it may raise anything.
        raise UserError(f"{' '.join(argv[1:2])}: {type(error).__name__}: {str(error).strip()}") from None
