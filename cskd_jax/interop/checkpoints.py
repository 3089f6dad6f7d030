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
      measured: {name of a test set: top-1 accuracy in percent measured with this package}.
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
    measured: dict[str, float]


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


def table() -> list[str]:
    """Returns the lines of the Markdown table in docs/checkpoints.md."""
    known = known_checkpoints().values()
    sets = list(dict.fromkeys(name for checkpoint in known for name in checkpoint.measured))
    head = ["file", "network", "trained on", "mean", "deviation", "stated", *sets]
    rows = [head, ["---"] * len(head)]
    for checkpoint in known:
        mean, std = (", ".join(f"{value:g}" for value in checkpoint.images[name]) for name in ("mean", "std"))
        address = f"[{checkpoint.path.rpartition('/')[2]}]({checkpoint.repository}/blob/HEAD/{checkpoint.path})"
        figures = [checkpoint.stated, *(checkpoint.measured.get(name) for name in sets)]
        cells = ["" if figure is None else f"{figure:.2f}" for figure in figures]
        rows.append([address, f"`{checkpoint.model}`", checkpoint.dataset, mean, std, *cells])
    return [f"| {' | '.join(row)} |" for row in rows]
