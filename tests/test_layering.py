"""Imports point down only, and what belongs to one file stays in it; text is UTF-8: read from the syntax trees."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Modules and packages of cskd_jax, highest first: each may import what stands on a line below its own.
LAYERS = (
    ("evaluate", "interop", "main", "report", "supervise", "sweep"),
    ("command_line", "train"),
    ("trained",),
    ("loop",),
    ("config", "lock", "steps"),
    ("checkpoint", "data", "logging", "optim", "signals", "state"),
    ("parallel",),
    ("metrics", "objective"),
    ("losses", "models"),
    ("arguments", "children", "files"),
    ("errors",),
)
LAYER = {component: number for number, components in enumerate(LAYERS) for component in components}
# These know nothing of the package but themselves and the errors.
INDEPENDENT = ("losses", "models", "data")
DEVICE_NAMES = (
    "pmap",
    "device_count",
    "local_device_count",
    "process_index",
    "process_count",
    "distributed",
    "multihost_utils",
)


def sources(package):
    """{path relative to the package: source}."""
    folder = ROOT / package
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.py"))}


def component_of(path):
    """losses/category.py -> losses, steps.py -> steps."""
    return path.split("/")[0].removesuffix(".py")


def imported_modules(source, path="", package="cskd_jax"):
    """Full names of what a file imports, `from a import b` as a.b."""
    parents = [package, *path.split("/")[:-1]]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = parents[: len(parents) - node.level + 1] + base
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


def imported_components(source, path):
    """The modules and packages of cskd_jax that a file imports, but for its own."""
    names = [name.split(".") for name in imported_modules(source, path)]
    return {name[1] for name in names if name[0] == "cskd_jax"} - {component_of(path)}


def upward_imports(source, path):
    own = LAYER[component_of(path)]
    return {component for component in imported_components(source, path) if LAYER[component] <= own}


def packages(source):
    return {name.split(".")[0] for name in imported_modules(source)}


def names_used(source):
    """Every name, attribute and imported name of a file."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.alias):
            used.add(node.name.split(".")[-1])
    return used


def opens_images(source):
    """Whether a file calls open of Pillow's module Image."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == "open" and getattr(node.value, "id", "") == "Image"
        for node in ast.walk(ast.parse(source))
    )


def text_in_the_encoding_of_the_machine(source):
    """Lines that read or write a text file without saying in which encoding."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    lines = []
    for call in calls:
        method = getattr(call.func, "attr", "")
        name = method or getattr(call.func, "id", "")
        modes = {argument.value for argument in call.args if isinstance(argument, ast.Constant)}
        # The function write_text of cskd_jax.files always writes UTF-8; the method of a path does not.
        of_text = method in ("read_text", "write_text") or (name == "open" and modes & {"r", "w", "a", "x"})
        if of_text and "encoding" not in {keyword.arg for keyword in call.keywords}:
            lines.append(call.lineno)
    return lines


FILES, CONFIGS = sources("cskd_jax"), sources("configs")
in_every_file = pytest.mark.parametrize("path", FILES)


def test_there_are_files():
    assert {"main.py", "losses/category.py"} <= set(FILES)


def test_every_component_has_a_layer():
    assert {component_of(path) for path in FILES} - {"__init__"} == set(LAYER)


@in_every_file
def test_imports_point_down(path):
    if path != "__init__.py":
        assert upward_imports(FILES[path], path) == set()


@in_every_file
def test_losses_models_and_data_stand_alone(path):
    if component_of(path) in INDEPENDENT:
        assert imported_components(FILES[path], path) <= {"errors"}


@in_every_file
def test_only_parallel_knows_of_devices(path):
    if path != "parallel.py":
        assert names_used(FILES[path]).isdisjoint(DEVICE_NAMES)


@in_every_file
def test_only_checkpoint_imports_orbax(path):
    assert ("orbax" in packages(FILES[path])) == (path == "checkpoint.py")


@in_every_file
def test_only_images_opens_images(path):
    """There it is said which formats they may have."""
    assert opens_images(FILES[path]) == (path == "data/images.py")


@in_every_file
def test_text_is_in_the_same_encoding_everywhere(path):
    assert text_in_the_encoding_of_the_machine(FILES[path]) == []


@pytest.mark.parametrize("path", CONFIGS)
def test_configs_import_ml_collections_and_configs_alone(path):
    assert packages(CONFIGS[path]) <= {"ml_collections", "configs"}


# The checks themselves.


@pytest.mark.parametrize(
    "source",
    [
        "import cskd_jax.train",
        "from cskd_jax import train",
        "from cskd_jax.train import run",
        "def late():\n    from cskd_jax.train import run",
        "from . import train",
        "from .train import run",
        "from cskd_jax import loop, train",
    ],
)
def test_upward_import_is_found(source):
    assert upward_imports(source, "loop.py") == {"train"}


def test_upward_import_out_of_a_package_is_found():
    assert upward_imports("from ..models import layers", "losses/category.py") == {"models"}


def test_import_within_a_package_is_allowed():
    source = "from cskd_jax.losses.base import Method\nfrom .base import Method"
    assert imported_components(source, "losses/category.py") == set()


def test_import_of_a_neighbour_is_upward():
    assert upward_imports("from cskd_jax.optim import make_optimizer", "state.py") == {"optim"}


@pytest.mark.parametrize(
    "source", ["import jax\njax.pmap(f)", "from jax import pmap", "from jax import pmap as p", "x.pmap"]
)
def test_device_name_is_found(source):
    assert "pmap" in names_used(source)


@pytest.mark.parametrize("source", ['"""Uses jax.pmap."""', "# jax.pmap", "pmap_like = 1"])
def test_mention_is_no_use(source):
    assert "pmap" not in names_used(source)


@pytest.mark.parametrize(
    "source", ["path.read_text()", 'path.write_text("é", errors="x")', 'path.open("w", newline="")']
)
def test_encoding_of_the_machine_is_found(source):
    assert text_in_the_encoding_of_the_machine(source) == [1]
    assert text_in_the_encoding_of_the_machine(source.replace(")", ', encoding="utf-8")').replace("(, ", "(")) == []


@pytest.mark.parametrize("source", ["import orbax.checkpoint as ocp", "from orbax import checkpoint"])
def test_orbax_is_found(source):
    assert "orbax" in packages(source)
