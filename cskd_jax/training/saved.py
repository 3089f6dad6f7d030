"""The content of a checkpoint of a network: its variables, and a JSON record that says what they are."""

import dataclasses
import json
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cskd_jax.errors import UserError
from cskd_jax.inputs import is_count, is_list, is_map, is_number, is_optional, is_text, unsound
from cskd_jax.models import VISION_TRANSFORMERS
from cskd_jax.training.prediction import is_prediction


@dataclasses.dataclass(frozen=True)
class Record:
    """The JSON record that is saved with the arrays of a network.

    Attributes:
      network: {"name", "width"} of a network of `MODELS`, and its "settings" if it has any; {"name"} of any other
        network.
      channels: Number of channels of the images.
      categories: Names of the classes by label; None if unknown.
      multilabel: Whether an image has any number of classes.
      images: {"size": (H, W), "mean", "std"} of the training images, as far as known.
      method: Name of the method that trained it.
      prediction: {"loss", "settings"} of the loss with which it predicts; empty if its own logits are the prediction.
      finished: Whether it was trained to the end.
      progress: Fields of `callbacks.Progress`.
    """

    network: dict[str, Any]
    channels: int
    categories: list[str] | None = None
    multilabel: bool = False
    images: dict[str, Any] = dataclasses.field(default_factory=dict)
    method: str = ""
    prediction: dict[str, Any] = dataclasses.field(default_factory=dict)
    finished: bool = False
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Record":
        """Returns the record that was saved as `values`; keys of later versions are ignored.

        Raises:
          ValueError: A value is missing or has another type.
        """
        wrong = unsound(values, {"network": _is_network, "channels": partial(is_count, low=1)}, _RECORD_TESTS)
        if wrong:
            raise ValueError(f"its record has no valid {', '.join(wrong)}")
        images, channels = values.get("images", {}), values["channels"]
        if not {len(images[name]) for name in ("mean", "std") if name in images} <= {1, channels}:
            raise ValueError(f"its record has no mean and std of images with {channels} channels")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def check(self, name: str) -> None:
        """Raises UserError, which begins with `name`, unless the record can be saved and read again."""
        try:
            Record.from_json(json.loads(json.dumps(dataclasses.asdict(self))))
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: checkpoints could not be read again: {error}") from None

    def packaged_network(self) -> dict[str, Any]:
        """Returns arguments of `create_model`; raises UserError if the network is not part of this package."""
        if "width" not in self.network:
            name = self.network["name"]
            raise UserError(
                f"the checkpoint holds a {name}, which is not a network of this package: if cskd_jax.distill made it, "
                "cskd_jax.load_run(workdir, student=MODULE) reads it"
            )
        found = {"settings": {}, **self.network}
        settings = {key: tuple(x) if isinstance(x, list) else x for key, x in found["settings"].items()}
        return {"name": found["name"], "width": found["width"], "settings": settings}

    def describe_network(self) -> str:
        """Returns a readable description of the network, such as "resnet18, width 0.25"."""
        return self.network["name"] + (f", width {self.network['width']:g}" if "width" in self.network else "")


def _is_network(value):
    # `models.check_settings` knows which setting takes which of these.
    settings = is_map(lambda x: type(x) is bool or is_text(x) or is_number(x) or is_list(is_number)(x))
    tests = {"width": lambda width: is_number(width) and 0 < width <= 64, "settings": settings}
    return not unsound(value, {"name": is_text}, tests)


def _is_images(value):
    """Returns whether a value describes images: their size, and perhaps mean and deviation by channel."""
    size, numbers = is_list(partial(is_count, low=1)), is_list(is_number)
    tests = {"size": lambda sides: size(sides) and len(sides) == 2 and max(sides) <= 10**5}
    tests |= {
        "mean": lambda means: numbers(means) and means,
        "std": lambda stds: numbers(stds) and stds and min(stds) > 0,
    }
    return not unsound(value, {}, tests) and value.keys() <= tests.keys() and ("mean" in value) == ("std" in value)


def _is_progress(value):
    metrics = is_map(is_number)
    tests = {"evaluations": is_map(metrics), "test": is_map(metrics), "sums": metrics}
    tests |= {"count": is_count, "seconds": is_number, "images": is_count}
    return not unsound(value, {}, tests) and value.keys() <= tests.keys()


_RECORD_TESTS = {
    "categories": is_optional(is_list(is_text)),
    "multilabel": lambda value: type(value) is bool,
    "images": _is_images,
    "method": is_text,
    "prediction": is_prediction,
    "finished": lambda value: type(value) is bool,
    "progress": _is_progress,
    "version": is_count,
}


class Saved(NamedTuple):
    """The network of a checkpoint.

    Attributes:
      variables: {"params": ..., and its other collections}, numpy arrays; their moving average if one was kept.
      record: Record saved with them.
      step: Number of steps after which the checkpoint was saved.
      digest: Digest of all arrays of the checkpoint.
    """

    variables: dict[str, Any]
    record: Record
    step: int
    digest: str

    @property
    def num_classes(self) -> int:
        """Returns the number of classes of a network of this package, 0 for a Vision Transformer without a head.

        Raises:
          UserError: The classifier is missing or damaged.
        """
        params = self.variables["params"]
        if "classifier" not in params and self.record.network["name"] in VISION_TRANSFORMERS:
            return 0
        try:
            (classes,) = np.shape(params["classifier"]["bias"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"the checkpoint of a {self.record.describe_network()} holds no classifier") from None
        return classes
