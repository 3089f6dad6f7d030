"""The tables of the report as text, from which all formats are made."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from cskd_jax.console import counted
from cskd_jax.errors import printable
from cskd_jax.report import deviations, published
from cskd_jax.report.ablation import find_ablations
from cskd_jax.report.embedding import Embeddings
from cskd_jax.report.published import network_label
from cskd_jax.report.runs import Comparison, short_digest
from cskd_jax.report.statistics import CONFIDENCE, PairedDifference, Summary, paired_difference, summarize

NONE = "-"  # Text of a cell without a value.
# Columns of words rather than numbers.
WORDS = {
    "method", "network", "parts", "difference", "what it shows", "notes",
    "run", "what happened", "published as", "ours", "source", "pair", "whose",
}  # fmt: skip
_UNOFFICIAL = (
    "The data set was prepared from an archive that is not the official one, so these scores may not be comparable "
    "with those on the official data."
)
_TIGHTNESS = (
    "Within / between: mean distance of an embedding from the center of its class, divided by the mean distance "
    "between two centers; the smaller, the tighter the classes and the farther apart."
)


class Table(NamedTuple):
    """A table of strings.

    Attributes:
      title: Title of the table.
      header: Text of each column; the first column names the row.
      rows: Rows with one text per column.
      notes: Sentences below the table.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def recipe(comparison: Comparison) -> str:
    """Describes how all runs were trained, and by which teacher."""
    config, data = comparison.runs[0].config, comparison.runs[0].results["dataset"]
    images = f"{data['train_examples']:,} training and {data['test_examples']:,} test images"
    return f"{counted(config['epochs'], 'epoch')}, {images}, {data['categories']} classes." + _which_teacher(comparison)


def _which_teacher(comparison):
    """Returns a sentence that says which teacher was used; empty if no run has one."""
    if not comparison.distilled:
        return ""
    run = comparison.distilled[0]
    entry = run.results["teacher"]
    if run.given_teacher == "":
        epochs = " or ".join(map(str, sorted({run.config["teacher.epochs"] for run in comparison.distilled})))
        who = "Each run has" if sum(row.has_teacher * len(row.runs) for row in comparison.rows) > 1 else "The run has"
        return f" {who} trained its own teacher: {comparison.teacher}, epochs {epochs}, with the seed of the run."
    if run.has_several_teachers:
        named = [f"{network_label(m['model'], m['width'])}, {_checkpoint(m)}" for m in entry["members"]]
        return f" Teachers: {'; '.join(named)}."
    if run.teacher_run is None:
        return f" Teacher: {comparison.teacher}, {_checkpoint(entry)}."
    trained = f"{counted(run.teacher_epochs, 'epoch')} with seed {run.teacher_run.results['seed']}"
    return f" Teacher: {comparison.teacher}, trained for {trained}, {_checkpoint(entry)}."


def _checkpoint(entry):
    """Describes where a given teacher came from, by its entry in results.json."""
    text = f"checkpoint {entry['checkpoint']}, digest {short_digest(entry['digest'])}"
    origin = entry.get("import")
    if not origin:
        return text
    source = origin.get("source") or origin.get("file", "an unknown file")
    return f"{text}, imported from {source}, SHA-256 {origin.get('sha256', 'unknown')}"


def results(comparison: Comparison) -> Table:
    """Returns the scores of every row, with published values if there are any."""
    marks = deviations.mark(comparison)
    rows = [(*_teacher(comparison), marks.of_row["teacher"] or NONE)] if comparison.teacher_summary("last") else []
    rows += [(row.label, *_scores_of(comparison, row), marks.of_row[row.label] or NONE) for row in comparison.rows]
    table = _without_empty(Table("Results", ("method", *_scores(comparison), "notes"), rows))
    notes = [
        "The teacher, then methods without a teacher, then distillation; the best mean after the last epoch first. "
        "Mean ± sample standard deviation over the seeds. "
        + (
            "The best epoch is chosen on the validation split; all scores are of the test split."
            if comparison.runs[0].chosen_on == "validation"
            else "The best epoch is chosen on the test split by its own score, so it is optimistic: compare methods by "
            "the last epoch."
        )
    ]
    if any(run.results["dataset"].get("official") is False for run in comparison.runs):
        notes.append(_UNOFFICIAL)
    if marks.notes:
        notes += [deviations.MEANING, *marks.notes]
    sources = _sources(comparison)
    if not sources:
        notes.append("There are no published values for this data set with these networks.")
    else:
        meaning = published.MEANING if published.of_paper(sources) else "The next table has their epochs and protocols."
        notes += [f"Sources of the published values: {'; '.join(sources)}.", meaning]
        if marks.notes:
            notes.append("Differences to published values say little where a note says that the recipe was different.")
    return table._replace(notes=tuple(notes))


def _scores_of(comparison, row):
    """Returns the cells of a row in the columns of `_scores`."""
    last, best = row.summary("last"), row.summary("best")
    return str(last.count), summary(last), summary(best), *_beside(comparison, row.method, last, best)


def _scores(comparison):
    """Returns the columns of scores."""
    task = comparison.runs[0].task
    name = task.names[task.score]
    ours = f"last epoch: {name}, %", f"best epoch: {name}, %"
    return "seeds", *ours, "published: %", "best - published", "last - published"


def _without_empty(table):
    """Returns a table without the columns that are empty in every row."""
    kept = [i for i in range(len(table.header)) if any(row[i] != NONE for row in table.rows)]
    return table._replace(
        header=tuple(table.header[i] for i in kept), rows=[tuple(row[i] for i in kept) for row in table.rows]
    )


def _teacher(comparison):
    """Returns the row of the teacher."""
    last, best = comparison.teacher_summary("last"), comparison.teacher_summary("best")
    values = summary(last), NONE if best is None else summary(best)
    return ("teacher", str(last.count), *values, *_beside(comparison, "teacher", last, best))


def _beside(comparison: Comparison, method: str, last: Summary, best: Summary | None) -> tuple[str, str, str]:
    """Returns the cells with the published values and the difference from the first of them."""
    values = published.lookup(comparison.dataset, comparison.teacher, comparison.student, method)
    if not values:
        return NONE, NONE, NONE
    # A value known to be from a specific epoch is compared only with ours from that epoch.
    of_best, of_last = (
        NONE if ours is None or values[0].epoch not in ("", epoch) else f"{ours.mean - values[0].top1:+.2f}"
        for ours, epoch in ((best, "best"), (last, "last"))
    )
    return "; ".join(f"{value.top1:.2f}" for value in values), of_best, of_last


def _sources(comparison):
    """Returns the sources of the published values, in the order in which a row shows them."""
    methods = ["teacher", *(row.method for row in comparison.rows)]
    found = (published.lookup(comparison.dataset, comparison.teacher, comparison.student, m) for m in methods)
    return list(dict.fromkeys(value.source for values in found for value in values))


class Difference(NamedTuple):
    """A line of the paired differences.

    Attributes:
      label: Names of the row and of the reference that it is compared with.
      alone: Difference with the interval of this line by itself.
      corrected: Difference with the interval that is corrected for the number of lines.
    """

    label: str
    alone: PairedDifference
    corrected: PairedDifference


def paired_differences(comparison: Comparison) -> list[Difference]:
    """Returns the paired differences of rows from `Comparison.references`, over common seeds."""
    references = comparison.references
    pairs = [
        (f"{row.label} - {reference.label}", paired_difference(row.scores("last"), reference.scores("last")))
        for position, reference in enumerate(references, 1)
        for row in comparison.rows
        if row not in references[:position]
    ]
    found = [(label, difference) for label, difference in pairs if difference is not None]
    return [Difference(label, alone, alone.corrected(len(found))) for label, alone in found]


def differences(comparison: Comparison) -> Table | None:
    """Returns the table of `paired_differences`; None if there are none."""
    pairs = paired_differences(comparison)
    if not pairs:
        return None
    rows = []
    for label, alone, found in pairs:
        intervals = (interval(alone), interval(found)) if len(pairs) > 1 else (interval(alone),)
        rows.append((label, str(found.count), f"{found.mean:+.2f}", *intervals, found.verdict))
    single, corrected = f"{CONFIDENCE:.0%} interval", f"corrected for {len(pairs)} lines"
    header = ("difference", "seeds", "mean, points", single, corrected, "what it shows")
    notes = (
        f"Runs with the same seed start from the same weights and see the same batches, and are compared in pairs. The "
        f"{single} is Student's t for each line by itself: of twenty lines without a true difference, "
        "one excludes zero on average. "
        + "A reference is the best row of its kind by these same scores, so its own score is optimistic. "
        + (
            f"The corrected interval is wider (Bonferroni), so that all {len(pairs)} lines hold together with "
            f"{CONFIDENCE:.0%} confidence; what a line shows is read from it. "
            if len(pairs) > 1
            else ""
        )
        + _teachers(comparison),
    )
    if len(pairs) == 1:
        header = tuple(name for name in header if name != corrected)
    return Table("Differences after the last epoch", header, rows, notes)


def _teachers(comparison):
    if not comparison.distilled:
        return "No run has a teacher."
    if comparison.distilled[0].given_teacher == "":
        return "Each run has trained a teacher of its own: seeds vary the teacher with the student."
    return "All runs share one teacher: seeds vary only the student; another teacher may give other results."


def ablations(comparison: Comparison) -> list[Table]:
    """Returns a table for each loss that some rows use with all parts and others with only some."""
    found = []
    for entries in find_ablations(comparison):
        rows = [(parts, row.label, *_scores_of(comparison, row)) for parts, row in entries]
        table = _without_empty(Table("Ablation", ("parts", "method", *_scores(comparison)), rows))
        if _sources(comparison):
            table = table._replace(
                notes=("As in table 4 of the paper; its value without either part is that of KD in table 3.",)
            )
        found.append(table)
    return found


def sizes(comparison: Comparison) -> Table:
    """Returns the number of parameters of teacher and student."""
    student = comparison.runs[0].results["student"]["parameters"]
    rows = [(f"student {comparison.student}", f"{student:,}", NONE)]
    if comparison.distilled:
        teacher = comparison.distilled[0].results["teacher"]["parameters"]
        rows = [
            (f"teacher {comparison.teacher}", f"{teacher:,}", NONE),
            (f"student {comparison.student}", f"{student:,}", f"{teacher / student:.2f}x"),
        ]
    return Table("Size", ("network", "parameters", "compression"), rows)


def tightness(measured: Embeddings) -> Table:
    """Returns the distances within classes divided by the distances between them."""
    header = ("network", "runs", "within / between")
    rows = [(label, str(s.count), summary(s, 3)) for label, s in measured.ratios.items()]
    notes = (f"{_TIGHTNESS} Measured on {measured.images:,} test images, the same for all networks.",)
    return Table("Tightness of the classes", header, rows, notes)


def embeddings(comparison: Comparison) -> Table | None:
    """Returns what `evaluate --embedding` measured of the networks; None if it was not run on all runs of a row."""
    measured = {"teacher": [run.teacher_embedding for run in comparison.distilled]}
    measured |= {row.label: [run.embedding for run in row.runs] for row in comparison.rows}
    rows = []
    for label, runs in measured.items():
        values = [run for run in runs if run is not None]
        if values and len(values) == len(runs):
            ratio = summarize([run["within"] / run["between"] for run in values])
            scores = (summary(summarize([100 * run[name] for run in values])) for name in ("knn", "probe"))
            rows.append((label, str(len(values)), summary(ratio, 3), *scores))
    header = ("network", "runs", "within / between", "nearest neighbors: top-1, %", "linear probe: top-1, %")
    notes = (
        f"Measured by evaluate --embedding after the last epoch, on the whole test split. {_TIGHTNESS} "
        "Nearest neighbors and the probe learn from the training split.",
    )
    return Table("Embeddings", header, rows, notes) if rows else None


def unfinished(runs: Sequence[tuple[pathlib.Path, str]]) -> Table | None:
    """Returns the runs that have no results; None if there are none.

    Args:
      runs: Folders, and why they have none, as `find_unfinished` returns them.
    """
    rows = [(printable(str(folder)), why) for folder, why in runs]
    return Table("Runs without results", ("run", "what happened"), rows) if rows else None


def published_tables() -> list[Table]:
    """Returns the tables of published values."""
    columns = published.standard_columns()
    rows = [
        (pair, *(f"{values[column].top1:.2f}" if column in values else NONE for column in columns))
        for pair, values in published.standard_rows()
    ]
    standard = Table(
        "Standard table: cifar100, top1, %", ("teacher, student", *columns), rows, (published.STANDARD_MEANING,)
    )
    return [
        Table(
            f"{table['source']}: {table['dataset']}, {table['metric']}, %",
            ("teacher, student", *table["columns"]),
            [(f"{row['teacher']}, {row['student']}", *map(_published_value, row["values"])) for row in table["rows"]],
        )
        for table in published.tables()
    ] + [standard]


def _published_value(value: float | Sequence[float]) -> str:
    return " / ".join(f"{v:.2f}" for v in (value if isinstance(value, list) else [value]))


def summary(values: Summary, digits: int = 2) -> str:
    """Returns mean and deviation as a text."""
    deviation = "" if values.deviation is None else f" ± {values.deviation:.{digits}f}"
    return f"{values.mean:.{digits}f}{deviation}"


def interval(difference: PairedDifference) -> str:
    """Returns the ends of the interval as a text, or a text for no interval."""
    if difference.margin is None:
        return NONE
    return f"{difference.mean - difference.margin:+.2f} to {difference.mean + difference.margin:+.2f}"
