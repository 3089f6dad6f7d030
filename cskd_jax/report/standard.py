"""The tables that compare runs with the standard table, CIFAR-100 with the pairs of CRD's reference code."""

from collections.abc import Iterator, Sequence

from cskd_jax.report import published
from cskd_jax.report.published import PublishedValue
from cskd_jax.report.runs import Comparison, Row
from cskd_jax.report.statistics import Summary
from cskd_jax.report.tables import NONE, Table, summary

_HEADER = (
    "published as", "published: %", "epoch", "protocol", "ours", "seeds", "ours: %", "ours - published", "source",
)  # fmt: skip


def beside(comparison: Comparison) -> Table | None:
    """Returns everything published for a pair next to our results, in the order of the table; None for other pairs."""
    values = published.standard_values(comparison.dataset, comparison.teacher, comparison.student)
    if not values:
        return None
    rows = [line for column, value in values.items() for line in _lines(comparison, column, value)]
    unpublished = [row for row in comparison.rows if published.standard_column(row.method) not in values]
    rows += [_line(NONE, None, row.label, row.summary("last")) for row in unpublished]
    protocols = published.standard_protocols(list(values))
    notes = [published.STANDARD_MEANING]
    if protocols:
        notes.append(f"Own protocols: {'; '.join(protocols)}.")
    return Table("Beside the standard table", _HEADER, rows, tuple(notes))


def _lines(comparison: Comparison, column: str, value: PublishedValue) -> Iterator[tuple[str, ...]]:
    """Yields a line for each of our rows that belongs to a column, or one line without our results."""
    epoch = value.epoch or "last"
    if column == published.standard_column("teacher") and comparison.distilled:
        yield _line(column, value, "teacher", comparison.teacher_summary(epoch))
        return
    found = [row for row in comparison.rows if published.standard_column(row.method) == column]
    for row in found:
        yield _line(column, value, row.label, row.summary(epoch))
    if not found:
        yield _line(column, value, NONE, None)


def _line(column: str, value: PublishedValue | None, label: str, ours: Summary | None) -> tuple[str, ...]:
    mine = (NONE, NONE) if ours is None else (str(ours.count), summary(ours))
    if value is None:
        return column, NONE, NONE, NONE, label, *mine, NONE, NONE
    difference = NONE if ours is None else f"{ours.mean - value.top1:+.2f}"
    protocol = "own" if published.standard_protocols([column]) else "standard"
    return column, _percent(value), value.epoch or NONE, protocol, label, *mine, difference, value.source


def _percent(value: PublishedValue) -> str:
    return f"{value.top1:.2f}" + ("" if value.deviation is None else f" ± {value.deviation:.2f}")


def overview(comparisons: Sequence[Comparison]) -> Table | None:
    """Returns our scores and the published ones of all pairs, in the order of the table; None for fewer than two."""
    pairs = [c for c in comparisons if published.standard_values(c.dataset, c.teacher, c.student)]
    if len(pairs) < 2:
        return None
    methods = list(dict.fromkeys(row.method for comparison in pairs for row in comparison.rows))
    place = {column: number for number, column in enumerate(published.standard_columns())}
    methods.sort(key=lambda method: place.get(published.standard_column(method) or "", len(place)))
    rows = []
    for comparison in pairs:
        values = published.standard_values(comparison.dataset, comparison.teacher, comparison.student)
        teacher = comparison.teacher_summary("last")
        ours = (NONE if teacher is None else summary(teacher), *(_best_row(comparison, m) for m in methods))
        theirs = (values.get(published.standard_column(method) or "") for method in ("teacher", *methods))
        rows.append((comparison.title, "ours", *ours))
        rows.append((comparison.title, "published", *(NONE if v is None else _percent(v) for v in theirs)))
    notes = (
        "Ours is the mean after the last epoch ± the standard deviation over the seeds, with the number of seeds; of "
        "several rows of a method, the first of its section. " + published.STANDARD_MEANING,
    )
    return Table("The standard table", ("pair", "whose", "teacher", *methods), rows, notes)


def _best_row(comparison: Comparison, method: str) -> str:
    row: Row | None = next((row for row in comparison.rows if row.method == method), None)
    if row is None:
        return NONE
    found = row.summary("last")
    return f"{summary(found)} ({found.count})"
