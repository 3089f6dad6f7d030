"""Which rows the report has, in which order, and what it says of runs that differ from their recipes."""

import json

import pytest

from cskd_jax.losses import LOSSES
from cskd_jax.report import deviations, tables
from cskd_jax.report.__main__ import main
from cskd_jax.report.ablation import find_ablations
from cskd_jax.report.runs import compare, find_runs
from tests.report_runs import write_run

NO_RECIPE, WITH = "there is no packaged recipe", "with this method to compare with"


def change(folder, method=None, config=None, **others):
    """Changes what a run says of itself."""
    path = folder / "results.json"
    results = json.loads(path.read_text())
    results["method"] = method or results["method"]
    results["config"] |= {"method": results["method"], **(config or {})}
    results |= others
    path.write_text(json.dumps(results))


def comparison_of(folder):
    (comparison,) = compare(find_runs([folder]))
    return comparison


def test_rows_are_in_the_order_of_their_scores(tmp_path):
    for method, score in {"kd": 0.60, "at": 0.62, "ce": 0.50, "sp": 0.61}.items():
        write_run(tmp_path / method, "cifar100", method, 0, score)
    comparison = comparison_of(tmp_path)
    assert [row.label for row in comparison.rows] == ["ce", "at", "sp", "kd"]
    assert [row.label for row in comparison.references] == ["ce", "kd"]


def test_the_reference_without_a_teacher_learns_from_labels_alone(tmp_path):
    """Neither peers, nor the student's own average, make a reference of a row."""
    for method, score in {"kd": 0.60, "dml": 0.70, "ce": 0.50}.items():
        write_run(tmp_path / method, "cifar100", method, 0, score)
    write_run(tmp_path / "self", "cifar100", "kd", 0, 0.65)
    change(tmp_path / "self", "self", teacher=None, config={"losses.kd.teacher": "average"})
    assert [row.label for row in comparison_of(tmp_path).references] == ["ce", "kd"]


def test_references_have_the_most_seeds(tmp_path):
    """A row with fewer of them leaves most differences without an interval."""
    for seed in range(2):
        write_run(tmp_path / f"kd{seed}", "cifar100", "kd", seed, 0.60)
    write_run(tmp_path / "tuned", "cifar100", "kd", 0, 0.70)
    change(tmp_path / "tuned", config={"losses.kd.weight": 3.0})
    (reference,) = comparison_of(tmp_path).references
    assert len(reference.runs) == 2


def test_roles_are_those_of_the_losses_and_not_of_names(tmp_path):
    """Methods of another name, and KD together with another loss, which is no baseline."""
    for method, name in {"ce": "labels", "kd": "hinton", "at": "at+kd"}.items():
        write_run(tmp_path / name, "cifar100", method, 0, 0.5)
        change(tmp_path / name, name)
    change(tmp_path / "at+kd", config={"losses.kd.weight": 0.9})
    comparison = comparison_of(tmp_path)
    assert [row.label for row in comparison.references] == ["labels", "hinton"]
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    for line in ("hinton - labels", "at+kd - labels", "at+kd - hinton"):
        assert f"| {line} |" in text
    assert "| hinton - hinton |" not in text


def test_roles_of_several_classes_per_image(tmp_path):
    for method in ("bce", "bkd", "mlcskd"):
        write_run(tmp_path / method, "digit_pairs", method, 0, 0.5)
    change(tmp_path / "bce", config={})
    assert [row.label for row in comparison_of(tmp_path).rows if row.is_baseline] == ["bkd"]


def test_parts_of_a_loss_are_those_that_have_weights(tmp_path):
    scores = {"ce": 0.4, "kd": 0.5, "intra": 0.53, "inter": 0.52, "cskd": 0.54, "at": 0.6}
    for method, score in scores.items():
        write_run(tmp_path / method, "tiny_imagenet", method, 0, score)
    (found,) = find_ablations(comparison_of(tmp_path))
    assert [(parts, row.label) for parts, row in found] == [
        ("labels alone", "ce"), ("none", "kd"), ("intra", "intra"), ("inter", "inter"), ("intra + inter", "cskd"),
    ]  # fmt: skip
    for name, loss in LOSSES.items():
        assert set(loss.parts.values()) <= set(loss.__dataclass_fields__), name


def test_no_ablation_without_all_parts_or_without_some(tmp_path):
    for method in ("kd", "intra", "inter"):
        write_run(tmp_path / "some" / method, "tiny_imagenet", method, 0, 0.5)
    assert not [*find_ablations(comparison_of(tmp_path / "some"))]
    for method in ("kd", "cskd"):
        write_run(tmp_path / "all" / method, "tiny_imagenet", method, 0, 0.5)
    assert not [*find_ablations(comparison_of(tmp_path / "all"))]


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        ({}, []),
        ({"log_every": 7, "dataset__data_dir": "elsewhere", "student__width": 0.5}, []),
        ({"epochs": 6, "dtype": "bfloat16"}, ["dtype bfloat16 (recipe float32)", "epochs 6 (recipe 200)"]),
        ({"losses__kd__temperature": 2.0}, ["losses.kd.temperature 2.0 (recipe 4.0)"]),
        ({"optimizer__milestones": "(3,)"}, ["optimizer.milestones 3 (recipe 80, 120)"]),
        ({"dataset__train_examples": 500}, ["dataset.train_examples 500 (recipe none)"]),
    ],
)
def test_what_differs_from_the_recipe(overrides, texts, tmp_path):
    write_run(tmp_path / "run", "cifar100", "kd", 0, 0.5, **overrides)
    assert sorted(deviations.find(comparison_of(tmp_path))["kd"]) == texts


def test_a_loss_more_than_the_recipe_has_is_named_once(tmp_path):
    write_run(tmp_path / "run", "cifar100", "kd", 0, 0.5)
    change(tmp_path / "run", config={"losses.at.weight": 10.0})
    assert deviations.find(comparison_of(tmp_path))["kd"] == ["losses.at.weight 10.0 (recipe none)"]


def test_rows_without_a_recipe_are_compared_with_the_others(tmp_path):
    for method in ("ce", "kd", "at"):
        write_run(tmp_path / method, "cifar100", method, 0, 0.5)
    change(tmp_path / "at", "mine", {"batch_size": 32, "losses.at.weight": 7.0})
    found = deviations.find(comparison_of(tmp_path))
    assert found["mine"] == [f"{NO_RECIPE} of cifar100 {WITH}", "batch_size 32 (other rows 128)"]
    assert found["ce"] == found["kd"] == []


def test_a_recipe_with_another_optimizer_than_the_others(tmp_path):
    for method in ("ce", "kd", "cskd_paper"):
        write_run(tmp_path / method, "cifar100", method, 0, 0.5)
    texts = deviations.find(comparison_of(tmp_path))["cskd_paper"]
    assert "optimizer.milestones 80, 120, 160 (other rows 80, 120)" in texts


def test_teachers(tmp_path):
    """One whose run is there, one that is not known, and one that was trained with its student."""
    teacher = {"student__name": "resnet101", "student__width": 0.5}
    write_run(tmp_path / "sweep" / "kd", "cifar100", "kd", 0, 0.5, teacher__epochs=9)
    write_run(tmp_path / "sweep" / "teacher-net", "cifar100", "ce", 0, 0.5, **teacher, epochs=9, batch_size=64)
    found = deviations.find(comparison_of(tmp_path / "sweep"))
    assert sorted(found["teacher"]) == ["batch_size 64 (recipe 128)", "teacher.epochs 9 (recipe 200)"]
    assert found["kd"] == ["teacher.epochs 9 (recipe 200)"]

    write_run(tmp_path / "alone" / "kd", "cifar100", "kd", 0, 0.5, teacher__epochs=9)
    found = deviations.find(comparison_of(tmp_path / "alone"))
    assert found["teacher"] == ["how it was trained is not known: its run is not among these"]
    assert found["kd"] == [], "the configuration of the run says nothing about a teacher that it was given"

    (tmp_path / "alone" / "teacher-net").mkdir()
    (tmp_path / "alone" / "teacher-net" / "config.json").write_text("{}")
    found = deviations.find(comparison_of(tmp_path / "alone"))
    assert found["teacher"] == ["how it was trained is not known: its run teacher-net is not finished"]
    results = json.loads((tmp_path / "alone" / "kd" / "results.json").read_text())
    change(tmp_path / "alone" / "kd", teacher=results["teacher"] | {"import": {"file": "a.pth"}})
    found = deviations.find(comparison_of(tmp_path / "alone"))
    assert found["teacher"] == ["how it was trained is not known: it was imported"]

    write_run(tmp_path / "own" / "kd", "cifar100", "kd", 0, 0.5, teacher__epochs=9, losses__kd__temperature=2.0)
    path = tmp_path / "own" / "kd" / "results.json"
    results = json.loads(path.read_text())
    del results["teacher"]["digest"]
    path.write_text(json.dumps(results))
    found = deviations.find(comparison_of(tmp_path / "own"))
    assert found["teacher"] == ["teacher.epochs 9 (recipe 200)"]
    assert "losses.kd.temperature 2.0 (recipe 4.0)" in found["kd"]


def test_a_teacher_that_was_trained_further(tmp_path):
    """The metrics of its run have a row for each of its epochs 1 and 2, which are also its steps."""
    write_run(tmp_path / "kd", "cifar100", "kd", 0, 0.5)
    teacher = {"student__name": "resnet101", "student__width": 0.5}
    write_run(tmp_path / "teacher-net", "cifar100", "ce", 3, 0.5, **teacher, epochs=2)
    entry = json.loads((tmp_path / "kd" / "results.json").read_text())["teacher"]
    for step, notes, best in (
        (2, [], 50.5),
        (1, ["its run teacher-net was trained further afterwards, to 2 epochs"], None),
    ):
        change(tmp_path / "kd", teacher=entry | {"step": step})
        comparison = comparison_of(tmp_path)
        assert deviations.find(comparison)["teacher"] == [*notes, f"teacher.epochs {step} (recipe 200)"]
        assert comparison.runs[0].teacher_score("best") == best
        assert f"trained for {step} epoch{'s' * (step > 1)} with seed 3" in tables.recipe(comparison)


def test_a_teacher_that_another_run_trained_for_itself(tmp_path):
    """Like --config.teacher.checkpoint=runs/cifar100/cskd-seed0: the other run remains in the report."""
    for method in ("cskd", "kd"):
        write_run(tmp_path / method, "cifar100", method, 4, 0.5)
    own = {"parameters": 4000} | {e: {"epoch": 9, "top1": 0.7, "loss": 1.0} for e in ("last", "best")}
    change(tmp_path / "cskd", teacher=own, config={"teacher.epochs": 9})
    given = json.loads((tmp_path / "kd" / "results.json").read_text())["teacher"]
    change(tmp_path / "kd", teacher=given | {"checkpoint": str(tmp_path / "cskd" / "teacher")})
    comparisons = compare(find_runs([tmp_path]))
    assert [row.label for comparison in comparisons for row in comparison.rows] == ["cskd", "kd"]
    assert deviations.find(comparisons[1])["teacher"] == ["teacher.epochs 9 (recipe 200)"]
    assert comparisons[1].runs[0].teacher_score("best") == 70
    assert "trained for 9 epochs with seed 4" in tables.recipe(comparisons[1])


def test_a_run_that_teaches_another_keeps_its_place(tmp_path):
    """Only what a sweep trains as a teacher is no row: one of the seeds of ce may have taught something else."""
    for seed in range(3):
        write_run(tmp_path / f"ce-seed{seed}", "cifar100", "ce", seed, 0.6)
    write_run(tmp_path / "kd-seed0", "cifar100", "kd", 0, 0.65)
    given = json.loads((tmp_path / "kd-seed0" / "results.json").read_text())["teacher"]
    change(tmp_path / "kd-seed0", teacher=given | {"checkpoint": str(tmp_path / "ce-seed2" / "student"), "step": 2})
    (row, taught) = comparison_of(tmp_path).rows
    assert (row.label, len(row.runs)) == ("ce", 3)
    assert taught.runs[0].teacher_run.folder == tmp_path / "ce-seed2"


def test_a_teacher_with_a_first_phase(tmp_path):
    """The epochs of the first phase, which its metrics count, are none of the epochs of its configuration."""
    write_run(tmp_path / "ft", "cifar100", "ft", 3, 0.7, epochs=2, first_phase__epochs=30)
    path = tmp_path / "ft" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"epoch": row["epoch"] + 30}) + "\n" for row in rows))
    write_run(tmp_path / "kd", "cifar100", "kd", 0, 0.5)
    given = json.loads((tmp_path / "kd" / "results.json").read_text())["teacher"]
    change(tmp_path / "kd", teacher=given | {"checkpoint": str(tmp_path / "ft" / "student"), "step": 2})
    (comparison,) = (found for found in compare(find_runs([tmp_path])) if found.rows[0].label == "kd")
    assert "trained for 2 epochs with seed 3" in tables.recipe(comparison)
    assert not any("trained further" in note for note in deviations.find(comparison)["teacher"])
    assert comparison.runs[0].teacher_score("best") == pytest.approx(70.5)


def test_different_data_of_one_name(tmp_path):
    """Two folders of images are two sections, whatever their images are called; a run that does not say is a third."""
    for name, data in {"a": "0123", "b": "4567", "c": None}.items():
        for seed in (0, 1):
            folder = tmp_path / name / f"ce-seed{seed}"
            write_run(folder, "cifar100", "ce", seed, 0.5 + len(data or "") / 100 * (name == "b"))
            if data is not None:
                (folder / "config.json").write_text(json.dumps({"dataset fingerprint": data}))
    titles = {"a": "cifar100 with fingerprint 0123", "b": "cifar100 with fingerprint 4567"}
    comparisons = compare(find_runs([tmp_path / "a", tmp_path / "b"]))
    assert [found.title.partition(":")[0] for found in comparisons] == [*titles.values()]
    assert [[len(row.runs) for row in found.rows] for found in comparisons] == [[2], [2]]
    assert comparison_of(tmp_path / "a").title == "cifar100: R101_0.5 → R18_0.25"
    (found,) = compare(find_runs([tmp_path / "a", tmp_path / "c"]))
    assert (found.title, found.data_fingerprint) == ("cifar100: R101_0.5 → R18_0.25", "0123")
    found = compare(find_runs([tmp_path]))
    assert [one.title.partition(":")[0] for one in found] == ["cifar100 with fingerprint unknown", *titles.values()]
    (tmp_path / "b" / "ce-seed0" / "config.json").write_text("{")
    assert [len(row.runs) for row in compare(find_runs([tmp_path / "b"]))[0].rows] == [2], "it is not needed"
    # Validation splits of different seeds leave different images for training, as their settings say.
    for seed in (0, 1):
        write_run(tmp_path / "d" / f"v{seed}", "cifar100", "ce", 0, 0.5, dataset__validation_seed=seed)
        (tmp_path / "d" / f"v{seed}" / "config.json").write_text(json.dumps({"dataset fingerprint": f"{seed}"}))
    assert len(comparison_of(tmp_path / "d").rows) == 2


@pytest.mark.parametrize(("official", "count"), [(False, 1), (True, 0), (None, 0)])
def test_scores_on_data_that_are_not_the_official_ones(official, count, tmp_path):
    write_run(tmp_path / "kd", "cifar100", "kd", 0, 0.5)
    data = {"name": "cifar100", "categories": 100, "train_examples": 20_000, "test_examples": 10_000}
    change(tmp_path / "kd", dataset=data if official is None else data | {"official": official})
    assert sum("not the official one" in note for note in tables.results(comparison_of(tmp_path)).notes) == count


def test_marks_are_shared_by_the_rows_that_share_deviations(tmp_path):
    write_run(tmp_path / "ce", "cifar100", "ce", 0, 0.5, epochs=6)
    write_run(tmp_path / "kd", "cifar100", "kd", 0, 0.5, epochs=6, losses__kd__temperature=2.0)
    write_run(tmp_path / "teacher-net", "cifar100", "ce", 0, 0.7, student__name="resnet101", student__width=0.5)
    marks = deviations.mark(comparison_of(tmp_path))
    assert marks.of_row == {"teacher": "", "ce": "1", "kd": "1, 2"}
    assert marks.notes == ("Note 1: epochs 6 (recipe 200).", "Note 2: losses.kd.temperature 2.0 (recipe 4.0).")


def test_a_name_that_only_a_file_has_is_no_recipe(tmp_path, monkeypatch):
    """The data set of a run from elsewhere names a packaged recipe or none, and never a file to execute."""
    (tmp_path / "mine").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "kd", "cifar100", "kd", 0, 0.5)
    change(tmp_path / "runs" / "kd", config={"dataset.name": "mine"})
    assert deviations.find(comparison_of(tmp_path / "runs"))["kd"] == [f"{NO_RECIPE} of mine {WITH}"]
