"""Builds the objects of a run from a configuration; the modules below this one know nothing about configurations."""

import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from cskd_jax.console import pause, say
from cskd_jax.data import ImageDataset, NotPreparedError, load_dataset
from cskd_jax.data.augment import Normalize, augment, enlarged_size
from cskd_jax.data.photographs import MOST_INTERPOLATED, MOST_SUMMED
from cskd_jax.data.samplers import BalancedSampler, UniformSampler
from cskd_jax.distributed.devices import Devices
from cskd_jax.errors import UserError
from cskd_jax.models import create_model, settings_of
from cskd_jax.runs import keys
from cskd_jax.runs.optimization import Training, make_optimizer, make_training
from cskd_jax.runs.trained import Given, check_fits, has_classes_of, starting_variables
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.callbacks import Callback
from cskd_jax.training.checkpoint import load_variables
from cskd_jax.training.evaluation import Evaluation
from cskd_jax.training.metrics import task_of
from cskd_jax.training.mixing import Mix
from cskd_jax.training.networks import Network
from cskd_jax.training.normalization import renormalize
from cskd_jax.training.objective import needs_teacher
from cskd_jax.training.phases import Phase
from cskd_jax.training.prediction import restore_prediction, without_prediction
from cskd_jax.training.saved import Saved
from cskd_jax.training.state import check_variables
from cskd_jax.training.teachers import ForeignTeacher, Teacher, network_of
from cskd_jax.training.trainer import Student, Trainer

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}
# The augmentation settings that mix images with each other.
_MIXING = ("mixup", "cutmix")
# Folded into the seed, so that a teacher and its student start from different weights.
_STREAMS = {"teacher": 0, "student": 1}


class Run(NamedTuple):
    """The objects of a run.

    Attributes:
      dataset: Data set.
      trainer: Trainer of the student.
      teachers: Teachers of the student; empty if no loss needs one.
      teacher_trainer: Trainer of the teacher; None if there is none to train.
      teacher_evaluation: Evaluation of the teacher; None if there is no teacher, or if it has other classes.
    """

    dataset: ImageDataset
    trainer: Trainer
    teachers: Sequence[Teacher] = ()
    teacher_trainer: Trainer | None = None
    teacher_evaluation: Evaluation | None = None


def build(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    devices: Devices,
    dataset: ImageDataset,
    given: Sequence[Given] = (),
    callbacks: Sequence[Callback] = (),
    beside: Run | None = None,
    start: Given | None = None,
) -> Run:
    """Returns the objects of a run, with both trainers created right away so that mistakes show before training.

    Args:
      config: Configuration of the run.
      workdir: Folder of the run.
      devices: Devices to compute on.
      dataset: Data set.
      given: Checkpoints of the teachers; empty if one is to be trained.
      callbacks: Callbacks of the training.
      beside: Run with the same given teachers, to be trained together with this one.
      start: Checkpoint of the weights that the student starts from; None for random ones.

    Raises:
      UserError: Networks, losses, data and the given teacher do not fit together; nothing has been compiled by then.
    """
    make_student = functools.partial(make_trainer, "student", config, dataset, workdir, devices, start=start)
    if not needs_teacher(config.losses):
        return Run(dataset, make_student(callbacks=callbacks))
    if beside is not None:
        return beside._replace(trainer=make_student(beside.teachers, callbacks, beside.trainer))
    if dataset.unlabeled and not given:
        raise UserError("the training images have no labels to train a teacher on: name one with teacher.checkpoint")
    if given:
        teachers, teacher_trainer = _as_teachers(given, config, dataset), None
    else:
        description = describe_network(config.teacher, dataset.image_shape)
        teachers = (Teacher(make_network(description, dataset.num_classes, config.dtype)),)
        teacher_trainer = make_trainer("teacher", config, dataset, workdir, devices, callbacks=callbacks)
    same_classes = all(has_classes_of(one.saved, dataset) for one in given)
    network: Any = network_of(teachers, make_normalize(config), config.teacher.combine, dataset.multilabel)
    return Run(
        dataset,
        make_student(teachers, callbacks),
        teachers,
        teacher_trainer,
        make_evaluation(network, config, dataset, devices) if same_classes else None,
    )


def _as_teachers(given: Sequence[Given], config: ml_collections.ConfigDict, dataset: ImageDataset) -> list[Teacher]:
    """Returns the teachers from checkpoints, with their weights and image sizes."""
    weights = config.teacher.weights or (1.0,) * len(given)
    sizes = config.teacher.image_sizes or (0,) * len(given)
    return [
        Teacher(
            _fitting_network(one.source, one.saved, config, dataset, size or None, other_classes=True),
            one.saved.variables,
            weight,
            image_size=size or None,
        )
        for one, weight, size in zip(given, weights, sizes, strict=True)
    ]


def load_data(config: ml_collections.ConfigDict, prepare: bool = True) -> ImageDataset:
    """Returns the data set of a configuration; raises UserError if it cannot be loaded or normalized.

    Args:
      config: Configuration.
      prepare: Whether the data set may be prepared in its folder, as in `load_dataset`.
    """
    settings = config.dataset
    with pause(f"loading the data set {settings.name}"):
        dataset = load_dataset(
            settings.name,
            data_dir=settings.data_dir,
            path=settings.path,
            train_examples=settings.train_examples,
            validation_examples=settings.validation_examples,
            validation_seed=settings.validation_seed,
            image_size=settings.image_size,
            exif_orientation=settings.exif_orientation,
            streaming=settings.streaming,
            workers=settings.workers,
            prepare=prepare,
        )
    make_normalize(config).checked(dataset.image_shape[-1], "dataset.")
    return dataset


def load_data_of_run(config: ml_collections.ConfigDict) -> ImageDataset:
    """Returns the data set as `load_data` does, but writes nothing into the folder that the configuration names.

    If it is not prepared there, the default folder is used.

    Args:
      config: Configuration of a run that may come from elsewhere. `dataset.data_dir` becomes None for the default.
    """
    if config.dataset.data_dir is not None:
        try:
            return load_data(config, prepare=False)
        except NotPreparedError as error:
            say(f"{error}, the folder of the run: the default folder is used")
            config.dataset.data_dir = None
    return load_data(config)


def precision(config: ml_collections.ConfigDict) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which programs are traced with the precision of a configuration."""
    if config.precision == "default":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(config.precision)


def describe_network(settings: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the description of a network in checkpoints, which consists of arguments of `create_model`.

    Args:
      settings: `config.teacher` or `config.student`.
      image_shape: Shape of the images that it is trained on, (H, W, C).
    """
    own = keys.network_settings(settings)
    if "image_size" in settings_of(settings.name):
        own["image_size"] = tuple(image_shape[:2])
    description = {"name": settings.name, "width": float(settings.width)}
    return description | ({"settings": own} if own else {})


def make_network(description: Mapping[str, Any], num_classes: int, dtype: str) -> LinenNetwork:
    """Returns the network of a description, see `describe_network`."""
    return LinenNetwork(create_model(**description, num_classes=num_classes, dtype=_DTYPES[dtype]))


class TrainedNetwork(NamedTuple):
    """A network with trained weights.

    Attributes:
      network: The network.
      saved: Its variables, and the record saved with them.
    """

    network: Network
    saved: Saved


def load_trained(
    path: pathlib.Path,
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    *,
    other_classes: bool = False,
    best: bool = False,
) -> TrainedNetwork:
    """Returns the network of the newest checkpoint in a folder.

    Args:
      path: Folder, such as WORKDIR/student.
      config: Configuration that says how to compute and how images are normalized.
      dataset: Data set that the network is used on.
      other_classes: Whether it may have other classes, or none; it then gives no logits.
      best: Whether to return that of the best epoch instead.

    Raises:
      UserError: There is no intact checkpoint, or it does not fit the data set.
    """
    saved = load_variables(str(path), best=best)
    network = _fitting_network(f"checkpoint {path}", saved, config, dataset, other_classes=other_classes)
    return TrainedNetwork(network, saved)


def _fitting_network(source, saved, config, dataset, image_size=None, other_classes=False):
    """Returns the network of a checkpoint, which takes images normalized as in the configuration.

    Args:
      source: Name of the checkpoint, for errors.
      saved: Content of the checkpoint.
      config: Configuration of the run.
      dataset: Data set that the network is used on.
      image_size: Side of the squares that it gets; None if it gets the images of the data set unchanged.
      other_classes: Whether it may have other classes, or none; it then gives no logits.
    """
    own, shape = check_fits(source, saved, dataset, other_classes=other_classes), dataset.image_shape
    same_classes = has_classes_of(saved, dataset)
    num_classes = dataset.num_classes if same_classes else saved.num_classes
    network = make_network(saved.record.packaged_network(), num_classes, config.dtype)
    shape = shape if image_size is None else (image_size, image_size, shape[-1])
    check_variables(network, without_prediction(saved.variables), shape, source)
    network = restore_prediction(network, saved.variables, saved.record, source)
    network = renormalize(network, make_normalize(config), own)
    return network if same_classes else ForeignTeacher(network)


def make_sampler(config: ml_collections.ConfigDict, dataset: ImageDataset) -> UniformSampler | BalancedSampler:
    """Returns the sampler that `config.sampler` describes; raises UserError if the labels do not allow it."""
    labels = dataset.train.labels
    if config.sampler.name == "uniform":
        return UniformSampler(len(labels), config.batch_size, config.seed, config.drop_last)
    if dataset.unlabeled:
        raise UserError("sampler.name is balanced, but the training images have no labels: it must be uniform")
    if dataset.multilabel:
        raise UserError(f"sampler.name is balanced, which does not work with the multi-label data set '{dataset.name}'")
    return BalancedSampler(labels, config.batch_size, config.sampler.samples_per_category, config.seed)


def batch_sizes(config: ml_collections.ConfigDict, dataset: ImageDataset) -> tuple[int, ...]:
    """Returns the numbers of images that a step sees at once: in a micro-batch, and in the last one of an epoch."""
    sampler = make_sampler(config, dataset)
    size = max(1, config.batch_size // config.optimizer.accumulation_steps)
    return size, sampler.last_batch_size % size or size


def make_normalize(config: ml_collections.ConfigDict) -> Normalize:
    """Returns the normalization of the images."""
    return Normalize(tuple(config.dataset.mean), tuple(config.dataset.std))


def make_augment(config: ml_collections.ConfigDict) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns the augmentation of single images."""
    return functools.partial(augment, **{key: value for key, value in config.augment.items() if key not in _MIXING})


def make_evaluation(
    network: Network, config: ml_collections.ConfigDict, dataset: ImageDataset, devices: Devices
) -> Evaluation:
    """Returns the evaluation of a network on the test split."""
    normalize = make_normalize(config)
    return Evaluation(
        network,
        dataset.test,
        dataset.num_classes,
        normalize=normalize,
        batch_size=config.batch_size,
        devices=devices,
    )


def make_trainer(
    role: str,
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
    workdir: pathlib.Path | None,
    devices: Devices,
    teachers: Sequence[Teacher] = (),
    callbacks: Sequence[Callback] = (),
    beside: Trainer | None = None,
    start: Given | None = None,
) -> Trainer:
    """Returns the trainer of one network of a run.

    Args:
      role: "teacher", which learns from the labels alone, or "student"; also the name of its folder.
      config: Configuration of the run.
      dataset: Data set.
      workdir: Folder of the run; None writes nothing.
      devices: Devices to compute on.
      teachers: Teachers of the student; empty if its losses need none.
      callbacks: Callbacks of the training.
      beside: Trainer whose teacher pass is shared.
      start: Checkpoint of the weights that the network starts from; None for random ones.

    Raises:
      UserError: Networks, losses and data do not fit together; nothing has been compiled by then.
    """
    description, sampler = describe_network(config[role], dataset.image_shape), make_sampler(config, dataset)
    _check_augment(config.augment, dataset.image_shape)
    if role == "teacher":
        losses = {task_of(dataset.multilabel).supervision: {"weight": 1.0}}
        optimization = config.optimizer.copy_and_resolve_references()
        optimization.learning_rate = config.teacher.learning_rate or optimization.learning_rate
        made = make_optimizer(optimization, config.teacher.epochs, sampler.steps_per_epoch, distills=False)
        training = Training(losses, *made, [Phase(config.teacher.epochs)])
    else:
        training = make_training(config, sampler.steps_per_epoch)
    network, variables = make_network(description, dataset.num_classes, config.dtype), None
    if start is not None:
        variables, is_new = starting_variables(start, network, dataset, config.seed)
        say(f"{role}: starts from {start.path}{', with a new classifier' if is_new else ''}")
    student = Student(
        network,
        training.losses,
        training.optimizer,
        training.schedule,
        config.optimizer.ema_decay,
        variables,
        description=description,
        method=config.method,
    )
    return Trainer(
        {role: student},
        teachers,
        data=dataset,
        phases=training.phases,
        seed=config.seed,
        sampler=sampler,
        normalize=make_normalize(config),
        augment=make_augment(config),
        callbacks=callbacks,
        workdir=workdir,
        devices=devices,
        log_every=config.log_every,
        keep_checkpoints=config.keep_checkpoints,
        save_every_minutes=config.save_every_minutes,
        evaluate_every_epochs=config.evaluate_every_epochs,
        accumulation_steps=config.optimizer.accumulation_steps,
        combine_teachers=config.teacher.combine,
        mix=Mix(config.augment.mixup, config.augment.cutmix),
        stream=_STREAMS[role],
        beside=beside,
    )


def _check_augment(settings: ml_collections.ConfigDict, image_shape: tuple[int, ...]) -> None:
    """Raises UserError if images would have to be made smaller, or if they are too large for an augmentation."""
    (height, width), resize = image_shape[:2], settings.resize
    if 0 < resize < min(height, width):
        raise UserError(
            f"augment.resize is {resize}, but the shorter side of the images has {min(height, width)} pixels: it must "
            f"be 0 or at least {min(height, width)}, since it does not follow dataset.image_size"
        )
    enlarged = enlarged_size(height, width, resize) if resize else (height, width)
    for key, is_used, size, most in (
        ("resize", resize > 0, enlarged, MOST_INTERPOLATED),
        ("crop_area", settings.crop_area < 1, enlarged, MOST_INTERPOLATED),
        ("color_jitter", settings.color_jitter > 0, (height, width), MOST_SUMMED),
    ):
        if is_used and math.prod(size) > most:
            raise UserError(
                f"augment.{key} is {settings[key]:g}, but it takes images of at most {most:,} pixels, and these would "
                f"have {size[1]}x{size[0]}: turn it off, or set a smaller dataset.image_size or augment.resize"
            )
