"""The published values: from Chen et al. 2020, the released code, and an independent user."""

import functools
import importlib.resources
import json
from typing import Any, NamedTuple

MEANING = (
    "Published values are of one run or of an unstated number of runs, without a deviation. The paper does not say "
    "which epoch they are of; the released code reports the best test accuracy over the epochs, so that the best epoch "
    "is the like-for-like comparison, and the last epoch the one without choice on the test split. Where there are "
    "several values, the differences are to the first."
)
_DATASETS = {"cub200_2011": "cub200"}


class PublishedValue(NamedTuple):
    """A published number.

    Attributes:
      top1: Top-1 accuracy in percent.
      top5: Top-5 accuracy in percent, or None where it was not published.
      source: Table or other place of publication.
    """

    top1: float
    top5: float | None
    source: str


@functools.cache
def _content() -> dict[str, Any]:
    return json.loads(
        importlib.resources.files("cskd_jax.report").joinpath("published.json").read_text(encoding="utf-8")
    )


def tables() -> list[dict[str, Any]]:
    """Returns the tables of published.json: id, source, dataset, metric, columns, rows (teacher, student, values)."""
    return _content()["tables"]


def network_label(name: str | None, width: float) -> str:
    """Returns the name of a network in the tables: R101_0.5 for ("resnet101", 0.5), "" for no network."""
    if not name:
        return ""
    depth = name.removesuffix("_224").removeprefix("resnet")
    label = f"R{depth}" if depth in ("18", "34", "50", "101", "152") else name
    return label if width == 1 else f"{label}_{width:g}"


def lookup(dataset: str, teacher: str, student: str, method: str) -> list[PublishedValue]:
    """Returns the published values of a method, or of its teacher.

    Args:
      dataset: Name of the data set.
      teacher: Teacher as `network_label` names it.
      student: Student as `network_label` names it.
      method: Name of the method, or "teacher".
    """
    found, columns = [], _content()["methods"].get(method, [])
    for table in tables():
        if _DATASETS.get(table["dataset"], table["dataset"]) != dataset:
            continue
        for row in table["rows"]:
            if (_network(row["teacher"]), _network(row["student"])) != (_network(teacher), _network(student)):
                continue
            for column, value in zip(table["columns"], row["values"], strict=True):
                if column in columns:
                    top1, top5 = value if isinstance(value, list) else (value, None)
                    found.append(PublishedValue(top1, top5, table["source"]))
    return found


def _network(label):
    """Returns the same spelling for R50, ResNet50 and resnet50."""
    return label.lower().replace("-", "_").replace("resnet", "r")
