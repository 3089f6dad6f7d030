"""A search in a sweep: its runs, what is chosen, and the runs that follow."""

import csv
import functools
import itertools
import json

import pytest

from cskd_jax.commands.sweep import main as sweep_main
from cskd_jax.errors import UserError
from cskd_jax.runs import grid, schema, search
from cskd_jax.runs.sweep import FailedRunsError
from tests.conftest import ROOT
from tests.report_runs import write_run

DIGITS = f"{ROOT}/configs/digits.py"
VALIDATION = ["--config.dataset.validation_examples=100"]


def write_results(run, score):
    """Results of a run whose test score, which must not decide, is the opposite."""
    write_run(run.workdir, "digits", "ce", 3, 0.99 - score)
    path = run.workdir / "results.json"
    results = json.loads(path.read_text())
    results["student"]["validation"] = {
        "last": {"top1": score, "loss": 0.0, "top5": 1.0},
        "best": {"top1": 1 - score},
    }
    path.write_text(json.dumps(results))


@pytest.mark.parametrize("validation", [None, [], {"last": {"top1": "x"}}, {"last": {"loss": 1.0}}, {"best": {}}])
def test_a_score_that_is_not_sound(validation, tmp_path):
    (trial, *_) = make_trials(tmp_path, ["losses.kd.weight=0.5,0.9"])
    write_results(trial.run, 0.5)
    path = trial.run.workdir / "results.json"
    results = json.loads(path.read_text())
    results["student"]["validation"] = validation
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match="has no valid evaluation on a validation split"):
        search.choose([trial], tmp_path)


def test_values_of_a_grid():
    found = search.parse(["losses.kd.weight=0.5,0.9", "--config.optimizer.milestones=(3,4),(5,)"])
    assert found == {"losses.kd.weight": ["0.5", "0.9"], "optimizer.milestones": ["(3,4)", "(5,)"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["losses.kd.weight"], "--grid takes KEY=VALUE,VALUE, such as losses.kd.weight=0.5,0.9; got losses.kd.weight"),
        (["losses.kd.weight="], "--grid takes KEY=VALUE,VALUE"),
        (["seed=0,1"], "--grid cannot vary seed: it varies settings of methods; --seeds and --methods set the others"),
        (["teacher.width=1,2"], "--grid cannot vary teacher.width"),
        (["epochs=1,2", "epochs=3"], "--grid lists epochs twice"),
        (["epochs=1,1"], "--grid lists a value of epochs twice"),
        (["optimizer.learning_rate=0.1,0.2,0.10"], "--grid lists a value of optimizer.learning_rate twice"),
        (["optimizer.milestones=(10,20"], "--grid takes KEY=VALUE,VALUE"),
        (["losses.kd.weight=0.5,,0.9"], "--grid takes KEY=VALUE,VALUE"),
        (["log_every=5,10"], "--grid cannot vary log_every, which does not change results"),
    ],
)
def test_grids_that_are_none(arguments, message):
    with pytest.raises(UserError) as error:
        search.parse(arguments)
    assert str(error.value).startswith(message)


def make_trials(folder, values):
    return search.make_trials(DIGITS, ["ce", "kd", "at"], 3, folder, VALIDATION, search.parse(values))


def test_every_method_with_the_values_that_it_has(tmp_path):
    trials = make_trials(tmp_path, ["losses.kd.weight=0.5,0.9", "losses.kd.temperature=2,4"])
    assert [trial.word for trial in trials] == ["kd"] * 4
    assert [trial.run.name for trial in trials] == [
        "kd-losses.kd.temperature=2-losses.kd.weight=0.5-seed3", "kd-losses.kd.weight=0.5-seed3",
        "kd-losses.kd.temperature=2-seed3", "kd-seed3",
    ]  # fmt: skip
    config = trials[0].run.config
    assert (config.losses.kd.weight, config.losses.kd.temperature, config.seed) == (0.5, 2.0, 3)
    assert config.dataset.validation_examples == 100
    teacher, *runs = search.runs_of(trials)
    assert runs == [trial.run for trial in trials]
    assert {run.teacher for run in runs} == {teacher}
    assert teacher.workdir == tmp_path / "search" / "teacher-resnet18_0.25"
    assert teacher.config.dataset.validation_examples == 100, "it has not seen what judges its students"

    trials = make_trials(tmp_path, ["optimizer.learning_rate=0.01,0.1"])
    assert [trial.word for trial in trials] == ["ce", "ce", "kd", "kd", "at", "at"]
    assert search.runs_of(trials)[0].config.optimizer.learning_rate == 0.05, "the grid is that of the students"


def test_the_validation_split_chooses(tmp_path, capsys):
    trials = make_trials(tmp_path, ["losses.kd.weight=0.5,0.9", "losses.at.weight=1,10,100"])
    for trial, score in zip(trials, (0.7, 0.6, 0.3, 0.5, 0.5), strict=True):
        write_results(trial.run, score)
    best = search.choose(trials, tmp_path)
    assert best == {"kd": {"losses.kd.weight": "0.5"}, "at": {"losses.at.weight": "10"}}, "the first of equals"
    said = capsys.readouterr().out
    assert "kd: losses.kd.weight=0.5 is the best of 2 on the validation split, top-1 0.7000" in said
    rows = list(csv.DictReader((tmp_path / "search.csv").read_text().splitlines()))
    assert [(row["word"], row["validation_last"], row["chosen"]) for row in rows] == [
        ("kd", "0.7", "yes"), ("kd", "0.6", ""), ("at", "0.3", ""), ("at", "0.5", "yes"), ("at", "0.5", ""),
    ]  # fmt: skip
    assert rows[0]["losses.kd.weight"] == "0.5"
    assert rows[0]["losses.at.weight"] == ""
    assert (tmp_path / rows[0]["folder"] / "results.json").exists()

    settings = {word: search.as_overrides(values) for word, values in best.items()}
    overrides = search.without_validation(VALIDATION)
    runs = grid.make_grid(DIGITS, ["ce", "kd"], [0, 1], tmp_path, overrides, settings=settings)
    assert [run.name for run in runs] == ["teacher-resnet18_0.25", "ce-seed0", "kd-seed0", "ce-seed1", "kd-seed1"]
    assert {run.config.losses.kd.weight for run in runs if "kd" in run.name} == {0.5}
    assert {run.config.dataset.validation_examples for run in runs} == {None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "losses.kd.weight=0.5,0.9"], "add --config.dataset.validation_examples=N"),
        (["--grid", "losses.kd.wieght=1,2", *VALIDATION], "unknown configuration key losses.kd.wieght; did you mean"),
        (["--grid=losses.kd.weight=a,b", *VALIDATION], "losses.kd.weight is 'a'"),
        (
            ["--grid=optimizer.beta1=0.8,0.9", *VALIDATION],
            "optimizer.beta1 has no effect unless optimizer.name is adamw",
        ),
        (["--config.optimizer.delta=0.1"], "optimizer.delta has no effect unless optimizer.name is dot; it is sgd"),
        (["--teacher_seeds=x"], "--teacher_seeds is x; it must list integers"),
        (["--pairs=R18/R18,R18/R18"], "--pairs lists r18/r18 twice"),
        (["--pairs=R18"], "--pairs is R18; it must list TEACHER/STUDENT, such as resnet56/resnet20"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    assert sweep_main(["sweep", DIGITS, "--methods=kd", *arguments, f"--workdir={tmp_path / 'sweep'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "sweep").exists()


def test_several_teachers_and_pairs(tmp_path):
    words = ["resnet56/resnet20/ce", "resnet56/resnet20/kd", "vgg13/mobilenet_v2/kd"]
    runs = grid.make_grid("cifar100_standard", words, [0], tmp_path, [], teacher_seeds=[5, 6])
    assert [run.name for run in runs] == [
        "teacher-resnet56_1-seed5", "teacher-resnet56_1-seed6", "teacher-vgg13_1-seed5", "teacher-vgg13_1-seed6",
        "resnet56/resnet20/ce-seed0", "resnet56/resnet20/kd-teacher5-seed0", "resnet56/resnet20/kd-teacher6-seed0",
        "vgg13/mobilenet_v2/kd-teacher5-seed0", "vgg13/mobilenet_v2/kd-teacher6-seed0",
    ]  # fmt: skip
    by_name = {run.name: run.config for run in runs}
    teacher = by_name["teacher-vgg13_1-seed6"]
    assert (teacher.seed, teacher.epochs, teacher.optimizer.learning_rate) == (6, 240, 0.05)
    student = by_name["vgg13/mobilenet_v2/kd-teacher6-seed0"]
    assert (student.seed, student.optimizer.learning_rate) == (0, 0.01)
    assert student.teacher.checkpoint == f"{tmp_path}/teacher-vgg13_1-seed6/student"


@pytest.mark.slow
@pytest.mark.parametrize(("diverging", "chosen"), [((0.25,), 0.5), ((0.25, 0.5), None)])
def test_values_that_diverge_are_not_chosen(diverging, chosen, digits_dir, tmp_path, monkeypatch):
    done = []

    def pretend(groups, jobs):
        runs = list(itertools.chain.from_iterable(groups))
        failed = [run for run in runs if run.config.losses.get("kd", {}).get("weight") in diverging]
        done.extend(run for run in runs if run not in failed)
        for run in runs:
            if run not in failed:
                write_results(run, 0.1)
        if failed:
            raise FailedRunsError("some runs failed")

    monkeypatch.setattr("cskd_jax.runs.sweep.sweep", pretend)
    arguments = [f"--config.dataset.data_dir={digits_dir}", f"--workdir={tmp_path}", *VALIDATION]
    arguments += ["--methods=kd", "--seeds=4", "--grid", "losses.kd.weight=0.5,0.25"]
    assert sweep_main(["sweep", DIGITS, *arguments]) == FailedRunsError.exit_code
    rows = list(csv.DictReader((tmp_path / "search.csv").read_text().splitlines()))
    assert [(row["losses.kd.weight"], row["metric"], row["chosen"]) for row in rows] == [
        ("0.5", "failed" if chosen is None else "top-1", "" if chosen is None else "yes"), ("0.25", "failed", ""),
    ]  # fmt: skip
    trained = [run.config.losses.kd.weight for run in done if run.name == "kd-seed4"]
    assert trained == ([] if chosen is None else [chosen])


@pytest.mark.slow
def test_the_best_is_trained_with_all_seeds(digits_dir, tmp_path, monkeypatch):
    """The command, with results that are written instead of trained."""
    done = []

    def pretend(groups, jobs):
        assert jobs == 2
        for run in itertools.chain.from_iterable(groups):
            done.append(run)
            write_results(run, 0.9 if run.config.losses.get("kd", {}).get("weight") == 0.25 else 0.1)

    monkeypatch.setattr("cskd_jax.runs.sweep.sweep", pretend)
    arguments = [f"--config.dataset.data_dir={digits_dir}", f"--workdir={tmp_path}", "--jobs=2", *VALIDATION]
    arguments += ["--methods=ce,kd", "--seeds=4,5", "--grid", "losses.kd.weight=0.5,0.25"]
    assert sweep_main(["sweep", DIGITS, *arguments]) == 0
    names = [str(run.workdir.relative_to(tmp_path)) for run in done]
    assert names == [
        "search/teacher-resnet18_0.25", "search/kd-losses.kd.weight=0.5-seed4", "search/kd-losses.kd.weight=0.25-seed4",
        "teacher-resnet18_0.25", "ce-seed4", "kd-seed4", "ce-seed5", "kd-seed5",
    ]  # fmt: skip
    assert {run.config.losses.kd.weight for run in done[3:] if run.name.startswith("kd")} == {0.25}
    splits = [run.config.dataset.validation_examples for run in done]
    assert splits == [100] * 3 + [None] * 5, "the test split has chosen nothing"
    assert (tmp_path / "search.csv").exists()


def test_results_that_could_not_be_stored_are_no_reason_to_search(digits_dir, tmp_path, capsys):
    """A sweep of another weight in the same folder; if one outcome of the search fits, it may start."""
    (run,) = (run for run in grid.make_grid(DIGITS, ["kd"], [0], tmp_path, []) if run.word == "kd")
    (run.workdir / "student" / "checkpoints" / "1").mkdir(parents=True)
    (run.workdir / "config.json").write_text(json.dumps(schema.plain(run.config) | {"losses.kd.weight": 0.7}))
    arguments = [f"--config.dataset.data_dir={digits_dir}", f"--workdir={tmp_path}", *VALIDATION, "--methods=kd"]
    assert sweep_main(["sweep", DIGITS, *arguments, "--grid", "losses.kd.weight=0.5,0.25"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another configuration (losses.kd.weight 0.7 != 0.5)" in line
    assert not (tmp_path / "search").exists()
    values = ["losses.kd.weight=0.5,0.7"]
    trials = search.make_trials(DIGITS, ["kd"], 0, tmp_path, VALIDATION, search.parse(values))
    search.check_outcomes(trials, functools.partial(grid.make_grid, DIGITS, seeds=[0], workdir=tmp_path, overrides=[]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config.dataset.validation_seed=3", "--grid=losses.kd.weight=0.5,0.9"],
        ["--config.optimizer.beta1=0.8", "--grid=optimizer.name=sgd,adamw"],
    ],
    ids=["of the validation split", "with the grid"],
)
def test_overrides_that_some_runs_read(arguments, digits_dir, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("cskd_jax.runs.sweep.sweep", lambda groups, jobs: started.append(groups))
    monkeypatch.setattr(search, "choose", lambda trials, workdir: {})
    arguments = [*arguments, f"--config.dataset.data_dir={digits_dir}", f"--workdir={tmp_path}", *VALIDATION]
    assert sweep_main(["sweep", DIGITS, "--methods=ce,kd", *arguments]) == 0
    assert len(started) == 2


def test_a_recipe_with_a_validation_split(tmp_path):
    """After the search, its methods learn from the whole training split like those of any recipe."""
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from cskd_jax.configs import digits\n\n\ndef get_config(word='ce'):\n"
        "    config = digits.get_config(word)\n    config.dataset.validation_examples = 100\n    return config\n"
    )
    (run,) = grid.make_grid(str(recipe), ["ce"], [0], tmp_path, search.without_validation([]))
    assert run.config.dataset.validation_examples is None


def test_a_first_phase_that_no_method_has(tmp_path):
    with pytest.raises(UserError, match="first_phase.epochs is only for methods with a first phase, ab, fsp, ft, and"):
        make_trials(tmp_path, ["first_phase.epochs=1,2"])


def test_numbers_of_epochs(tmp_path):
    """A run alone would be extended to more epochs; here each number is a run of its own."""
    trials = make_trials(tmp_path, ["epochs=1,30,60"])
    assert len({trial.run.workdir for trial in trials}) == len(trials) == 9
    assert [trial.run.name for trial in trials[:3]] == ["ce-epochs=1-seed3", "ce-seed3", "ce-epochs=60-seed3"]
