"""Compares runs with each other and with the published results: a page, and tables as Markdown, LaTeX and CSV.

cskd-jax report RUNS... [--out=DIR] [--data_dir=DIR]
cskd-jax report --published

  RUNS           folders of finished runs, or of sweeps, or any folders above them; --workdir=DIR names one, too
  --out          folder of report.html (the page), report.md and report.tex (its tables), report.csv (a line for each
                 method), report_runs.csv (a line for each run) and report_differences.csv (a line for each
                 difference of methods); default: the folder report in the first of RUNS
  --data_dir     folder of the data sets, if it is not that of the runs; embeddings need the test images
  --published    prints the published tables alone, as Markdown

`python -m cskd_jax.report` is the same command.

Exit codes: 0 done; 2 something to fix in the command or the runs.
"""

from cskd_jax.commands import command_line
from cskd_jax.errors import UserError
from cskd_jax.files import local_folder, refuse_link


def main(argv: list[str]) -> int:
    """Parses the command line, writes the report, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    parser = command_line.Parser()
    parser.add_argument("--workdir", action="append", default=[])
    parser.add_argument("--out", type=local_folder)
    parser.add_argument("--data_dir")
    parser.add_argument("--published", action="store_true")
    values = parser.parse(argv)
    folders = [local_folder(folder) for folder in [*values.words, *values.workdir]]
    if not folders and not values.published:
        raise UserError("name the folders of the runs, such as runs/sweep/digits")
    if values.published and (folders or values.out is not None or values.data_dir is not None):
        raise UserError("--published prints published results alone: leave out the folders, or --published")
    from cskd_jax import console

    console.start()
    # Imported late, so that mistakes in the command are reported immediately.
    from cskd_jax.report import markdown, published, tables
    from cskd_jax.report.runs import compare, find_runs, find_unfinished
    from cskd_jax.report.write import write

    if values.published:
        print(markdown.render("Published results", published.MEANING, tables.published_tables()))
        return
    comparisons = compare(find_runs(folders))
    if values.out is None:
        # The runs may come from elsewhere, but --out comes from the user and may be a link.
        refuse_link(folders[0] / "report")
    out = values.out or folders[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    command_line.set_up_jax()
    write(comparisons, find_unfinished(folders), out, values.data_dir)


if __name__ == "__main__":
    command_line.start(main)
