"""Recipes from Python: read a recipe, run it, and load its results, or a trained network as a teacher."""

import pathlib
from typing import Any, NamedTuple

import ml_collections

from cskd_jax.errors import UserError
from cskd_jax.files import local_folder
from cskd_jax.inputs import read_json
from cskd_jax.models import create_model
from cskd_jax.runs import recipes, schema
from cskd_jax.runs.results import RESULTS
from cskd_jax.runs.run import train
from cskd_jax.runs.trained import normalization_of
from cskd_jax.runs.workdir import default_workdir
from cskd_jax.training.adapters import as_network
from cskd_jax.training.checkpoint import load_variables
from cskd_jax.training.prediction import PredictingModule, PredictingNetwork, restore_prediction, without_prediction
from cskd_jax.training.state import check_variables
from cskd_jax.training.teachers import Teacher


class LoadedRun(NamedTuple):
    """The student and the results of a run.

    Attributes:
      network: The student, a linen module: `network.apply(variables, images, train=False)`, for images that are
        normalized like those of the run. If the method replaces the prediction of the student, as simkd does, the
        module predicts like that method. An nnx module holds the variables: `network(images)`.
      variables: Its variables, numpy arrays.
      results: Content of results.json; empty if the run is not done.
    """

    network: Any
    variables: dict[str, Any]
    results: dict[str, Any]


def get_config(recipe: str) -> ml_collections.ConfigDict:
    """Returns the configuration of a recipe, which may be changed and passed to `run`.

    Args:
      recipe: Name of a packaged recipe or path of a file, followed by a colon and a word if it takes one:
        "cifar100:kd".

    Raises:
      UserError: There is no such recipe.
    """
    return recipes.load_recipe(recipe, [])


def run(recipe: str | ml_collections.ConfigDict, workdir: str | pathlib.Path | None = None) -> LoadedRun:
    """Runs a recipe, resuming where an earlier start in the same workdir stopped.

    Args:
      recipe: Recipe as in `get_config`, or a configuration.
      workdir: Folder of the run; by default the one that the command uses, runs/RECIPE/WORD-seedSEED.

    Raises:
      UserError: Something is wrong that the user can fix. InterruptedRun and DivergedError are subclasses.
    """
    config = get_config(recipe) if isinstance(recipe, str) else schema.fill(recipe)
    if workdir is None:
        if not isinstance(recipe, str):
            raise UserError("run(config) needs a workdir; only a recipe has one by default")
        workdir = default_workdir(recipe, config)
    workdir = local_folder(workdir)
    train(config, workdir)
    return load_run(workdir)


def load_run(
    workdir: str | pathlib.Path, student: Any = None, *, best: bool = False, name: str = "student"
) -> LoadedRun:
    """Returns the student of a run, as it is after the last epoch, and its results.

    Args:
      workdir: Folder of the run, or of a `distill` call.
      student: Linen module or nnx module that was trained, if it is not part of this package.
      best: Whether to return it as it was after the best epoch instead.
      name: Name of the student, if a `distill` call trained several.

    Raises:
      UserError: There is no such run, its network is not one of this package and `student` is not given, or `student`
        has other variables.
    """
    workdir = local_folder(workdir)
    saved = load_variables(str(workdir / name), best=best)
    if student is None:
        try:
            network = saved.record.packaged_network()
        except UserError as error:
            raise UserError(f"{workdir}: {error}") from None
        student = create_model(**network, num_classes=saved.num_classes)
    network: Any = as_network(student)
    if "size" in saved.record.images:
        shape = (*saved.record.images["size"], saved.record.channels)
        check_variables(network, without_prediction(saved.variables), shape, str(workdir / name))
    predicting = restore_prediction(network, saved.variables, saved.record, str(workdir))
    if isinstance(predicting, PredictingNetwork):
        student = PredictingModule(predicting)
    elif hasattr(network, "with_variables"):
        student = network.with_variables(saved.variables)
    results = workdir / RESULTS
    return LoadedRun(student, saved.variables, read_json(results) if results.exists() else {})


def load_teacher(path: str | pathlib.Path, *, best: bool = False) -> Teacher:
    """Returns a trained network of this package as a teacher, for `distill` or `Trainer`.

    Images reach it as in its training: in its own normalization and, if it is a Vision Transformer for square images,
    in its own size.

    Args:
      path: Folder of one network: the output of `cskd-jax import-torch`, WORKDIR/teacher or WORKDIR/student.
      best: Whether to return it as it was after its best epoch, and not after the last one.

    Raises:
      UserError: There is no such checkpoint, or its network is not one of this package.
    """
    source = f"checkpoint {path}"
    saved = load_variables(str(local_folder(path)), best=best)
    description = saved.record.packaged_network()
    network = as_network(create_model(**description, num_classes=saved.num_classes))
    network = restore_prediction(network, saved.variables, saved.record, source)
    # Other networks take images of any size.
    sides = set(description["settings"].get("image_size", ()))
    side = int(sides.pop()) if len(sides) == 1 else None
    return Teacher(network, saved.variables, normalization=normalization_of(source, saved.record), image_size=side)
