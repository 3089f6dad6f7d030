"""The report as CSV, LaTeX and Markdown: what stands in the files, and that texts from elsewhere do nothing there."""

import csv
import io
import json
import shutil
import subprocess

import pytest
from scipy import stats

from cskd_jax.report import latex, markdown, spreadsheet
from cskd_jax.report.__main__ import main
from cskd_jax.report.runs import compare, find_runs
from cskd_jax.report.tables import Table
from tests.report_runs import write_run

HOSTILE = r"""=HYPERLINK("http://z") & 5%_$#{x}~^\input{/etc/passwd} <b>|`*[!"""


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture
def runs(tmp_path):
    """Two methods with two seeds each, one of them combined and one with a name that no file format likes."""
    for seed, last in ((0, 0.60), (1, 0.62)):
        for method, name in (("kd", "at+kd"), ("at", HOSTILE)):
            write_run(tmp_path / f"{method}-{seed}", "cifar100", method, seed, last, epochs=6)
            path = tmp_path / f"{method}-{seed}" / "results.json"
            results = json.loads(path.read_text())
            results["method"] = name
            path.write_text(json.dumps(results))
    return tmp_path


def test_csv_of_methods_and_runs(tmp_path):
    for seed, last in ((0, 0.60), (1, 0.62)):
        write_run(tmp_path / f"ce-{seed}", "cifar100", "ce", seed, last, epochs=6)
        write_run(tmp_path / f"kd-{seed}", "cifar100", "kd", seed, last + 0.01)
    assert main(["report", str(tmp_path)]) == 0
    teacher, kd, ce = rows_of((tmp_path / "report" / "report.csv").read_text())
    scores = [teacher[key] for key in ("method", "last_mean", "last_std", "best_mean")]
    assert scores == ["teacher", "70.0", "", ""], "one teacher, whose best epoch is not known"
    assert (kd["dataset"], kd["teacher"], kd["student"], kd["metric"]) == ("cifar100", "R101_0.5", "R18_0.25", "top1")
    assert (kd["seeds"], kd["last_mean"], kd["best_mean"], kd["differs"]) == ("2", "62.0", "62.5", "")
    assert [row["teacher_digest"] for row in (teacher, kd, ce)] == ["d", "d", ""], "ce has a section of its own"
    assert float(kd["last_std"]) == pytest.approx(2**0.5, abs=1e-6)
    assert (kd["published"], kd["published_source"]) == ("67.43", "paper, Table 2")
    assert (ce["method"], ce["differs"]) == ("ce", "epochs 6 (recipe 200)")
    lines = rows_of((tmp_path / "report" / "report_runs.csv").read_text())
    assert [(line["method"], line["seed"], line["last"], line["best"], line["best_epoch"]) for line in lines] == [
        ("kd", "0", "61.0", "61.5", "1"), ("kd", "1", "63.0", "63.5", "1"),
        ("ce", "0", "60.0", "60.5", "1"), ("ce", "1", "62.0", "62.5", "1"),
    ]  # fmt: skip
    assert lines[0]["folder"] == str(tmp_path / "kd-0")


def test_csv_holds_no_formula(runs):
    comparisons = compare(find_runs([runs]))
    for text in (spreadsheet.methods(comparisons), spreadsheet.runs(comparisons)):
        methods = {row["method"] for row in rows_of(text)}
        assert methods - {"teacher"} == {"at+kd", f"'{HOSTILE}"}


def test_csv_of_differences(tmp_path):
    for method, scores in {"ce": (0.60, 0.62, 0.61), "kd": (0.64, 0.66, 0.66)}.items():
        for seed, score in enumerate(scores):
            write_run(tmp_path / f"{method}-{seed}", "cifar100", method, seed, score)
    assert main(["report", str(tmp_path)]) == 0
    (line,) = rows_of((tmp_path / "report" / "report_differences.csv").read_text())
    assert [line[key] for key in ("dataset", "teacher_digest", "difference", "metric", "seeds", "shows")] == [
        "cifar100", "d", "kd - ce", "top1", "3", "higher",
    ]  # fmt: skip
    low, high = stats.ttest_1samp([4, 4, 5], 0).confidence_interval(0.95)
    keys = ("mean", "low", "high", "corrected_low", "corrected_high")
    assert [float(line[key]) for key in keys] == pytest.approx([13 / 3, low, high, low, high], abs=1e-5)


def test_csv_of_differences_holds_no_formula_and_no_unknown_interval(tmp_path):
    for method in ("ce", "kd"):
        write_run(tmp_path / method, "cifar100", method, 0, 0.5)
    path = tmp_path / "kd" / "results.json"
    results = json.loads(path.read_text())
    results["method"] = HOSTILE
    path.write_text(json.dumps(results))
    (line,) = rows_of(spreadsheet.differences(compare(find_runs([tmp_path]))))
    assert line["difference"] == f"'{HOSTILE} - ce"
    assert (line["low"], line["corrected_high"], line["shows"]) == ("", "", "one seed: no claim")


@pytest.mark.parametrize("start", ["=1", "+1", "-1", "@SUM(1)", " =1", "\uff1d1"])
def test_formulas_are_disarmed(start, runs):
    path = runs / "kd-0" / "results.json"
    results = json.loads(path.read_text())
    results["method"] = start
    path.write_text(json.dumps(results))
    assert f"'{start}" in {row["method"] for row in rows_of(spreadsheet.methods(compare(find_runs([runs]))))}


def test_latex_shows_special_characters():
    assert latex.escape(r"50% & a_b #1 $x$ {y}") == r"50\% \& a\_b \#1 \$x\$ \{y\}"
    assert latex.escape("~^\\") == r"\textasciitilde{}\textasciicircum{}\textbackslash{}"
    assert latex.escape("1 ± 2 → at+kd") == r"1 $\pm$ 2 $\rightarrow$ at+kd"
    assert latex.escape("é\u202e") == r"\textbackslash{}xe9\textbackslash{}u202e"


def test_latex_of_a_table():
    table = Table(
        "Results", ("method", "last epoch: %"), [("at+kd", "-1.50"), ("[x]", "-"), ("a, " + 20 * "b", "1; 2")]
    )
    text = latex.render([("digits_8", [table._replace(notes=("100% sure.",)), table])])
    assert "\\caption{Results, digits\\_8}\n\\label{tab:results-digits-8}\n" in text
    assert r"\label{tab:results-digits-8:2}" in text, "labels are distinct"
    assert r"\begin{tabular}{@{}lr@{}}" in text
    assert r"method & \begin{tabular}[b]{@{}r@{}}last epoch: \\ \%\end{tabular} \\" in text
    assert "at+kd & $-$1.50 \\\\\n{[}x{]} & -- \\\\\n" in text, "no row begins with an option of the one before"
    assert rf"\begin{{tabular}}[t]{{@{{}}l@{{}}}}a, \\ {20 * 'b'}\end{{tabular}} & 1; 2 \\" in text
    assert r"100\% sure." in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")


def test_latex_names_its_packages_and_is_balanced(runs):
    assert main(["report", str(runs)]) == 0
    text = (runs / "report" / "report.tex").read_text()
    assert text.startswith("% Tables for \\input. The preamble needs \\usepackage{booktabs}.\n")
    assert text.isascii()
    assert r"\input{" not in text.partition("\n")[2]
    for environment in ("table", "tabular", "minipage"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") > 0
    depth = 0
    for character in text.replace(r"\{", "").replace(r"\}", ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="LaTeX is not installed")
def test_latex_compiles(runs, tmp_path):
    assert main(["report", str(runs)]) == 0
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{report/report.tex}\end{document}"
    (tmp_path / "paper.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "LaTeX Warning: Reference" not in done.stdout


def test_markdown_aligns_words_left_and_numbers_right():
    text = markdown.render("t", "x", [Table("T", ("method", "seeds", "notes"), [("kd", "3", "1")])])
    assert "| method | seeds | notes |\n| --- | ---: | --- |\n" in text


def test_markdown_shows_special_characters():
    text = markdown.render("t", "x", [Table("T", ("a",), [(r"<img> | `x` [y](z) *b* &lt; \\",)])])
    assert r"| \<img> \| \`x\` \[y](z) \*b\* \&lt; \\\\ |" in text
