"""The known public checkpoints: their entries in checkpoints.json, found by the SHA-256 of a file."""

import functools
import importlib.resources
import json
from typing import Any, NamedTuple


class Checkpoint(NamedTuple):
    """A public checkpoint.

    Attributes:
      sha256: SHA-256 of the file, in hexadecimal digits.
      repository: Address of the repository that holds the file.
      path: Path of the file in that repository.
      origin: Address of the repository that trained the network, if it is a different one.
      model: Name of the network in `MODELS`.
      dataset: Name of the data set that it was trained on.
      categories: Names of its classes, in the order of the logits.
      images: {"size": (H, W), "mean", "std"} of the images that it was trained on.
      normalization: Source of the mean and deviation.
      stated: Top-1 accuracy in percent stated by its authors; None if they state none.
    """

    sha256: str
    repository: str
    path: str
    origin: str
    model: str
    dataset: str
    categories: list[str]
    images: dict[str, Any]
    normalization: str
    stated: float | None


@functools.cache
def known_checkpoints() -> dict[str, Checkpoint]:
    """Returns the known public checkpoints by their SHA-256."""
    text = importlib.resources.files("cskd_jax.interop").joinpath("checkpoints.json").read_text(encoding="utf-8")
    content, found = json.loads(text), {}
    for source in content["sources"]:
        shared = {name: source[name] for name in ("repository", "origin", "normalization")}
        images = {name: source[name] for name in ("size", "mean", "std")}
        for entry in source["checkpoints"]:
            categories = content["categories"][entry["dataset"]]
            checkpoint = Checkpoint(**shared, **entry, images=images, categories=categories)
            found[checkpoint.sha256] = checkpoint
    return found
