"""The published values: the tables of Chen et al. 2020, of the released code, and of an independent user."""

import functools
import importlib.resources
import json
from typing import Any, NamedTuple

# All published recipes train for so long; of CUB-200-2011 nothing is known.
EPOCHS = 200
MEANING = (
    "Published values are of one run or of an unstated number of runs, without a deviation. The paper does not say "
    "which epoch they are of; the released code reports the best test accuracy over the epochs, so that the best epoch "
    "is the like-for-like comparison, and the last epoch the one without choice on the test split. Where there are "
    "several values, the differences are to the first."
)
# Of table 4, "neither" has the value that table 3 gives for KD.
_METHODS = {"neither": "kd", "both": "cskd", "CSKD run 1": "cskd", "CSKD run 2": "cskd"}
_DATASETS = {"cub200_2011": "cub200"}


class PublishedValue(NamedTuple):
    """A published number.

    Attributes:
      top1: percent.
      top5: percent, or None where it was not published.
      source: table or place.
    """

    top1: float
    top5: float | None
    source: str


@functools.cache
def tables() -> list[dict[str, Any]]:
    """The tables of published.json: id, source, dataset, metric, columns, rows (teacher, student, values)."""
    text = importlib.resources.files(str(__package__)).joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)["tables"]


def network_label(name: str | None, width: float) -> str:
    """A network as the tables name it, such as R101_0.5 for ("resnet101", 0.5); empty for no network."""
    if not name:
        return ""
    depth = name.removesuffix("_224").removeprefix("resnet")
    label = f"R{depth}" if depth in ("18", "34", "50", "101", "152") else name
    return label if width == 1 else f"{label}_{width:g}"


def lookup(dataset: str, teacher: str, student: str, method: str) -> list[PublishedValue]:
    """The published values of a data set, a pair of networks (`network_label`) and a method of ours or "teacher"."""
    found = []
    for table in tables():
        if _DATASETS.get(table["dataset"], table["dataset"]) != dataset:
            continue
        for row in table["rows"]:
            if (_network(row["teacher"]), _network(row["student"])) != (_network(teacher), _network(student)):
                continue
            for column, value in zip(table["columns"], row["values"], strict=True):
                if _METHODS.get(column, column.lower()) == method.removesuffix("_paper"):
                    top1, top5 = value if isinstance(value, list) else (value, None)
                    found.append(PublishedValue(top1, top5, f"{table['source']}, {column}"))
    return found


def _network(label):
    """One spelling for R50, ResNet50 and resnet50."""
    return label.lower().replace("-", "_").replace("resnet", "r")
