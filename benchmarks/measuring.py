"""Functions that the benchmarks share: timing, ratios that withstand a noisy machine, plain tables."""

import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

MISSING_TORCH = "PyTorch is not installed (pip install 'cskd_jax[torch]'): only JAX is measured"


def has_torch() -> bool:
    """Returns whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


class Part(NamedTuple):
    """The outcome of one part of the benchmark.

    Attributes:
      title: Heading of the table.
      rows: Rows of the table, {column: value}, all with the same columns.
      notes: Notes that a reader needs to understand the figures.
    """

    title: str
    rows: list[dict[str, Any]]
    notes: list[str]


def milliseconds(function: Callable[[], Any]) -> float:
    """Returns the time of one call, up to the moment when the arrays that it returns are ready."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return 1e3 * (time.perf_counter() - start)


def interleaved(functions: Sequence[Callable[[], Any]], repeats: int, warm_up: int = 3) -> list[list[float]]:
    """Returns the milliseconds of each function in each of `repeats` rounds, every function once in a round.

    If the machine becomes slower for a while, that affects all functions alike.
    """
    for function in functions:
        for _ in range(warm_up):
            milliseconds(function)
    rounds = [[milliseconds(function) for function in functions] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds, strict=True)]


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Returns the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def render(part: Part) -> str:
    """Returns a table with a heading, aligned columns and the notes below."""
    columns = list(part.rows[0])
    cells = [columns] + [[_text(row[column]) for column in columns] for row in part.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [isinstance(part.rows[0][column], str) for column in columns]
    lines = [part.title, "=" * len(part.title)]
    for row in cells:
        padded = [
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines + [f"- {note}" for note in part.notes])


def save(path: pathlib.Path | None, environment: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Writes where the parts were measured, and all their figures, to a JSON file, if one is given."""
    if path is not None:
        figures = {"environment": environment} | {name: part._asdict() for name, part in parts.items()}
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _text(value):
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
