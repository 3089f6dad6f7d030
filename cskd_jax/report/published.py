"""Published values: Chen et al. 2020 with the released code and an independent user, and the standard table.

The standard table has the pairs of CRD's reference code (Tian et al. 2020) on CIFAR-100; many papers extend it.
"""

import functools
import importlib.resources
import json
from typing import Any, NamedTuple

MEANING = (
    "Published values are of one run or of an unstated number of runs, without a deviation. The paper does not say "
    "which epoch they are of; the released code reports the best test accuracy over the epochs, so the best epoch is "
    "the like-for-like comparison, and the last epoch the one without selection on the test split. Where there are "
    "several values, the differences are to the first."
)
STANDARD_MEANING = (
    "The standard table continues that of CRD's reference code (Tian et al. 2020): CIFAR-100, 240 epochs, batches of "
    '64. Its columns come from several repositories. Epoch "last" is the last one, "best" the best on the test split, '
    "which is 0.3 points higher on average; where none is given, the source does not say, and ours is of the last "
    "epoch."
)
_DATASETS = {"cub200_2011": "cub200"}


class PublishedValue(NamedTuple):
    """A published number.

    Attributes:
      top1: Top-1 accuracy in percent.
      top5: Top-5 accuracy in percent, or None where it was not published.
      source: Table or other place of publication.
      epoch: Epoch of the value, "last" or "best" (chosen on the test split); empty if not stated.
      deviation: Published standard deviation over runs, or None.
    """

    top1: float
    top5: float | None
    source: str
    epoch: str = ""
    deviation: float | None = None


def _content() -> dict[str, Any]:
    return read_packaged("published.json")


@functools.cache
def read_packaged(name: str) -> dict[str, Any]:
    """Returns the content of a JSON file of this package."""
    return json.loads(importlib.resources.files("cskd_jax.report").joinpath(name).read_text(encoding="utf-8"))


def tables() -> list[dict[str, Any]]:
    """Returns the tables of published.json: id, source, dataset, metric, columns, rows (teacher, student, values)."""
    return _content()["tables"]


def network_label(name: str | None, width: float | None) -> str:
    """Returns the name of a network in the tables: R101_0.5 for ("resnet101", 0.5), "" for no network."""
    if not name:
        return ""
    depth = name.removesuffix("_224").removeprefix("resnet")
    label = f"R{depth}" if depth in ("18", "34", "50", "101", "152") else name
    return label if width in (None, 1) else f"{label}_{width:g}"


def lookup(dataset: str, teacher: str, student: str, method: str) -> list[PublishedValue]:
    """Returns the published values of a method, or of its teacher: first the paper's, then the standard table's.

    Args:
      dataset: Name of the data set.
      teacher: Name of the teacher, as given by `network_label`.
      student: Name of the student, as given by `network_label`.
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
    values = standard_values(dataset, teacher, student)
    column = standard_column(method)
    return found + ([values[column]] if column in values else [])


def of_paper(sources: list[str]) -> bool:
    """Returns whether any of these sources has values of Chen et al. 2020 rather than of the standard table."""
    return bool({table["source"] for table in tables()} & set(sources))


def _network(label):
    """Returns the same spelling for R50, ResNet50 and resnet50."""
    return label.lower().replace("-", "_").replace("resnet", "r")


def _standard() -> dict[str, Any]:
    return read_packaged("published_cifar100_standard.json")


def standard_column(method: str) -> str | None:
    """Returns the column that holds a method of this package, or "teacher"; None if there is none."""
    return _standard()["methods"].get(method)


def standard_columns() -> list[str]:
    """Returns the columns in the order of the table."""
    return _standard()["columns"]


def standard_position(dataset: str, teacher: str, student: str) -> int | None:
    """Returns the position of a pair among the rows of the table; None if it is not there.

    Args:
      dataset: Name of the data set.
      teacher: Name of the teacher, as given by `network_label`.
      student: Name of the student, as given by `network_label`.
    """
    if dataset != _standard()["dataset"]:
        return None
    pairs = [(_standard_label(row["teacher"]), _standard_label(row["student"])) for row in _standard()["rows"]]
    return pairs.index((teacher, student)) if (teacher, student) in pairs else None


def standard_values(dataset: str, teacher: str, student: str) -> dict[str, PublishedValue]:
    """Returns the published values of a pair by column, in table order; arguments as for `standard_position`."""
    found = standard_position(dataset, teacher, student)
    return {} if found is None else _standard_values(_standard()["rows"][found])


def standard_protocols(shown: list[str]) -> list[str]:
    """Returns notes on the columns that are known to use a different protocol."""
    return [
        f"{names}: {text}"
        for names, text in _standard()["protocol_deviations"].items()
        if set(names.split(", ")) & set(shown)
    ]


def standard_rows() -> list[tuple[str, dict[str, PublishedValue]]]:
    """Returns "TEACHER, STUDENT" and the published values of every row."""
    return [(f"{row['teacher']}, {row['student']}", _standard_values(row)) for row in _standard()["rows"]]


def _standard_label(network):
    """Returns the label that a network of the table has here."""
    return _standard()["networks"].get(network, network)


def _standard_values(row):
    pair = row["teacher"], row["student"]
    spread = {
        entry["method"]: entry["sd"]
        for entry in _standard()["standard_deviation"]
        if (entry["teacher"], entry["student"]) == pair
    }
    found = {}
    for column, value in zip(standard_columns(), row["values"], strict=True):
        if value is not None:
            sources = [entry["source"] for entry in _standard()["column_sources"][column]]
            source = next(source for source in sources if source in row["sources"])
            epoch = "" if column in _standard()["epoch_not_stated"] else _standard()["epoch_by_source"].get(source, "")
            found[column] = PublishedValue(value, None, source, epoch, spread.get(column))
    return found
