"""Networks that a phase has trained: read back, with the configuration of their run, and held against a data set."""

import json
import pathlib
from typing import Any, NamedTuple

import ml_collections

from cskd_jax import config as config_lib
from cskd_jax.checkpoint import load_variables
from cskd_jax.data import ImageDataset, load_dataset
from cskd_jax.errors import UserError
from cskd_jax.loop import Network

# Beside the configuration, config.json of a run whose teacher was given holds that teacher's digest.
TEACHER_DIGEST = "teacher.checkpoint digest"


class TrainedNetwork(NamedTuple):
    """A network with trained weights.

    Attributes:
      network: with its name and width.
      variables: {"params", "batch_stats"}, numpy arrays.
      record: saved with them, see `checkpoint.load_variables`.
    """

    network: Network
    variables: dict[str, Any]
    record: dict[str, Any]


def load_trained(path: pathlib.Path, config: ml_collections.ConfigDict, dataset: ImageDataset) -> TrainedNetwork:
    """The network of the newest checkpoint in the folder of a phase.

    Args:
      path: the folder, such as WORKDIR/student.
      config: says how to compute, and how the images are normalized.
      dataset: that it is to be used on.

    Raises:
      UserError: there is no sound checkpoint, or it does not fit the data set or the configuration.
    """
    variables, record = load_variables(str(path))
    check_fits(f"checkpoint {path}", variables, record, config, dataset)
    network = Network.create(ml_collections.ConfigDict(record["network"]), dataset.num_classes, config.dtype)
    return TrainedNetwork(network, variables, record)


def check_fits(
    source: str,
    variables: dict[str, Any],
    record: dict[str, Any],
    config: ml_collections.ConfigDict,
    dataset: ImageDataset,
) -> None:
    """Raises UserError unless a network was trained on such images, such labels, and the same categories.

    Images may have another size: what it costs a network depends on the network, and is for the user to measure.

    Args:
      source: its checkpoint, for the message.
      variables: of the network.
      record: saved with them.
      config: says how the images are normalized.
      dataset: that it is to be used on.
    """
    channels = dataset.image_shape[-1]
    if record["channels"] != channels:
        raise UserError(
            f"{source} takes images with {record['channels']} channels, those of {dataset.name} have {channels}"
        )
    # An imported network does not know how its images were normalized.
    for name, theirs in record.get("images", {}).items():
        if name != "size" and _per_channel(theirs, channels) != _per_channel(config.dataset[name], channels):
            raise UserError(
                f"{source} was trained with dataset.{name} {tuple(theirs)}, it is {tuple(config.dataset[name])} here"
            )
    if record.get("multilabel", False) != dataset.multilabel:
        one, several = "one category per image", "several categories per image"
        raise UserError(
            f"{source} was trained with {one if dataset.multilabel else several}, "
            f"{dataset.name} has {several if dataset.multilabel else one}"
        )
    ours, theirs = list(dataset.categories), record["categories"]
    # An imported network may not know their names.
    number = len(variables["params"]["classifier"]["bias"] if theirs is None else theirs)
    if number != len(ours) or theirs not in (None, ours):
        names = "" if theirs is None else f" ({', '.join(theirs[:3])}, ...)"
        raise UserError(
            f"{source} knows {number} categories{names}, {dataset.name} has {len(ours)} ({', '.join(ours[:3])}, ...)"
        )


def _per_channel(values, channels):
    """Given per channel, or one for all."""
    return list(values) * (channels // len(values))


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


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file of a run; raises UserError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return found


def run_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `workdir`; raises UserError if it holds none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is no workdir of a run: there is no {path.name} in it")
    flat = read_json(path)
    flat.pop(TEACHER_DIGEST, None)
    return config_lib.restore(flat, str(path))
