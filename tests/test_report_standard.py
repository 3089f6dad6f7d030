"""Runs beside the standard table: published values with their sources and epochs, and pairs in its order."""

import json

import pytest

from cskd_jax.configs.methods import METHODS
from cskd_jax.report import deviations, published, standard
from cskd_jax.report.__main__ import main
from cskd_jax.report.runs import compare, find_runs
from tests.report_runs import write_run

# Columns of the published table without a method here.
NOT_HERE = {"CE (NORM reproduction)", "DistPro", "NORM", "NORM+KD", "NORM+CRD"}


def write_cell(folder, pair, scores, **overrides):
    for method, values in scores.items():
        for seed, score in enumerate(values):
            path = folder / pair.replace("/", "-") / f"{method}-{seed}"
            write_run(path, "cifar100_standard", f"{pair}/{method}", seed, score, **overrides)
            results = json.loads((path / "results.json").read_text())
            results["dataset"]["name"] = "cifar100"
            (path / "results.json").write_text(json.dumps(results))


def rows_of(table):
    return {row[0] if row[0] != "-" else row[4]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_ours_beside_everything_published(tmp_path):
    scores = {"ce": (0.69, 0.70), "kd": (0.70, 0.72), "dkd": (0.72, 0.73), "dist": (0.71,), "cskd": (0.70,)}
    write_cell(tmp_path, "resnet56/resnet20", scores)
    (comparison,) = compare(find_runs([tmp_path]))
    table = standard.beside(comparison)
    rows = rows_of(table)
    assert len(rows) == 35 + 1, "every published column of the pair, and category structure"
    expected = {
        "published: %": "70.66", "epoch": "last", "protocol": "standard", "ours": "kd", "seeds": "2",
        "ours: %": "71.00 ± 1.41", "ours - published": "+0.34", "source": "HobbitLong/RepDistiller:README.md",
    }  # fmt: skip
    assert rows["KD"].items() >= expected.items()
    # The best epoch is half a point above the last one: the published value is of the best.
    assert rows["DKD"].items() >= {"epoch": "best", "protocol": "own", "ours: %": "73.00 ± 0.71"}.items()
    assert rows["DKD"]["ours - published"] == f"{73.00 - 71.97:+.2f}"
    assert rows["DIST"].items() >= {"published: %": "71.75 ± 0.30", "epoch": "-", "ours - published": "-0.75"}.items()
    assert rows["AT"].items() >= {"published: %": "70.55", "ours": "-", "seeds": "-", "ours - published": "-"}.items()
    assert rows["cskd"].items() >= {"published: %": "-", "ours: %": "70.00"}.items()
    assert list(rows)[:4] == ["teacher", "CE", "CE (NORM reproduction)", "KD"]
    (own,) = [note for note in table.notes if note.startswith("Own protocols: ")]
    assert "ReviewKD: batch 128, lr 0.1" in own
    assert deviations.find(comparison)["kd"] == [], "the recipe of the benchmark, not that of the paper"


def test_values_of_one_epoch_are_compared_with_ours_of_that_epoch(tmp_path):
    write_cell(tmp_path, "resnet56/resnet20", {"kd": (0.70,), "dkd": (0.72,)})
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| kd | 1 | 70.00 | 70.50 | 70.66 | - | -0.66 | - |" in text
    assert "| dkd | 1 | 72.00 | 72.50 | 71.97 | +0.53 | - | - |" in text


def test_pairs_are_in_the_order_of_the_table(tmp_path):
    pairs = ("vgg13/mobilenet_v2", "resnet56/resnet20", "resnet50/vgg8")
    for pair in pairs:
        write_cell(tmp_path, pair, {"ce": (0.6,), "kd": (0.61, 0.63)})
    write_run(tmp_path / "paper", "cifar100", "kd", 0, 0.6)
    comparisons = compare(find_runs([tmp_path]))
    assert [(c.teacher, c.student) for c in comparisons] == [
        ("R101_0.5", "R18_0.25"), ("resnet56", "resnet20"), ("vgg13", "mobilenet_v2_crd_0.5"), ("resnet50_crd", "vgg8"),
    ]  # fmt: skip
    table = standard.overview(comparisons)
    assert table.header == ("pair", "whose", "teacher", "ce", "kd")
    assert [row[1] for row in table.rows] == ["ours", "published"] * 3
    assert table.rows[2][2:] == ("70.00", "60.00 (1)", "62.00 ± 1.41 (2)")
    assert table.rows[3][2:] == ("74.64", "64.60", "67.37")
    assert standard.overview(comparisons[:2]) is None
    assert main(["report", str(tmp_path)]) == 0
    assert "### The standard table" in (tmp_path / "report" / "report.md").read_text()


def test_other_pairs_have_no_standard_table(tmp_path):
    write_run(tmp_path / "paper", "cifar100", "kd", 0, 0.6)
    (comparison,) = compare(find_runs([tmp_path]))
    assert standard.beside(comparison) is None


def test_a_shorter_run_says_so(tmp_path):
    write_cell(tmp_path, "resnet56/resnet20", {"kd": (0.5,)}, epochs=1, losses__kd__temperature=2.0)
    (comparison,) = compare(find_runs([tmp_path]))
    assert sorted(deviations.find(comparison)["kd"]) == [
        "epochs 1 (recipe 240)",
        "losses.kd.temperature 2.0 (recipe 4.0)",
    ]
    assert main(["report", str(tmp_path)]) == 0
    assert "\n1 epoch, 50,000 training" in (tmp_path / "report" / "report.md").read_text()


def test_every_value_has_a_source_and_an_epoch_if_that_is_known():
    rows = published.standard_rows()
    assert [pair for pair, _ in rows][:2] == ["resnet56, resnet20", "resnet110, resnet20"]
    values = [(column, value) for _, found in rows for column, value in found.items()]
    assert (len(rows), len(published.standard_columns()), len(values)) == (17, 45, 491)
    epochs = {column: {v.epoch for c, v in values if c == column} for column in published.standard_columns()}
    assert epochs["KD"] == {"last", "best"}, "of four pairs, KD was published with logit standardization"
    assert epochs["CRD"] == {"last"}
    assert epochs["DKD"] == {"best"}
    assert epochs["ReviewKD"] == epochs["CE"] == {""}
    assert all(value.source for _, value in values)


@pytest.mark.parametrize(
    ("method", "column"),
    [("kd", "KD"), ("lskd", "KD+LS"), ("dkd_ls", "DKD+LS"), ("crd+wttm", "WTTM+CRD"), ("cskd", None)],
)
def test_columns_of_methods(method, column):
    assert published.standard_column(method) == column


def test_every_column_is_that_of_a_method():
    known = published.read_packaged("published_cifar100_standard.json")["methods"]
    assert {*published.standard_columns()} - {*known.values()} == NOT_HERE
    assert {part for word in known for part in word.split("+")} - {"teacher"} <= {*METHODS}
