"""Checkpoints of trained networks: loading a given teacher, and checking that a network fits a data set."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from cskd_jax.data import ImageDataset
from cskd_jax.data.augment import Normalize
from cskd_jax.errors import UserError
from cskd_jax.files import full_path
from cskd_jax.models import create_model
from cskd_jax.runs import schema
from cskd_jax.runs.keys import network_settings
from cskd_jax.training.checkpoint import FOLDER, load_variables
from cskd_jax.training.networks import Network, Variables
from cskd_jax.training.prediction import without_prediction
from cskd_jax.training.saved import Record, Saved
from cskd_jax.training.state import check_variables, init_network

# The linear layers of a network of `MODELS` that tell classes apart.
_CLASSIFIERS = ("classifier", "distillation_classifier")


def load_given_teacher(config: ml_collections.ConfigDict) -> tuple[str, Saved]:
    """Returns the folder and the checkpoint that `teacher.checkpoint` names.

    Raises:
      UserError: The checkpoint is not that of the configured network, trained to the end.
    """
    schema.check_teacher_exists(config)
    path, saved = _load(config, "teacher")
    _check_settings(path, saved.record, network_settings(config.teacher))
    if not saved.record.finished:
        raise UserError(f"teacher.checkpoint {path} is not trained to its end: run its own command again first")
    return path, saved


def load_start(config: ml_collections.ConfigDict) -> tuple[str, Saved]:
    """Returns the folder and the checkpoint that `student.checkpoint` names.

    Raises:
      UserError: The checkpoint is not that of the configured network.
    """
    return _load(config, "student")


def _load(config, role):
    """Returns folder and checkpoint of the network of a role; raises UserError if that is another than configured."""
    settings = config[role]
    path = full_path(settings.checkpoint)
    # The workdir of a run is taken to mean its network of that role.
    path = str(path / role if (path / role / FOLDER).is_dir() else path)
    saved = load_variables(path)
    wanted = {"name": settings.name, "width": float(settings.width)}
    held = {key: saved.record.network.get(key) for key in wanted}
    if held != wanted:
        raise UserError(f"{role}.checkpoint {path} holds {held}, the configuration asks for {wanted}")
    return path, saved


def starting_variables(
    start: tuple[str, Saved], network: Network, dataset: ImageDataset, seed: int
) -> tuple[Variables, bool]:
    """Returns the variables that a student starts from, and whether its classifier is a new one.

    Args:
      start: Result of `load_start`.
      network: Network of the student.
      dataset: Data set that it is trained on.
      seed: Seed of a new classifier, which there is unless the classes are those of the checkpoint.

    Raises:
      UserError: The checkpoint does not fit the network, such as one for another size of images.
    """
    path, saved = start
    variables, shape = dict(without_prediction(saved.variables)), dataset.image_shape
    is_new = saved.record.categories != list(dataset.categories)
    if is_new:
        fresh = jax.jit(functools.partial(init_network, network, image_shape=shape))(jax.random.PRNGKey(seed))[0]
        heads = {name: fresh["params"][name] for name in _CLASSIFIERS if name in fresh["params"]}
        others = {name: values for name, values in variables["params"].items() if name not in _CLASSIFIERS}
        variables["params"] = {**others, **jax.device_get(heads)}
    check_variables(network, variables, shape, f"student.checkpoint {path}")
    return variables, is_new


def _check_settings(path: str, record: Record, asked: Mapping[str, Any]) -> None:
    """Raises UserError unless the network of a checkpoint has the settings that a configuration asks for."""
    network = record.packaged_network()
    held: Any = create_model(**network, num_classes=2)
    for name, value in asked.items():
        own = getattr(held, name)
        if own != value:
            raise UserError(
                f"teacher.checkpoint {path} holds a {network['name']} with {name} {own}, the configuration asks for "
                f"teacher.{name} {value}: leave it at None"
            )


def check_fits(source: str, saved: Saved, dataset: ImageDataset) -> Normalize | None:
    """Raises UserError unless a network was trained on images, labels and classes like those of a data set.

    Images may have another size. How much accuracy that costs depends on the network.

    Args:
      source: Name of the checkpoint, for the message.
      saved: The checkpoint.
      dataset: Data set that the network is used on.

    Returns:
      The normalization of the images that the network was trained on; None if it is not known.
    """
    record, channels = saved.record, dataset.image_shape[-1]
    if record.channels != channels:
        raise UserError(
            f"{source} takes images with {record.channels} channels, those of {dataset.name} have {channels}"
        )
    if record.multilabel != dataset.multilabel:
        one, several = "one class per image", "several classes per image"
        raise UserError(
            f"{source} was trained with {one if dataset.multilabel else several}, "
            f"{dataset.name} has {several if dataset.multilabel else one}"
        )
    _check_classes(source, saved, dataset)
    return _own_normalization(source, record)


def identity_of_teacher(source: str, saved: Saved, config: ml_collections.ConfigDict) -> str:
    """Returns the digest of a teacher and, where it is not that of the run, the normalization of its images.

    Args:
      source: Name of the checkpoint, for errors.
      saved: The checkpoint.
      config: Configuration of the run.
    """
    own, given = _own_normalization(source, saved.record), Normalize(config.dataset.mean, config.dataset.std)
    if own is None or own.is_same(given):
        return saved.digest
    return f"{saved.digest} with mean {list(own.mean)}, std {list(own.std)}"


def _own_normalization(source: str, record: Record) -> Normalize | None:
    """Returns the normalization that a network was trained with; None where an imported one does not know it."""
    mean, std = (record.images.get(name) for name in ("mean", "std"))
    if mean is None or std is None:
        return None
    if not isinstance(mean, list | tuple) or not isinstance(std, list | tuple):
        raise UserError(f"{source}: mean and std of its images are no lists of numbers")
    return Normalize(tuple(mean), tuple(std)).checked(record.channels, f"{source}: ")


def _check_classes(source: str, saved: Saved, dataset: ImageDataset) -> None:
    ours, theirs = list(dataset.categories), saved.record.categories
    # An imported network may not know their names.
    number = saved.num_classes if theirs is None else len(theirs)
    if number != len(ours) or theirs not in (None, ours):
        names = "" if theirs is None else f" ({', '.join(theirs[:3])}, ...)"
        raise UserError(
            f"{source} knows {number} classes{names}, {dataset.name} has {len(ours)} ({', '.join(ours[:3])}, ...)"
        )
