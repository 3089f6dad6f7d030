"""From a configuration to the objects of a run."""

import ml_collections

from cskd_jax.data import ImageDataset, load_dataset
from cskd_jax.data.samplers import BalancedSampler, UniformSampler
from cskd_jax.distributed import devices
from cskd_jax.errors import UserError
from cskd_jax.losses import LOSSES

Sampler = UniformSampler | BalancedSampler


def make_sampler(config: ml_collections.ConfigDict, dataset: ImageDataset) -> Sampler:
    """The sampler that `config.sampler` describes; UserError where the labels do not allow it."""
    labels = dataset.train.labels
    if config.sampler.name == "uniform":
        return UniformSampler(len(labels), config.batch_size, config.seed, config.drop_last)
    if dataset.multilabel:
        raise UserError(f"sampler.name is balanced, which does not fit the multi-label data set '{dataset.name}'")
    return BalancedSampler(labels, config.batch_size, config.sampler.samples_per_category, config.seed)


def _check_methods(losses, dataset: ImageDataset) -> None:
    """Raises UserError for a method that reads another kind of labels than the data set has."""
    wrong = [name for name in losses if LOSSES[name].multilabel not in (None, dataset.multilabel)]
    if wrong:
        fitting = [name for name, method in LOSSES.items() if method.multilabel == dataset.multilabel]
        kind = "any number of categories (multi-label)" if dataset.multilabel else "one category"
        raise UserError(
            f"losses.{wrong[0]} does not fit data set '{dataset.name}', whose images have {kind} each: of the methods "
            f"that read labels, those for it are {', '.join(sorted(fitting))}"
        )


def _check_batches(sampler: Sampler) -> None:
    if sampler.batch_size > sampler.num_examples:
        raise UserError(
            f"batch_size is {sampler.batch_size}; it must not be more than the {sampler.num_examples} training examples"
        )
    if sampler.last_batch_size == 1:
        raise UserError(
            "the last batch of an epoch holds one image, which has nothing to relate to: set drop_last=True"
        )
    devices.check_batch_size("the last batch of an epoch (drop_last=True leaves it out)", sampler.last_batch_size)


def load_data(config: ml_collections.ConfigDict) -> ImageDataset:
    """The data set of `config`; UserError unless mean and deviation are per channel of its images, or one for all."""
    dataset = load_dataset(
        config.dataset.name,
        data_dir=config.dataset.data_dir,
        path=config.dataset.path,
        train_examples=config.dataset.train_examples,
        image_size=config.dataset.image_size,
        streaming=config.dataset.streaming,
        workers=config.dataset.workers,
    )
    channels = dataset.image_shape[-1]
    if len(config.dataset.mean) not in (1, channels):
        raise UserError(
            f"dataset.mean has {len(config.dataset.mean)} values, the images of {dataset.name} have {channels} channels"
        )
    return dataset
