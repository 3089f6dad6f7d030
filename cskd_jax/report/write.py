"""The report of comparisons: an HTML page, and its tables as Markdown, LaTeX and CSV."""

import pathlib
from collections.abc import Sequence

import numpy as np

from cskd_jax.console import counted, say
from cskd_jax.errors import UserError, printable
from cskd_jax.files import write_text
from cskd_jax.report import latex, markdown, page, spreadsheet, standard, tables
from cskd_jax.report.curves import Curve
from cskd_jax.report.runs import Comparison, Row


def write(
    comparisons: list[Comparison],
    unfinished: Sequence[tuple[pathlib.Path, str]],
    out: pathlib.Path,
    data_dir: str | None,
) -> None:
    """Writes report.html, report.md, report.tex, report.csv, report_runs.csv and report_differences.csv into `out`.

    Args:
      comparisons: Comparisons to report.
      unfinished: Folders of runs without results, and why they have none.
      out: Existing folder.
      data_dir: Folder of the data sets, as in `embedding.measure`.
    """
    sections, texts, papers = [], [], []
    for comparison in comparisons:
        parts, shown = _comparison(comparison, data_dir)
        sections += [page.heading(comparison.title), page.note(tables.recipe(comparison)), *parts]
        texts.append(markdown.render(comparison.title, tables.recipe(comparison), shown))
        papers.append((comparison.title, shown))
    count = len({run for comparison in comparisons for run in comparison.runs})
    for title, table in (("All pairs", standard.overview(comparisons)), ("Other runs", tables.unfinished(unfinished))):
        if table is not None:
            sections.append(page.table(table))
            texts.append(markdown.render(title, "", [table]))
            papers.append((title.lower(), [table]))
    datasets = ", ".join(sorted({comparison.dataset for comparison in comparisons}))
    lead = f"{counted(count, 'run')} on {datasets}; {_made_with(comparisons)}."
    files = {
        "report.html": page.render("Knowledge distillation: comparison of runs", lead, sections),
        "report.md": "\n".join(texts),
        "report.tex": latex.render(papers),
        "report.csv": spreadsheet.methods(comparisons),
        "report_runs.csv": spreadsheet.runs(comparisons),
        "report_differences.csv": spreadsheet.differences(comparisons),
    }
    for name, text in files.items():
        write_text(out / name, text)
    say(f"{counted(count, 'run')}: {out / 'report.html'}, and {', '.join(list(files)[1:])} beside it")


def _made_with(comparisons):
    """Returns a description of the devices and versions of all runs."""
    results = [run.results for comparison in comparisons for run in comparison.runs]
    devices = {f"{r['devices']['count']} x {r['devices']['kind']}" for r in results}
    versions = {r["versions"]["cskd_jax"] for r in results}
    return f"made on {', '.join(sorted(devices))} with cskd_jax {', '.join(sorted(versions))}"


def _comparison(comparison, data_dir):
    """Returns the sections of the page for a comparison, and its tables."""
    # Imported late, so that mistakes in the command are reported immediately.
    from cskd_jax.report import embedding

    shown = [tables.results(comparison), standard.beside(comparison), tables.differences(comparison)]
    shown = [table for table in [*shown, *tables.ablations(comparison)] if table is not None]
    shown.append(tables.sizes(comparison))
    sections = [page.table(table) for table in shown]
    task = comparison.runs[0].task
    lines = [curve for row in comparison.rows if (curve := mean_curve(row)) is not None]
    if lines:
        teacher = comparison.teacher_summary("last")
        score = None if teacher is None else teacher.mean
        sections.append(page.training_curves(lines, score, task.names[task.score], comparison.runs[0].chosen_on))
    distances = tables.embeddings(comparison)
    try:
        measured = embedding.measure(comparison, data_dir)
    except UserError as error:
        reason = printable(str(error))
        say(f"{comparison.title}: no pictures of embeddings: {reason}")
        what = "Embeddings and tightness" if distances is None else "Pictures of embeddings"
        sections.append(page.note(f"{what} are left out: {reason}."))
    else:
        sections.append(page.embeddings(measured))
        distances = distances or tables.tightness(measured)
    if distances is not None:
        sections.append(page.table(distances))
        shown.append(distances)
    return sections, shown


def mean_curve(row: Row) -> Curve | None:
    """Returns the mean and deviation over the seeds at the epochs that all runs evaluated; None if there are none."""
    runs = [dict(run.curve()) for run in row.runs]
    epochs = sorted(set.intersection(*(set(run) for run in runs)))
    if not epochs:
        return None
    scores = np.array([[run[epoch] for epoch in epochs] for run in runs])
    band = scores.std(axis=0, ddof=1) if len(runs) > 1 else None
    return Curve(row.label, np.array(epochs, float), scores.mean(axis=0), band)
