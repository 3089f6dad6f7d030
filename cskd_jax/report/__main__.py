"""Sets runs beside each other and beside the published results: a page, and tables as Markdown, LaTeX and CSV.

python -m cskd_jax.report RUNS... [--out=DIR] [--data_dir=DIR]
python -m cskd_jax.report --published

  RUNS           folders of finished runs, or of sweeps, or any folders above them
  --out          folder of report.html (the page), report.md and report.tex (its tables), report.csv (a line for each
                 method) and report_runs.csv (a line for each run); default: the folder report in the first of RUNS
  --data_dir     of the data sets, where the runs were made with another; embeddings need the test images
  --published    prints the published tables alone, as Markdown

Exit codes: 0 done; 2 something to mend in the command or the runs.
"""

import pathlib
import sys

import numpy as np
from absl import flags

from cskd_jax.commands import command_line
from cskd_jax.console import say
from cskd_jax.errors import UserError, printable
from cskd_jax.files import refuse_link, write_text
from cskd_jax.report import latex, markdown, page, published, spreadsheet, tables
from cskd_jax.report.curves import Curve
from cskd_jax.report.runs import Comparison, Row, compare, find_runs


def main(argv: list[str]) -> int:
    """Parses the command line, writes the report, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "Folder of the report.", values)
    flags.DEFINE_string("data_dir", None, "Of the data sets.", values)
    flags.DEFINE_boolean("published", False, "Print the published tables alone.", values)
    command = command_line.parse(argv, values)
    if command.recipe or command.overrides:
        raise UserError("a report takes folders of runs; the recipe is in their results: leave out --config")
    if values.published:
        print(markdown.render("Published results", published.MEANING, tables.published_tables()))
        return
    if not command.rest:
        raise UserError("name the folders of the runs, such as runs/sweep/digits")
    folders = [pathlib.Path(folder) for folder in command.rest]
    comparisons = compare(find_runs(folders))
    if values.out is None:
        # The runs may come from elsewhere; --out may be a link, for it comes from the user.
        refuse_link(folders[0] / "report")
    out = pathlib.Path(values.out or folders[0] / "report")
    out.mkdir(parents=True, exist_ok=True)
    command_line.set_up_jax()
    write(comparisons, out, values.data_dir)


def write(comparisons: list[Comparison], out: pathlib.Path, data_dir: str | None) -> None:
    """Writes report.html, report.md, report.tex, report.csv and report_runs.csv into `out`.

    Args:
      comparisons: What to show.
      out: A folder that exists.
      data_dir: See `embedding.measure`.
    """
    sections, texts, papers = [], [], [latex.HEADER]
    for comparison in comparisons:
        parts, shown = _comparison(comparison, data_dir)
        sections += [page.heading(comparison.title), page.note(tables.recipe(comparison)), *parts]
        texts.append(markdown.render(comparison.title, tables.recipe(comparison), shown))
        papers.append(latex.render(comparison.title, shown))
    count = len({run for comparison in comparisons for run in comparison.runs})
    lead = f"{count} runs on {', '.join(sorted({c.dataset for c in comparisons}))}; {_made_with(comparisons)}."
    files = {
        "report.html": page.render("Knowledge distillation: comparison of runs", lead, sections),
        "report.md": "\n".join(texts),
        "report.tex": "\n".join(papers),
        "report.csv": spreadsheet.methods(comparisons),
        "report_runs.csv": spreadsheet.runs(comparisons),
    }
    for name, text in files.items():
        write_text(out / name, text)
    say(f"{count} runs: {out / 'report.html'}, and {', '.join(list(files)[1:])} beside it")


def _made_with(comparisons):
    """Returns devices and versions of all runs."""
    results = [run.results for comparison in comparisons for run in comparison.runs]
    devices = {f"{r['devices']['count']} x {r['devices']['kind']}" for r in results}
    versions = {r["versions"]["cskd_jax"] for r in results}
    return f"made on {', '.join(sorted(devices))} with cskd_jax {', '.join(sorted(versions))}"


def _comparison(comparison, data_dir):
    """Returns the sections of the page for a comparison, and its tables."""
    # Imported late: mistakes in the command should not wait for it.
    from cskd_jax.report import embedding

    shown = [tables.results(comparison), tables.differences(comparison), *tables.ablations(comparison)]
    shown = [table for table in shown if table is not None] + [tables.sizes(comparison)]
    sections = [page.table(table) for table in shown]
    task = comparison.runs[0].task
    lines = [curve for row in comparison.rows if (curve := mean_curve(row)) is not None]
    if lines:
        teacher = comparison.teacher_summary("last")
        score = None if teacher is None else teacher.mean
        sections.append(page.training_curves(lines, score, task.names[task.score]))
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
    """Returns mean and deviation over the seeds at the epochs that all of them have evaluated; None without any."""
    runs = [dict(run.curve()) for run in row.runs]
    epochs = sorted(set.intersection(*(set(run) for run in runs)))
    if not epochs:
        return None
    scores = np.array([[run[epoch] for epoch in epochs] for run in runs])
    band = scores.std(axis=0, ddof=1) if len(runs) > 1 else None
    return Curve(row.label, np.array(epochs, float), scores.mean(axis=0), band)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
