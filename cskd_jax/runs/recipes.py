"""Recipes: finding and reading them, filling in defaults, and applying overrides from the command line."""

import contextlib
import functools
import inspect
import operator
import pathlib
import sys
import types
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from typing import Any

import ml_collections

import cskd_jax.configs
from cskd_jax.configs import methods, networks
from cskd_jax.errors import UserError, meant
from cskd_jax.inputs import read_bytes

_MAX_RECIPE = 1 << 20  # bytes of the file of a recipe
_PACKAGED = pathlib.Path(cskd_jax.configs.__file__).parent
# Modules that a recipe may import as `configs`, keyed by the names that they have there.
_CONFIGS = {"configs": cskd_jax.configs, "configs.methods": methods, "configs.networks": networks}


def load_recipe(recipe: str, overrides: list[str]) -> ml_collections.ConfigDict:
    """Returns the configuration of a recipe, with defaults filled in and --config.KEY=VALUE arguments applied.

    Args:
      recipe: RECIPE or RECIPE:WORD, where RECIPE is a file or the name of a packaged recipe.
      overrides: Arguments --config.KEY=VALUE.

    Raises:
      UserError: There is no such recipe, or a key or value does not fit.
    """
    config = read_recipe(recipe)
    # This imports JAX, which takes seconds; an unknown recipe or word is reported without it.
    from cskd_jax.runs import schema

    return override(schema.fill(config).lock(), overrides)


def load_checked(recipe: str, overrides: list[str]) -> ml_collections.ConfigDict:
    """Returns what `load_recipe` returns; raises UserError also for an override that nothing reads."""
    from cskd_jax.runs import schema

    config = load_recipe(recipe, overrides)
    pair = schema.flatten(load_recipe(recipe, [])), schema.flatten(config)
    schema.check_read(map(override_key, overrides), [pair])
    return config


def read_recipe(recipe: str) -> ml_collections.ConfigDict:
    """Returns what the file of a recipe sets, without defaults; this does not import JAX.

    Args:
      recipe: RECIPE or RECIPE:WORD.

    Raises:
      UserError: There is no such recipe, or it does not have the word.
    """
    file = recipe_file(recipe)
    config = _call(recipe, "get_config")
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"get_config of {file} must return a ConfigDict, as in configs/digits.py")
    if "method" not in config:
        raise UserError(f"get_config of {file} must set the key method, the name of the method")
    return config


def load_sources(recipe: str) -> dict[str, str]:
    """Returns {key: source} of the values that a recipe took from published work, if its file has a `get_sources`.

    Args:
      recipe: RECIPE or RECIPE:WORD.

    Raises:
      UserError: There is no such recipe, or it does not have the word.
    """
    return _call(recipe, "get_sources") or {}


def _call(recipe: str, function: str) -> Any:
    """Returns what a function in the file of a recipe returns for its word; None if there is no such function."""
    file = recipe_file(recipe)
    _, colon, word = recipe.partition(":")
    no_recipe = UserError(f"{file} is not a recipe: it has no get_config, as in configs/digits.py")
    # Other files are not executed. A Python file may import get_config.
    if file.suffix != ".py" and b"get_config" not in read_bytes(file, _MAX_RECIPE):
        raise no_recipe
    try:
        with _importable_configs(file):
            module = _read(file)
            found = getattr(module, function, None)
            if found is None:
                if function == "get_config":
                    raise no_recipe
                return None
            arguments = [word] if colon else []
            if not _accepts(found, arguments):
                wrong = f"takes no word: leave out :{word}" if colon else f"needs a word, as in {recipe}:WORD"
                raise UserError(f"{function} of {file} {wrong}")
            return found(*arguments)
    except UserError:
        raise
    except networks.UnknownWordError as error:
        raise UserError(_explain(f"{file.stem}:{word}", error)) from None
    except ValueError as error:  # Recipes raise this for an unknown word.
        raise UserError(str(error)) from None
    except Exception as error:  # A recipe is code: it may raise anything.
        raise UserError(f"--config={recipe}: {type(error).__name__}: {error}") from None


def _explain(recipe, error):
    """Returns what is wrong with the word of RECIPE:WORD, from the error for an unknown part of it."""
    if not error.word:
        return f"{recipe} lacks the name of a {error.kind}, one of {', '.join(error.known)}"
    parts, known = recipe.partition(":")[2].split("/"), {*methods.METHODS, *methods.MULTILABEL_METHODS}
    names = [part for part in parts if set(part.lower().split("+")) <= known]
    if len(parts) == 3 and len(names) == 1 and names[0] != parts[-1]:
        pair = [part for part in parts if part not in names]
        return f"{recipe}: the method comes last, as in {'/'.join([*pair, *names])}"
    suggested = meant(error.word, error.known)
    return f"unknown {error.kind} {error.word!r}; {suggested}" if suggested else str(error)


def _accepts(function, arguments):
    """Returns whether a function can be called with these arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


def recipe_file(recipe: str) -> pathlib.Path:
    """Returns the file of RECIPE or RECIPE:WORD; raises UserError if there is none.

    Args:
      recipe: RECIPE or RECIPE:WORD, where RECIPE is a file or the name of a packaged recipe.
    """
    name = recipe.partition(":")[0]
    if name and pathlib.Path(name).is_file():
        return pathlib.Path(name)
    if name in packaged_recipes():
        return _PACKAGED / f"{name}.py"
    word = recipe.partition(":")[2]
    if word in packaged_recipes():
        raise UserError(f"there is no recipe {name}; did you mean {word}:{name}?")
    suggested = meant(pathlib.Path(name).stem, packaged_recipes())
    if suggested:
        raise UserError(f"there is no recipe {name}; {suggested}")
    raise UserError(
        "--config=RECIPE must name a file such as configs/digits.py, or one of the recipes "
        f"{', '.join(packaged_recipes())}; got {recipe or 'none'}"
    )


def packaged_recipes() -> list[str]:
    """Returns the names of the packaged recipes."""
    return sorted({path.stem for path in _PACKAGED.glob("*.py")} - {"__init__", "benchmark", "methods", "networks"})


def packaged_recipe(name: str, word: str) -> ml_collections.ConfigDict:
    """Returns the configuration of a packaged recipe with a word; raises UserError for an unknown word."""
    return load_recipe(f"{_PACKAGED / name}.py:{word}", [])


def word_without_teacher(multilabel: bool) -> str:
    """Returns the word of the packaged method that needs no teacher.

    Args:
      multilabel: Whether an image has any number of classes instead of one.
    """
    from cskd_jax.training.objective import needs_teacher

    known = methods.MULTILABEL_METHODS if multilabel else methods.METHODS
    return next(word for word in known if not needs_teacher(methods.losses(word, multilabel=multilabel)))


def override(config: ml_collections.ConfigDict, overrides: list[str]) -> ml_collections.ConfigDict:
    """Applies --config.KEY=VALUE arguments to a configuration and returns it; the last one for a key wins.

    Raises:
      UserError: A key is unknown, or a value is not of its type.
    """
    from cskd_jax.runs import schema
    from cskd_jax.training import rules

    known = schema.flatten(config)
    for argument in overrides:
        key = override_key(argument)
        if key == "method":
            raise UserError("the method is set after the recipe, as in --config=RECIPE:METHOD, not by --config.method")
        found = schema.find_key(key)
        if found is None or key not in known:
            raise schema.unknown_key(key, known)
        _, equals, text = argument.partition("=")
        if not equals and found.rule.types[0] is not bool:
            raise UserError(f"--config.{key} needs a value: {key} must be {found.rule.allowed}")
        *sections, name = key.split(".")
        section = functools.reduce(operator.getitem, sections, config)
        section[name] = rules.parse(key, text if equals else "true", found.rule)
    return config


def override_key(argument: str) -> str:
    """Returns KEY of --config.KEY=VALUE."""
    return argument.lstrip("-").partition("=")[0].removeprefix("config.")


def _read(file: pathlib.Path) -> types.ModuleType:
    """Returns the module of a recipe, whose file may have any suffix."""
    loader = SourceFileLoader("cskd_jax_recipe", str(file))
    module = types.ModuleType(loader.name)
    module.__file__ = str(file)
    sys.modules[loader.name] = module  # Dataclasses look up their module here.
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable_configs(file: pathlib.Path) -> Iterator[None]:
    """Lets a recipe import `configs`: the package in or beside its folder, or otherwise `cskd_jax.configs`."""
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
