"""The scores as CSV, with plain numbers for programs and spreadsheets."""

from collections.abc import Iterable, Iterator
from typing import Any

from cskd_jax.files import csv_text
from cskd_jax.report import deviations, published, tables
from cskd_jax.report.runs import Comparison
from cskd_jax.report.statistics import PairedDifference, Summary

_SECTION = ("dataset", "teacher", "student", "teacher_digest", "data_fingerprint")
_SCORES = ("last_mean", "last_std", "best_mean", "best_std")


def methods(comparisons: Iterable[Comparison]) -> str:
    """Returns a line for each row of the comparisons, with scores in percent; unknown ones are empty."""
    header = (
        *_SECTION,
        "method",
        "metric",
        "seeds",
        *_SCORES,
        "published",
        "published_source",
        "differs",
        "published_epoch",
    )
    return csv_text([header, *(line for comparison in comparisons for line in _methods(comparison))])


def runs(comparisons: Iterable[Comparison]) -> str:
    """Returns a line for each run of the comparisons, with scores in percent."""
    header = (*_SECTION, "method", "metric", "seed", "last", "best", "best_epoch", "folder")
    return csv_text([header, *(line for comparison in comparisons for line in _runs(comparison))])


def differences(comparisons: Iterable[Comparison]) -> str:
    """Returns a line for each paired difference of the comparisons, in points; ends of unknown intervals are empty."""
    ends = ("low", "high", "corrected_low", "corrected_high")
    header = (*_SECTION, "difference", "metric", "seeds", "mean", *ends, "shows")
    return csv_text([header, *(line for comparison in comparisons for line in _differences(comparison))])


def _methods(comparison: Comparison) -> Iterator[list[Any]]:
    differs = deviations.find(comparison)
    if last := comparison.teacher_summary("last"):
        best = comparison.teacher_summary("best")
        yield _method(comparison, "teacher", "teacher", last, best, differs["teacher"])
    for row in comparison.rows:
        last, best = row.summary("last"), row.summary("best")
        yield _method(comparison, row.label, row.method, last, best, differs[row.label])


def _method(comparison, label, method, last, best, differs):
    values = published.lookup(comparison.dataset, comparison.teacher, comparison.student, method)
    beside, epoch = ((values[0].top1, values[0].source), values[0].epoch) if values else ((None, None), "")
    scores = *_numbers(last), *_numbers(best)
    return [*_section(comparison), label, _metric(comparison), last.count, *scores, *beside, "; ".join(differs), epoch]


def _runs(comparison: Comparison) -> Iterator[list[Any]]:
    for row in comparison.rows:
        for run in row.runs:
            scores = _rounded(run.score("last")), _rounded(run.score("best")), run.results["student"]["best"]["epoch"]
            folder = str(run.folder)
            yield [*_section(comparison), row.label, _metric(comparison), run.results["seed"], *scores, folder]


def _differences(comparison: Comparison) -> Iterator[list[Any]]:
    for label, alone, corrected in tables.paired_differences(comparison):
        numbers = _rounded(alone.mean), *_ends(alone), *_ends(corrected)
        yield [*_section(comparison), label, _metric(comparison), alone.count, *numbers, corrected.verdict]


def _section(comparison):
    networks = comparison.teacher, comparison.student
    return comparison.dataset, *networks, comparison.teacher_digest, comparison.data_fingerprint


def _metric(comparison):
    return comparison.runs[0].task.score


def _numbers(values: Summary | None):
    return (None, None) if values is None else (_rounded(values.mean), _rounded(values.deviation))


def _ends(difference: PairedDifference):
    mean, margin = difference.mean, difference.margin
    return (None, None) if margin is None else (_rounded(mean - margin), _rounded(mean + margin))


def _rounded(value):
    """Returns a number rounded so that rounding errors do not show."""
    return None if value is None else round(value, 6)
