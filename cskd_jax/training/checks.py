"""Checks that losses, batches and data fit together, before anything is traced."""

import numpy as np

from cskd_jax.data import ImageDataset
from cskd_jax.data.arrays import is_one_hot
from cskd_jax.data.batches import EpochBatches, Sampler
from cskd_jax.data.photographs import MOST_SUMMED
from cskd_jax.errors import UserError
from cskd_jax.losses import LOSSES
from cskd_jax.losses.logits import CrossEntropy
from cskd_jax.training.objective import Objective
from cskd_jax.training.setup import Setup

# Losses that are for both kinds of labels.
_OTHERS = "; losses that read no labels and use no softmax also work, such as at and mse_logits"
# What a caller may have meant who gives labels [N, K].
_ONE_HOT = "; if each image has one class, give labels [N], such as labels.argmax(1)"


def check_losses(objective: Objective, data: ImageDataset, mixes: bool = False) -> None:
    """Raises UserError for a loss that needs a kind of labels or images that the data do not have.

    Args:
      objective: Losses.
      data: Data set.
      mixes: Whether images are mixed with each other.
    """
    if not objective.losses:
        raise UserError("losses must name at least one loss")
    predicting = [name for name, (_, loss) in objective.losses.items() if loss.predicts]
    if len(predicting) > 1:
        raise UserError(f"losses.{predicting[0]} and losses.{predicting[1]} both replace the prediction: leave one out")
    if objective.views and data.image_dtype != np.uint8:
        name = next(name for name, (_, loss) in objective.losses.items() if loss.views)
        raise UserError(
            f"losses.{name} uses strongly augmented images, which are made from uint8 images; got {data.image_dtype}"
        )
    _check_all_views(objective)
    height, width = data.image_shape[:2]
    if objective.views and height * width > MOST_SUMMED:
        raise UserError(
            f"strongly augmented images have at most {MOST_SUMMED:,} pixels, and these have {width}x{height}: use "
            "smaller images (dataset.image_size in a recipe)"
        )
    wrong = [
        name for name, (_, loss) in objective.losses.items() if _needs_multilabel(loss) not in (None, data.multilabel)
    ]
    if wrong:
        fitting = [name for name, loss in LOSSES.items() if _needs_multilabel(loss(num_classes=2)) == data.multilabel]
        kind = "any number of classes (multi-label)" if data.multilabel else "one class"
        others = _OTHERS if data.multilabel else ""
        one_hot = data.multilabel and is_one_hot(data.train.labels) and is_one_hot(data.test.labels)
        raise UserError(
            f"losses.{wrong[0]} does not work with data set '{data.name}', whose images have {kind} each: losses for "
            f"such labels are {', '.join(sorted(fitting))}{others}{_ONE_HOT if one_hot else ''}"
        )
    if data.unlabeled:
        _check_unlabeled(objective)
    if mixes:
        _check_mixed(objective, data)


def _check_all_views(objective):
    """Raises UserError for a cross-entropy of all views where there is only one."""
    for name, (_, loss) in objective.losses.items():
        if isinstance(loss, CrossEntropy) and loss.all_views and not objective.views:
            raise UserError(
                f"losses.{name}.all_views is True, but no loss uses further views of the images: leave it out, or add "
                "one, such as mlkd"
            )


def _needs_multilabel(loss):
    """Returns the kind of data that a loss is for: multi-label (True), one class per image (False), or both (None)."""
    return False if loss.softmax else loss.multilabel


def _check_unlabeled(objective):
    """Raises UserError for a loss that reads labels."""
    reading = [name for name, (_, loss) in objective.losses.items() if loss.reads_labels]
    if reading:
        fitting = {name for name, loss in LOSSES.items() if not loss(num_classes=2).reads_labels} - {*reading}
        raise UserError(
            f"losses.{reading[0]} reads labels, but the training images have none: losses that read none are "
            f"{', '.join(sorted(fitting))}"
        )


def _check_mixed(objective, data):
    """Raises UserError for a loss that cannot handle mixed images."""
    for name, (_, loss) in objective.losses.items():
        if loss.reads_labels and data.multilabel:
            raise UserError(
                f"mixup and cutmix do not work with losses that read multi-label data, such as losses.{name}: set both "
                "to 0"
            )
        if loss.reads_labels and not loss.mixes:
            raise UserError(
                f"mixup and cutmix give an image two labels, but losses.{name} reads only one: leave it out, or set "
                "both to 0; cross_entropy, dml, and losses that read no labels work with them"
            )
        if loss.views:
            raise UserError(
                f"losses.{name} uses further views of the images, which are not mixed: set mixup and cutmix to 0"
            )


def check_batches(setup: Setup) -> None:
    """Raises UserError for batches that are impossible or not divisible by the number of devices."""
    sampler = setup.sampler
    if not isinstance(sampler.batch_size, int | np.integer) or sampler.batch_size < 1:
        raise UserError(f"batch_size is {sampler.batch_size!r}; it must be a positive integer")
    if sampler.batch_size > sampler.num_examples:
        raise UserError(
            f"batch_size is {sampler.batch_size}; it must not be more than the {sampler.num_examples} training examples"
        )
    if sampler.batch_size == 1:
        raise UserError("batch_size is 1; it must be at least 2, since batch normalization and losses compare images")
    setup.devices.check_batch_size("batch_size", sampler.batch_size)
    if sampler.last_batch_size == 1:
        raise UserError(
            "the last batch of an epoch holds one image, but needs at least two: "
            + _how_to_avoid(sampler, "another batch_size")
        )
    makes_batches = isinstance(sampler, EpochBatches)
    last = "the last batch of an epoch" + ("" if makes_batches else " (drop_last=True leaves it out)")
    setup.devices.check_batch_size(last, sampler.last_batch_size)
    if setup.accumulation_steps > 1:
        _check_micro_batches(setup)


def _how_to_avoid(sampler: Sampler, another: str) -> str:
    """Returns advice on how to avoid a last batch that is too small."""
    if isinstance(sampler, EpochBatches):
        return "have train leave it out, or add images to it"
    return f"set drop_last=True, or {another}"


def _check_micro_batches(setup: Setup) -> None:
    """Raises UserError for micro-batches that are impossible."""
    sampler, steps = setup.sampler, setup.accumulation_steps
    if sampler.batch_size % steps:
        raise UserError(f"batch_size is {sampler.batch_size}, which is not divisible by accumulation_steps, {steps}")
    size = sampler.batch_size // steps
    setup.devices.check_batch_size(
        f"a micro-batch (batch_size {sampler.batch_size} / accumulation_steps {steps})", size
    )
    if size == 1:
        raise UserError(
            f"with accumulation_steps={steps}, a micro-batch holds one image, but needs at least two: "
            "set a smaller accumulation_steps"
        )
    if sampler.last_batch_size % size == 1:
        raise UserError(
            f"with accumulation_steps={steps}, the last micro-batch of an epoch holds one image, but needs at least "
            f"two: {_how_to_avoid(sampler, 'accumulation_steps=1')}"
        )
