"""The report of comparisons: one HTML page and the same tables as Markdown."""

import pathlib

import numpy as np

from cskd_jax.console import say
from cskd_jax.errors import UserError, printable
from cskd_jax.files import write_text
from cskd_jax.report import markdown, page, tables
from cskd_jax.report.runs import Comparison, Row
from cskd_jax.report.svg import Curve


def write(comparisons: list[Comparison], out: pathlib.Path, data_dir: str | None) -> None:
    """Writes report.html and report.md into `out`.

    Args:
      comparisons: what to show.
      out: a folder that exists.
      data_dir: see `embedding.measure`.
    """
    sections, texts = [], []
    for comparison in comparisons:
        parts, tables_of = _comparison(comparison, data_dir)
        sections += [page.heading(comparison.title), page.note(tables.recipe(comparison)), *parts]
        texts.append(markdown.render(comparison.title, tables.recipe(comparison), tables_of))
    count = len({run for comparison in comparisons for run in comparison.runs})
    lead = f"{count} runs on {', '.join(sorted({c.dataset for c in comparisons}))}; {_made_with(comparisons)}."
    html = page.render("Knowledge distillation: comparison of runs", lead, sections)
    write_text(out / "report.html", html)
    write_text(out / "report.md", "\n".join(texts))
    say(f"{count} runs: {out / 'report.html'}, {out / 'report.md'}")


def _made_with(comparisons):
    """Devices and version of all runs."""
    results = [run.results for comparison in comparisons for run in comparison.runs]
    devices = {f"{r['devices']['count']} x {r['devices']['kind']}" for r in results}
    versions = {r["versions"]["cskd_jax"] for r in results}
    return f"made on {', '.join(sorted(devices))} with cskd_jax {', '.join(sorted(versions))}"


def _comparison(comparison, data_dir):
    """Its sections of the page, and its tables."""
    # Imported late: mistakes in the command should not wait for it.
    from cskd_jax.report import embedding

    shown = [tables.results(comparison), tables.differences(comparison), tables.ablation(comparison)]
    shown = [table for table in shown if table is not None] + [tables.sizes(comparison)]
    sections = [page.table(table) for table in shown]
    task = comparison.runs[0].task
    lines = [curve for row in comparison.rows if (curve := mean_curve(row)) is not None]
    if lines:
        sections.append(page.training_curves(lines, task.names[task.score]))
    try:
        measured = embedding.measure(comparison, data_dir)
    except UserError as error:
        reason = printable(str(error))
        say(f"{comparison.title}: no embeddings: {reason}")
        return [*sections, page.note(f"Embeddings and tightness are left out: {reason}.")], shown
    tightness = tables.tightness(comparison, measured)
    pictures = page.embeddings(measured)
    return [*sections, pictures, page.table(tightness)], [*shown, tightness]


def mean_curve(row: Row) -> Curve | None:
    """Mean and deviation over the seeds of the epochs that all of them have evaluated; None without any."""
    runs = [dict(run.curve()) for run in row.runs]
    epochs = sorted(set.intersection(*(set(run) for run in runs)))
    if not epochs:
        return None
    scores = np.array([[run[epoch] for epoch in epochs] for run in runs])
    band = scores.std(axis=0, ddof=1) if len(runs) > 1 else None
    return Curve(row.label, np.array(epochs, float), scores.mean(axis=0), band)
