"""Networks that a phase has trained: read back, with the configuration of their run, and held against a data set."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import ml_collections

from cskd_jax.console import say
from cskd_jax.data import ImageDataset
from cskd_jax.distributed import devices
from cskd_jax.errors import UserError
from cskd_jax.runs import schema
from cskd_jax.runs.results import describe
from cskd_jax.training.callbacks import Progress
from cskd_jax.training.checkpoint import FOLDER, load_variables
from cskd_jax.training.evaluation import Evaluation
from cskd_jax.training.metrics import task_of
from cskd_jax.training.networks import Network


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


@dataclasses.dataclass(frozen=True)
class GivenTeacher:
    """A teacher from `config.teacher.checkpoint`.

    Attributes:
      path: folder of its phase.
      variables: of the network, numpy arrays.
      record: saved with them.
    """

    path: str
    variables: Any
    record: dict[str, Any]

    @classmethod
    def load(cls, config: ml_collections.ConfigDict):
        """Reads it; raises UserError unless it is the network that the configuration names, trained to the end."""
        schema.check_teacher_exists(config)
        path = pathlib.Path(config.teacher.checkpoint).expanduser()
        # Of a run's workdir, its teacher is meant.
        path = str(path / "teacher" if (path / "teacher" / FOLDER).is_dir() else path)
        variables, record = load_variables(path)
        wanted = {"name": config.teacher.name, "width": float(config.teacher.width)}
        if record["network"] != wanted:
            raise UserError(f"teacher.checkpoint {path} holds {record['network']}, the configuration asks for {wanted}")
        if not record["finished"]:
            raise UserError(f"teacher.checkpoint {path} is not trained to its end: run its own command again first")
        return cls(path, variables, record)

    def check_fits(self, config: ml_collections.ConfigDict, dataset: ImageDataset) -> None:
        """Raises UserError unless it was trained on such images, such labels, and the same categories."""
        check_fits(f"teacher.checkpoint {self.path}", self.variables, self.record, config, dataset)

    def evaluate(self, network: Network, config: ml_collections.ConfigDict, dataset: ImageDataset):
        """Its variables on every device, and its entry in results.json."""
        variables = devices.replicate(self.variables)
        values = Evaluation(network, config, dataset)(variables)
        say(
            f"teacher: {network.name}, width {network.width:g}, from {self.path}, "
            f"{task_of(dataset.multilabel).describe(values)}"
        )
        entry = describe(network, variables, Progress({"last": values}))
        source = {"checkpoint": self.path, "step": self.record["step"], "digest": self.record["digest"]}
        return variables, entry | source
