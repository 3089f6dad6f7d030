"""Checkpoints of trained networks: loading a given teacher, and checking that a network fits a data set."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from cskd_jax.data import ImageDataset
from cskd_jax.data.augment import Normalize
from cskd_jax.distributed import processes
from cskd_jax.errors import UserError
from cskd_jax.files import full_path
from cskd_jax.models import create_model, settings_of
from cskd_jax.runs import schema
from cskd_jax.runs.keys import network_settings
from cskd_jax.training.checkpoint import FOLDER, load_record, load_variables
from cskd_jax.training.networks import Network, Variables
from cskd_jax.training.objective import needs_teacher
from cskd_jax.training.prediction import without_prediction
from cskd_jax.training.saved import Record, Saved
from cskd_jax.training.state import check_variables, init_network

# The linear layers with which a network of `MODELS` tells classes apart.
_CLASSIFIERS = ("classifier", "distillation_classifier")
# Settings of a network that change what it computes, but not the shapes of its weights.
_NOT_IN_SHAPES = {"num_heads"}


class Given(NamedTuple):
    """A network that a configuration names by its checkpoint.

    Attributes:
      key: Key of the configuration.
      path: Folder of the checkpoint.
      saved: Content of the checkpoint.
    """

    key: str
    path: str
    saved: Saved

    @property
    def source(self) -> str:
        """Returns the name of the checkpoint in error messages."""
        return f"{self.key} {self.path}"


def load_given_teachers(config: ml_collections.ConfigDict) -> tuple[Given, ...]:
    """Returns the checkpoints that `teacher.checkpoint` and `teacher.others` name, which the first process reads.

    Raises:
      UserError: A checkpoint is not trained to the end, or the first is not that of the configured network.
    """
    processes.on_first(schema.check_teacher_exists, config)
    return tuple(processes.on_first(_load_teacher, config, number) for number in range(1 + len(config.teacher.others)))


def check_given(config: ml_collections.ConfigDict, trained_before: bool = False) -> None:
    """Raises the UserError of `load_given_teachers` or `load_start` if the records of the checkpoints show it.

    This neither reads weights nor uses devices, which a sweep leaves to its runs.

    Args:
      config: Configuration.
      trained_before: Whether the teacher of `teacher.checkpoint` is trained before the run, so that it need not exist.
    """
    schema.check_teacher_exists(config, trained_before)
    if needs_teacher(config.losses) and config.teacher.checkpoint is not None:
        for number in range(int(trained_before), 1 + len(config.teacher.others)):
            _load_teacher(config, number, load_record)
    if config.student.checkpoint is not None:
        _load(config, "student", load_record)


def _load_teacher(config, number, load=load_variables):
    """Returns the checkpoint of a teacher by its number; raises UserError like `load_given_teachers`."""
    if number:
        teacher = _load_at("teacher.others", config.teacher.others[number - 1], "teacher", load)
    else:
        teacher = _load(config, "teacher", load)
        _check_settings(teacher, "teacher", network_settings(config.teacher))
    if not teacher.saved.record.finished:
        raise UserError(f"{teacher.source} is not fully trained: run its own command again first")
    return teacher


def load_start(config: ml_collections.ConfigDict) -> Given:
    """Returns the checkpoint that `student.checkpoint` names.

    Raises:
      UserError: The checkpoint is not that of the configured network.
    """
    return _load(config, "student")


def _load(config, role, load=load_variables):
    """Returns the checkpoint of the network of a role; raises UserError if it is not the configured one."""
    settings = config[role]
    given = _load_at(f"{role}.checkpoint", settings.checkpoint, role, load)
    wanted = {"name": settings.name, "width": float(settings.width)}
    held = {key: given.saved.record.network.get(key) for key in wanted}
    if held != wanted:
        raise UserError(f"{given.source} holds {held}, but the configuration specifies {wanted}")
    if role == "student":
        # A teacher has the settings of its checkpoint. The shapes of the weights do not show the number of heads.
        network: Any = create_model(**wanted, settings=network_settings(settings), num_classes=2)
        names = _NOT_IN_SHAPES & settings_of(settings.name).keys()
        _check_settings(given, role, {name: getattr(network, name) for name in names})
    return given


def _load_at(key: str, folder: str, role: str, load: Callable[[str], Saved]) -> Given:
    """Returns the checkpoint in a folder; the workdir of a run stands for its network in that role."""
    path = full_path(folder)
    if path.is_file():
        raise UserError(
            f"{key} {folder} is a file, not the folder of a checkpoint; cskd-jax import-torch {folder} --model=NAME "
            "--num_classes=N --out=DIR makes such a folder from a file of PyTorch"
        )
    path = str(path / role if (path / role / FOLDER).is_dir() else path)
    return Given(key, path, load(path))


def starting_variables(start: Given, network: Network, dataset: ImageDataset, seed: int) -> tuple[Variables, bool]:
    """Returns the variables that a student starts from, and whether its classifier is a new one.

    Args:
      start: Result of `load_start`.
      network: Network of the student.
      dataset: Data set that it is trained on.
      seed: Seed of a new classifier, which is created unless the classes are those of the checkpoint.

    Raises:
      UserError: The checkpoint does not fit the network, for example because it is for another image size.
    """
    variables, shape = dict(without_prediction(start.saved.variables)), dataset.image_shape
    is_new = start.saved.record.categories != list(dataset.categories)
    if is_new:
        fresh = jax.jit(functools.partial(init_network, network, image_shape=shape))(jax.random.PRNGKey(seed))[0]
        heads = {name: fresh["params"][name] for name in _CLASSIFIERS if name in fresh["params"]}
        others = {name: values for name, values in variables["params"].items() if name not in _CLASSIFIERS}
        variables["params"] = {**others, **jax.device_get(heads)}
    check_variables(network, variables, shape, start.source)
    return variables, is_new


def _check_settings(given: Given, role: str, asked: Mapping[str, Any]) -> None:
    """Raises UserError unless the network of a checkpoint has the settings that a configuration asks for."""
    network = given.saved.record.packaged_network()
    held: Any = create_model(**network, num_classes=2)
    for name, value in asked.items():
        own = getattr(held, name)
        if own != value:
            remedy = "leave it at None" if role == "teacher" else f"set it to {own}"
            raise UserError(
                f"{given.source} holds a {network['name']} with {name} {own}, but the configuration specifies {value} "
                f"for {role}.{name}: {remedy}"
            )


def check_fits(source: str, saved: Saved, dataset: ImageDataset, *, other_classes: bool = False) -> Normalize | None:
    """Raises UserError unless a network was trained on images, labels and classes like those of a data set.

    Images may have another size. How much accuracy that costs depends on the network.

    Args:
      source: Name of the checkpoint, for the message.
      saved: The checkpoint.
      dataset: Data set that the network is used on.
      other_classes: Whether the network may have other classes, or none.

    Returns:
      The normalization of the images that the network was trained on; None if it is not known.
    """
    record, channels = saved.record, dataset.image_shape[-1]
    if record.channels != channels:
        raise UserError(
            f"{source} takes images with {record.channels} channels, but those of {dataset.name} have {channels}"
        )
    if other_classes and not has_classes_of(saved, dataset):
        return normalization_of(source, record)
    if record.multilabel != dataset.multilabel:
        one, several = "one class per image", "several classes per image"
        raise UserError(
            f"{source} was trained with {one if dataset.multilabel else several}, "
            f"but {dataset.name} has {several if dataset.multilabel else one}"
        )
    _check_classes(source, saved, dataset)
    return normalization_of(source, record)


def identity_of_teachers(teachers: Sequence[Given], config: ml_collections.ConfigDict) -> str:
    """Returns the digests of teachers and, if it differs from that of the run, the normalization of their images."""
    given, found = Normalize(config.dataset.mean, config.dataset.std), []
    for teacher in teachers:
        own, digest = normalization_of(teacher.source, teacher.saved.record), teacher.saved.digest
        if own is not None and not own.is_same(given):
            digest = f"{digest} with mean {list(own.mean)}, std {list(own.std)}"
        found.append(digest)
    return " + ".join(found)


def normalization_of(source: str, record: Record) -> Normalize | None:
    """Returns the normalization that a network was trained with; None if an imported one does not know it."""
    mean, std = (record.images.get(name) for name in ("mean", "std"))
    if mean is None or std is None:
        return None
    if not isinstance(mean, list | tuple) or not isinstance(std, list | tuple):
        raise UserError(f"{source}: the mean and std of its images are not lists of numbers")
    return Normalize(tuple(mean), tuple(std)).checked(record.channels, f"{source}: ")


def has_classes_of(saved: Saved, dataset: ImageDataset) -> bool:
    """Returns whether a network has the classes of a data set, as far as it knows their names."""
    theirs = saved.record.categories
    return saved.num_classes == dataset.num_classes if theirs is None else theirs == list(dataset.categories)


def _check_classes(source: str, saved: Saved, dataset: ImageDataset) -> None:
    ours, theirs = list(dataset.categories), saved.record.categories
    if not has_classes_of(saved, dataset):
        number = saved.num_classes if theirs is None else len(theirs)
        names = "" if theirs is None else f" ({', '.join(theirs[:3])}, ...)"
        raise UserError(
            f"{source} has {number} classes{names}, but {dataset.name} has {len(ours)} ({', '.join(ours[:3])}, ...)"
        )
