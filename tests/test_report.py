"""The report: statistics against SciPy, published values, what is compared with what, and a page that loads nothing."""

import dataclasses
import html.parser
import json
import re

import numpy as np
import pytest
from scipy import stats

from cskd_jax.errors import UserError
from cskd_jax.report import published, tables
from cskd_jax.report.__main__ import main
from cskd_jax.report.embedding import project
from cskd_jax.report.runs import compare, find_runs
from cskd_jax.report.statistics import paired_difference, summarize
from cskd_jax.training.embedding import tightness
from tests.report_runs import write_run

TOP1 = {"ce": (0.60, 0.62, 0.61), "kd": (0.64, 0.66, 0.65), "cskd": (0.66, 0.69, 0.68)}


@pytest.fixture
def grid(tmp_path):
    """Nine runs of the first published row of CIFAR-100, and the run of their teacher."""
    for method, scores in TOP1.items():
        for seed, score in enumerate(scores):
            write_run(tmp_path / f"{method}-seed{seed}", "cifar100", method, seed, score)
    write_run(tmp_path / "teacher-net", "cifar100", "ce", 0, 0.7, student__name="resnet101", student__width=0.5)
    return tmp_path


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the cells of every table."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self._in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in_cell = tag in ("td", "th")
        if tag == "tr":
            self.cells.append([])
        if self._in_cell:
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.cells[-1][-1] += data


def test_report_of_a_grid(grid, capsys):
    assert main(["report", str(grid), f"--out={grid / 'out'}"]) == 0
    assert "no pictures of embeddings: there are no checkpoints in" in capsys.readouterr().out
    text = (grid / "out" / "report.html").read_text()
    page, table = Page(text), (grid / "out" / "report.md").read_text()
    rows = {row[0]: row for row in page.cells}
    # Mean, deviation, count; the differences of best and last to the paper's value, of which the first is meant.
    assert rows["ce"][1:7] == ["3", "61.00 ± 1.00", "61.50 ± 1.00", "65.64", "-4.14", "-4.64"]
    assert rows["cskd"][4] == "69.14; 67.57; 67.37"
    assert rows["cskd"][5:7] == ["-0.97", "-1.47"]
    assert "values: paper, Table 2; released code's repository, issue 2 (2022-08-11).\n" in table
    assert rows["teacher"][1:6] == ["1", "70.00", "70.50", "71.77", "-1.27"]
    assert rows["kd - ce"][1:5] == ["3", "+4.00", "-", "-"]
    assert rows["kd - ce"][5] == "the same difference in every seed, interval unknown: no claim"
    expected = stats.ttest_rel(TOP1["cskd"], TOP1["ce"]).confidence_interval(0.95)
    assert rows["cskd - ce"][3] == f"{100 * expected.low:+.2f} to {100 * expected.high:+.2f}"
    corrected = stats.ttest_rel(TOP1["cskd"], TOP1["ce"]).confidence_interval(1 - 0.05 / 3)
    assert rows["cskd - ce"][4] == f"{100 * corrected.low:+.2f} to {100 * corrected.high:+.2f}"
    assert rows["cskd - ce"][5] == "higher"
    assert rows["difference"][3:5] == ["95% interval", "corrected for 3 lines"]
    assert rows["student R18_0.25"][1:] == ["1,000", "4.00x"]
    assert "ce - kd" not in rows
    for row in page.cells:
        assert "| " + " | ".join(row) + " |" in table


def test_runs_without_results_are_in_the_report(grid, capsys):
    for name, log in (
        ("kd-seed3", "step 4\nerror: the loss is not finite at step 5\n"),
        ("ce-seed3", "error: a\nstep 4\n"),
    ):
        (grid / name).mkdir()
        (grid / name / "config.json").write_text("{}")
        (grid / name / "log.txt").write_text(log)
    assert main(["report", str(grid)]) == 0
    for name in ("report.html", "report.md", "report.tex"):
        text = (grid / "report" / name).read_text()
        assert "failed: the loss is not finite at step 5" in text
        assert "not finished" in text
    rows = Page((grid / "report" / "report.html").read_text()).cells[-2:]
    assert rows == [
        [str(grid / "ce-seed3"), "not finished"],
        [str(grid / "kd-seed3"), "failed: the loss is not finite at step 5"],
    ]


def measure(folder, name, step, within, data="0123"):
    """evaluation.json as `evaluate --embedding` writes it, as far as the report reads it."""
    entry = {"step": step, "embedding": {"knn": 0.5, "probe": 0.25, "within": within, "between": 2.0}}
    folder.mkdir(exist_ok=True)
    content = {"networks": {name: entry}, "dataset": {"fingerprint": data}}
    (folder / "evaluation.json").write_text(json.dumps(content))


def test_embeddings_that_were_measured_by_evaluate(grid):
    for seed, within in enumerate((1.0, 1.2, 1.4)):
        measure(grid / f"kd-seed{seed}", "student", 2, within)
        # One run of ce was trained further after it was evaluated.
        measure(grid / f"ce-seed{seed}", "student", 2 if seed < 2 else 1, within)
    measure(grid / "teacher-net", "student", 4, 0.5)
    (found,) = compare(find_runs([grid]))
    assert [row[0] for row in tables.embeddings(found).rows] == ["kd"]
    for run in found.runs:
        if run.results["teacher"] is not None:
            run.results["teacher"]["step"] = 4
    (found,) = compare([dataclasses.replace(run) for run in found.runs])
    assert tables.embeddings(found).rows == [
        ("teacher", "1", "0.250", "50.00", "25.00"),
        ("kd", "3", "0.600 ± 0.100", "50.00 ± 0.00", "25.00 ± 0.00"),
    ]
    for data, shown in ("0123", ["teacher", "kd"]), ("4567", ["teacher"]):  # The data of one run of kd.
        (grid / "kd-seed0" / "config.json").write_text(json.dumps({"dataset fingerprint": data}))
        (found,) = compare([dataclasses.replace(run) for run in found.runs])
        assert [row[0] for row in tables.embeddings(found).rows] == shown


def test_page_needs_nothing_else(grid):
    assert main(["report", str(grid)]) == 0
    text = (grid / "report" / "report.html").read_text()
    tags = Page(text).tags
    assert {"html", "meta", "style", "table", "svg", "path"} <= {tag for tag, _ in tags}
    assert not {"script", "img", "iframe", "object", "embed", "image", "use", "base"} & {tag for tag, _ in tags}
    loads = {(tag, key): value for tag, attrs in tags for key, value in attrs.items() if re.search("src|href", key)}
    assert loads == {("link", "href"): "data:,"}, "an icon that asks the server for none"
    assert not re.search(r"url\(|@import|@font-face|https?:", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags


def test_ablation_is_there_with_its_runs(grid, tmp_path):
    runs = {"kd": 0.5, "intra": 0.52, "inter": 0.53, "cskd": 0.54}
    for method, score in runs.items():
        write_run(tmp_path / "ablation" / f"{method}-seed0", "tiny_imagenet", method, 0, score, epochs=3)
    assert main(["report", str(tmp_path / "ablation")]) == 0
    page = Page((tmp_path / "ablation" / "report" / "report.html").read_text())
    rows = {row[0]: row for row in page.cells}
    assert rows["intra + inter"][1:6] == ["cskd", "1", "54.00", "54.50", "53.66; 53.66"]
    assert rows["none"][1:6] == ["kd", "1", "50.00", "50.50", "49.53; 49.53"]
    assert rows["intra"][5] == "52.51"
    assert rows["intra - kd"][2:] == ["+2.00", "-", "-", "one seed: no claim"]
    assert "Note 2: epochs 3 (recipe 200)." in (tmp_path / "ablation" / "report" / "report.md").read_text()


def test_what_is_compared(grid):
    write_run(grid / "hot", "cifar100", "kd", 0, 0.6, losses__kd__temperature=8.0)
    write_run(grid / "short", "cifar100", "kd", 0, 0.6, epochs=3)
    short, long = sorted(compare(find_runs([grid])), key=lambda comparison: len(comparison.runs))
    assert [row.label for row in short.rows] == ["kd"]
    assert [row.label for row in long.rows] == ["ce", "cskd", "kd, losses.kd.temperature 4.0",
                                                "kd, losses.kd.temperature 8.0"]  # fmt: skip
    assert (long.teacher, long.student) == ("R101_0.5", "R18_0.25")


def write_sweep(folder, digest):
    """Runs of ce and kd with two seeds, and of their teacher; ce has the same scores in every sweep."""
    for seed in (0, 1):
        write_run(folder / f"ce-seed{seed}", "cifar100", "ce", seed, 0.6 + seed / 100)
        write_run(folder / f"kd-seed{seed}", "cifar100", "kd", seed, 0.62 + len(digest) / 100, digest=digest)
    write_run(folder / "teacher-net", "cifar100", "ce", 0, 0.7 + len(digest) / 100, student__name="resnet101")


def test_two_sweeps_with_a_teacher_each(tmp_path):
    """Each of the sweeps has a section, with its own teacher; also after they have moved."""
    write_sweep(tmp_path / "sweep", "abcdefghij")
    (tmp_path / "sweep").rename(tmp_path / "moved")
    write_sweep(tmp_path / "sweep", "k")
    first, second = compare(find_runs([tmp_path]))
    assert first.title == "cifar100: R101_0.5 → R18_0.25, teacher abcdefghij"
    assert second.title == "cifar100: R101_0.5 → R18_0.25, teacher k"
    for comparison, folder in ((first, "moved"), (second, "sweep")):
        assert [(row.label, len(row.runs)) for row in comparison.rows] == [("ce", 2), ("kd", 2)]
        (distilled,) = comparison.distilled
        assert distilled.teacher_run.folder == tmp_path / folder / "teacher-net"
        assert {run.folder.parent.name for run in comparison.rows[1].runs} == {folder}
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert text.count("All runs share one teacher") == 2
    assert (
        "Teacher: R101_0.5, trained for 200 epochs with seed 0, "
        f"checkpoint {tmp_path}/sweep/teacher-net/student, digest k.\n"
    ) in text


def test_runs_that_have_trained_their_own_teachers(tmp_path):
    for seed in (0, 1):
        for method in ("kd", "cskd"):
            write_run(tmp_path / f"{method}-seed{seed}", "cifar100", method, seed, 0.6)
            path = tmp_path / f"{method}-seed{seed}" / "results.json"
            results = json.loads(path.read_text())
            del results["teacher"]["digest"], results["teacher"]["checkpoint"]
            path.write_text(json.dumps(results))
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "Each run has trained a teacher of its own" in text
    assert "| teacher | 2 |" in text, "runs with the same seed have trained the same teacher"
    assert "Each run has trained its own teacher: R101_0.5, epochs 200, with the seed of the run.\n" in text


def test_teachers_from_elsewhere_are_named(tmp_path):
    digest = "0123456789abcdef"
    write_run(tmp_path / "a" / "kd", "cifar100", "kd", 0, 0.6, digest=digest)
    path = tmp_path / "a" / "kd" / "results.json"
    results = json.loads(path.read_text())
    teacher = results["teacher"]
    where = f"checkpoint {teacher['checkpoint']}, digest 0123456789ab"

    def line():
        path.write_text(json.dumps(results))
        return tables.recipe(compare(find_runs([tmp_path / "a"]))[0]).partition("classes. ")[2]

    assert line() == f"Teacher: R101_0.5, {where}."
    teacher["import"] = {"file": "a\n.pth", "sha256": "f00"}
    assert line() == f"Teacher: R101_0.5, {where}, imported from a\\n.pth, SHA-256 f00."
    teacher["import"]["source"] = "https://github.com/a/b.pth"
    assert line() == f"Teacher: R101_0.5, {where}, imported from https://github.com/a/b.pth, SHA-256 f00."
    del teacher["import"]
    teacher["members"] = [
        {"model": "resnet8", "width": w, "checkpoint": c, "digest": digest} for w, c in ((1, "x"), (2, "y"))
    ]
    assert line() == (
        "Teachers: resnet8, checkpoint x, digest 0123456789ab; resnet8_2, checkpoint y, digest 0123456789ab."
    )


def test_recipe_without_a_teacher_and_a_log_that_was_cut_off(tmp_path):
    write_run(tmp_path / "run", "cifar100", "ce", 0, 0.6)
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    results["config"]["teacher.name"] = None
    path.write_text(json.dumps(results))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "stud')
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "report.html").read_text()
    assert "<h2>cifar100: R18_0.25</h2>" in text
    assert "Training curves" in text


@pytest.fixture
def outside(tmp_path):
    """A file of the user's that must not change."""
    path = tmp_path / "outside" / ".profile"
    path.parent.mkdir()
    path.write_text("export EDITOR=vi\n")
    yield path
    assert path.read_text() == "export EDITOR=vi\n"
    assert [file.name for file in path.parent.iterdir()] == [".profile"]


def test_links_in_the_folder_of_the_report_are_replaced(tmp_path, outside):
    write_run(tmp_path / "run", "cifar100", "kd", 0, 0.6)
    report = tmp_path / "run" / "report"
    report.mkdir()
    written = ("report.md", "report.html", "report.tex", "report.csv", "report_runs.csv", "report_differences.csv")
    for name in (*written, "report.md.tmp", "report.html.tmp"):
        (report / name).symlink_to(outside)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert (report / "report.md").read_text().startswith("## cifar100")
    assert (report / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert not any((report / name).is_symlink() for name in written)


def test_the_folder_of_the_report_is_no_link_but_one_of_the_users(tmp_path, outside, capsys):
    write_run(tmp_path / "run", "cifar100", "kd", 0, 0.6)
    (tmp_path / "run" / "report").symlink_to(outside.parent)
    assert main(["report", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/run/report is a symbolic link")
    assert error.count("\n") == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert main(["report", str(tmp_path / "run"), f"--out={tmp_path / 'link'}"]) == 0
    assert (tmp_path / "out" / "report.md").exists()


def test_texts_of_strangers_are_shown_and_do_nothing(tmp_path, capsys):
    write_run(tmp_path / "run", "cifar100", "kd", 0, 0.6)
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    results["method"] = "kd\nrm -rf ~\n|`x`<img src=x>![y](http://z)\u202e"
    results["devices"]["kind"] = "cpu\x1b]0;gone\x07"
    results["config"]["dataset.name"] = "digits\n\n# title\x1b[2J"
    path.write_text(json.dumps(results))
    assert main(["report", str(tmp_path)]) == 0
    console = capsys.readouterr().out
    text, html_text = ((tmp_path / "report" / name).read_text() for name in ("report.md", "report.html"))
    for shown in (console, text, html_text):
        assert all(character.isprintable() or character == "\n" for character in shown)
        assert "\nrm" not in shown
        assert "\n# title" not in shown
    # A backslash of the text stands behind another one in Markdown.
    assert r"| kd\\nrm -rf ~\\n\|\`x\`\<img src=x>!\[y](http://z)\\u202e | 1 |" in text
    assert r"## digits\\n\\n# title\\x1b\[2J: R101_0.5" in text
    assert {"img", "a"}.isdisjoint(tag for tag, _ in Page(html_text).tags)
    assert "cpu\\x1b]0;gone\\x07" in html_text


def test_bad_runs(grid, capsys):
    def error(*arguments):
        assert main(["report", *arguments]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "name the folders" in error()
    assert "holds no finished run" in error(str(grid / "nothing"))
    assert "unknown flag --config" in error(str(grid), "--config=configs/digits.py")
    write_run(grid / "again", "cifar100", "kd", 1, 0.6)
    assert "are the same run" in error(str(grid))
    (grid / "again" / "results.json").write_text("{}")
    assert "is missing config, dataset, devices" in error(str(grid))
    (grid / "again" / "results.json").write_text('{"method": ')
    assert "damaged" in error(str(grid))


def test_published_tables_alone(capsys):
    assert main(["report", "--published"]) == 0
    output = capsys.readouterr().out
    assert output.count("### ") == 8
    assert "| resnet56, resnet20 | 72.34 | 69.06 | 69.53 | 70.66 |" in output
    assert "| R101_0.5, R18_0.25 | 65.64 | 67.43 | 68.04 | 68.35 | 68.17 | 68.96 | 69.14 | 71.77 |" in output
    assert "53.66 / 78.75" in output


def test_every_published_value_is_found():
    count = 0
    for table in published.tables():
        dataset = table["dataset"].removesuffix("_2011")
        for row in table["rows"]:
            for column, value in zip(table["columns"], row["values"], strict=True):
                method = {"neither": "kd", "both": "cskd"}.get(column, column.split(" run ")[0].lower())
                found = published.lookup(dataset, row["teacher"], row["student"], method)
                assert (value[0] if isinstance(value, list) else value) in [v.top1 for v in found]
                count += 1
    assert count == 138


@pytest.mark.parametrize(
    ("network", "label"),
    [
        (("resnet101", 0.5), "R101_0.5"),
        (("resnet50_224", 1.0), "R50"),
        (("resnet8x4", 1.0), "resnet8x4"),
        (("Net", None), "Net"),
    ],
)
def test_network_labels(network, label):
    assert published.network_label(*network) == label


@pytest.mark.parametrize("comparisons", [1, 4])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_paired_interval_is_that_of_scipy(count, comparisons):
    ours, baseline = np.random.default_rng(count).normal(size=(2, count))
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(baseline)) | {99: 1e9}).corrected(comparisons)
    expected = stats.ttest_rel(ours, baseline).confidence_interval(1 - 0.05 / comparisons)
    np.testing.assert_allclose([found.mean - found.margin, found.mean + found.margin], expected, rtol=1e-9)
    assert found.verdict.startswith("no difference") == (expected.low < 0 < expected.high)


def test_few_seeds_claim_nothing():
    assert paired_difference({0: 1.0}, {1: 2.0}) is None
    assert paired_difference({0: 3.0}, {0: 2.0}).verdict == "one seed: no claim"
    assert summarize([5.0]) == (5.0, None, 1)


def test_tightness_and_projection():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 3, 7], [5, 10, 15])
    embeddings = 10 * rng.normal(size=(8, 4))[labels] + rng.normal(size=(30, 4))
    centers = {label: embeddings[labels == label].mean(axis=0) for label in (0, 3, 7)}
    within = np.mean([np.linalg.norm(e - centers[label]) for e, label in zip(embeddings, labels, strict=True)])
    between = np.mean([np.linalg.norm(centers[a] - centers[b]) for a, b in ((0, 3), (0, 7), (3, 7))])
    np.testing.assert_allclose(tightness(embeddings, labels), (within, between), rtol=1e-12)
    points = project(embeddings)
    np.testing.assert_array_equal(points, project(embeddings))
    assert points.min() >= -1e-6
    assert points.max() <= 1 + 1e-6
    means = {label: points[labels == label].mean(axis=0) for label in (0, 3, 7)}
    nearest = [min(means, key=lambda label: np.linalg.norm(p - means[label])) for p in points]
    assert nearest == labels.tolist(), "categories ten deviations apart stay apart"


def test_embeddings_that_are_all_the_same():
    """They ended the process in t-SNE."""
    noise = np.random.default_rng(0).normal(size=(20, 8))
    for same in (np.zeros((20, 8)), 1e-30 * noise, noise[:1]):
        np.testing.assert_array_equal(project(same), np.full((len(same), 2), 0.5))
    for few in (noise[:, :1], noise[:2]):
        assert np.isfinite(project(few)).all()
    with pytest.raises(UserError, match="of all classes have the same center"):
        _ = tightness(np.zeros((4, 8)), np.array([0, 0, 1, 1])).ratio
