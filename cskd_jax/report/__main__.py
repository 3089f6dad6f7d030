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

from absl import flags

from cskd_jax.commands import command_line
from cskd_jax.errors import UserError
from cskd_jax.files import refuse_link
from cskd_jax.report import markdown, published, tables
from cskd_jax.report.runs import compare, find_runs
from cskd_jax.report.write import write


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


if __name__ == "__main__":
    sys.exit(main(sys.argv))
