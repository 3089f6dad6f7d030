"""The tables of the report, as text: what pages of any kind are made of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from cskd_jax.report import published
from cskd_jax.report.embedding import Embeddings
from cskd_jax.report.runs import Comparison, Row
from cskd_jax.report.statistics import CONFIDENCE, PairedDifference, Summary, paired_difference, summarize

_NONE = "-"
_BASELINES = ("ce", "bce", "kd", "bkd")
_ABLATION = {"ce": "labels alone", "kd": "neither part, KD", "intra": "intra", "inter": "inter", "cskd": "both"}


class Table(NamedTuple):
    """A table of texts.

    Attributes:
      title: of the table.
      header: a text for each column; the first column names the row.
      rows: as many texts each.
      notes: sentences below it.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def recipe(comparison: Comparison) -> str:
    """How all runs were trained, and by which teacher where there are several."""
    config, data = comparison.runs[0].config, comparison.runs[0].results["dataset"]
    teacher = comparison.distilled[0].results["teacher"].get("checkpoint") if comparison.given_teacher else None
    return (
        f"{config['epochs']} epochs, {data['train_examples']:,} training and {data['test_examples']:,} test images, "
        f"{data['categories']} categories." + (f" Teacher {comparison.given_teacher}: {teacher}." if teacher else "")
    )


def results(comparison: Comparison) -> Table:
    """Scores of every row, beside the published ones where there are any."""
    rows: list[tuple[str, ...]] = [_teacher(comparison)] if comparison.distilled else []
    for row in comparison.rows:
        best, last = row.summary("best"), row.summary("last")
        beside = _beside(comparison, row.method, last, best)
        rows.append((row.label, str(last.count), summary(last), summary(best), *beside))
    table = _without_empty(Table("Results", ("method", "seeds", *_scores(comparison)), rows))
    notes = [
        "Mean ± sample standard deviation over the seeds. The best epoch is chosen on the test split by its own score, "
        "so it is optimistic: compare methods by the last epoch."
    ]
    if "source" in table.header:
        notes += [published.MEANING, *_different_recipe(comparison)]
    else:
        notes.append("There are no published values for this data set with these networks.")
    return table._replace(notes=tuple(notes))


def _scores(comparison):
    """The columns of scores."""
    task = comparison.runs[0].task
    name = task.names[task.score]
    ours = f"last epoch: {name}, %", f"best epoch: {name}, %"
    return *ours, "published: %", "best - published", "last - published", "source"


def _without_empty(table):
    """Without the columns that say nothing in any row."""
    kept = [i for i in range(len(table.header)) if any(row[i] != _NONE for row in table.rows)]
    return table._replace(
        header=tuple(table.header[i] for i in kept), rows=[tuple(row[i] for i in kept) for row in table.rows]
    )


def _teacher(comparison):
    """The row of the teacher."""
    last, best = (
        [score for run in comparison.distilled if (score := run.teacher_score(epoch)) is not None]
        for epoch in ("last", "best")
    )
    last, best = summarize(last), summarize(best) if best else None
    values = summary(last), _NONE if best is None else summary(best)
    return ("teacher", str(last.count), *values, *_beside(comparison, "teacher", last, best))


def _beside(comparison: Comparison, method: str, last: Summary, best: Summary | None) -> tuple[str, str, str, str]:
    """Published values, the differences to the first, and the sources."""
    values = published.lookup(comparison.dataset, comparison.teacher, comparison.student, method)
    if not values:
        return _NONE, _NONE, _NONE, _NONE
    differences = [_NONE if ours is None else f"{ours.mean - values[0].top1:+.2f}" for ours in (best, last)]
    shown = "; ".join(f"{value.top1:.2f}" for value in values)
    return shown, differences[0], differences[1], "; ".join(value.source for value in values)


def _different_recipe(comparison):
    config = comparison.runs[0].config
    different = []
    if config["epochs"] != published.EPOCHS:
        different.append(f"{config['epochs']} epochs instead of {published.EPOCHS}")
    if config["dataset.train_examples"] is not None:
        different.append(f"{config['dataset.train_examples']:,} training images instead of all")
    if different:
        return [f"Not the published recipe: {', '.join(different)}. Differences to published values say little."]
    return []


def differences(comparison: Comparison) -> Table | None:
    """Every method against cross-entropy and KD, seed by seed, after the last epoch; None without such a pair."""
    rows = []
    for baseline in _BASELINES:
        for row in comparison.rows:
            reference = comparison.row(baseline)
            if reference is None or row is reference or row.method in _BASELINES[: _BASELINES.index(baseline)]:
                continue
            found = paired(row, reference)
            if found is not None:
                label = f"{row.label} - {reference.label}"
                rows.append((label, str(found.count), f"{found.mean:+.2f}", interval(found), found.verdict))
    if not rows:
        return None
    confidence = f"{CONFIDENCE:.0%}"
    header = ("difference", "seeds", "mean, points", f"{confidence} interval", "what it shows")
    notes = (
        f"Runs with the same seed start from the same weights and see the same batches, and are compared in pairs. The "
        f"interval is Student's t, by itself for each line: of twenty such lines, one will exclude zero by chance. "
        f"{_teachers(comparison)}",
    )
    return Table("Differences after the last epoch", header, rows, notes)


def _teachers(comparison):
    count = len(comparison.distilled)
    if count == 1:
        return "All runs share one teacher: seeds vary the student alone; with another teacher it may be otherwise."
    if count == 0:
        return "No run has a teacher."
    return "Each run has trained a teacher of its own: seeds vary the teacher with the student."


def paired(row: Row, baseline: Row) -> PairedDifference | None:
    """Of the last epochs."""
    return paired_difference(row.scores("last"), baseline.scores("last"))


def ablation(comparison: Comparison) -> Table | None:
    """Table 4 of the paper: the two parts of category structure; None unless its runs are there."""
    present: dict[str, Any] = {method: comparison.row(method) for method in _ABLATION}
    if any(present[method] is None for method in ("intra", "inter", "cskd")):
        return None
    rows = []
    for method, parts in _ABLATION.items():
        if present[method] is not None:
            best, last = present[method].summary("best"), present[method].summary("last")
            beside = _beside(comparison, method, last, best)
            rows.append((parts, method, str(last.count), summary(last), summary(best), *beside))
    header = ("parts", "method", "seeds", *_scores(comparison))
    notes = ("As in table 4 of the paper, whose value for neither part is that of KD in its table 3.",)
    return _without_empty(Table("Ablation", header, rows, notes))


def sizes(comparison: Comparison) -> Table:
    """Parameters of teacher and student."""
    student = comparison.runs[0].results["student"]["parameters"]
    rows = [(f"student {comparison.student}", f"{student:,}", _NONE)]
    if comparison.distilled:
        teacher = comparison.distilled[0].results["teacher"]["parameters"]
        rows = [
            (f"teacher {comparison.teacher}", f"{teacher:,}", _NONE),
            (f"student {comparison.student}", f"{student:,}", f"{teacher / student:.2f}x"),
        ]
    return Table("Size", ("network", "parameters", "compression"), rows)


def tightness(comparison: Comparison, embeddings: Embeddings) -> Table:
    """Distances within categories over those between them."""
    header = ("network", "runs", "within / between")
    rows = [(label, str(s.count), summary(s, 3)) for label, s in embeddings.ratios.items()]
    notes = (
        f"Mean distance of an embedding from the center of its category, over the mean distance between two centers; "
        f"{embeddings.images:,} test images, the same for all networks. Smaller: tighter categories, further apart.",
    )
    return Table("Tightness of the categories", header, rows, notes)


def published_tables() -> list[Table]:
    """The published tables alone."""
    return [
        Table(
            f"{table['source']}: {table['dataset']}, {table['metric']}, %",
            ("teacher, student", *table["columns"]),
            [(f"{row['teacher']}, {row['student']}", *map(_published_value, row["values"])) for row in table["rows"]],
        )
        for table in published.tables()
    ]


def _published_value(value: float | Sequence[float]) -> str:
    return " / ".join(f"{v:.2f}" for v in (value if isinstance(value, list) else [value]))


def summary(values: Summary, digits: int = 2) -> str:
    """Mean and deviation."""
    deviation = "" if values.deviation is None else f" ± {values.deviation:.{digits}f}"
    return f"{values.mean:.{digits}f}{deviation}"


def interval(difference: PairedDifference) -> str:
    """Its ends, or that it has none."""
    if difference.margin is None:
        return _NONE
    return f"{difference.mean - difference.margin:+.2f} to {difference.mean + difference.margin:+.2f}"
