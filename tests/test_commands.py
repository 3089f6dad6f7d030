"""The commands as programs: their list, their help, their console that goes away; and the configuration shown."""

import configparser
import importlib.metadata
import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys

import numpy as np
import optax
import pytest
from flax import linen as nn

import cskd_jax
from cskd_jax.__main__ import main
from cskd_jax.commands.table import COMMANDS
from cskd_jax.errors import UserError
from cskd_jax.files import local_folder
from cskd_jax.runs import keys, schema
from cskd_jax.runs.loss_keys import loss_keys
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.runs.workdir import default_workdir, identify
from tests.conftest import ROOT

MODULES = {
    "cskd_jax.main": "cskd-jax train RECIPE",
    "cskd_jax.sweep": "cskd-jax sweep RECIPE",
    "cskd_jax.report": "cskd-jax report RUNS",
    "cskd_jax.evaluate": "cskd-jax evaluate DIR",
    "cskd_jax.supervise": "cskd-jax supervise ",
    "cskd_jax.interop.export": "cskd-jax export WORKDIR",
    "cskd_jax.interop.import_torch": "cskd-jax import-torch FILE",
}
DATA = np.zeros((4, 2, 2, 1), np.float32), np.array([0, 1, 0, 1])
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def python(*arguments, **settings):
    """Runs Python on arguments, elsewhere than in the repository."""
    settings = {"cwd": "/", "env": ENVIRONMENT, "capture_output": True, "text": True} | settings
    return subprocess.run([sys.executable, *arguments], **settings)


def test_all_commands_are_listed(capsys):
    assert main(["cskd-jax"]) == 0
    listed = capsys.readouterr().out
    assert main(["cskd-jax", "--help"]) == 0
    assert capsys.readouterr().out == listed
    for name, command in COMMANDS.items():
        assert f"  {name.ljust(12)}  {command.summary}\n" in listed
    assert python("-m", "cskd_jax").stdout == listed


def test_the_installed_command_is_this_one():
    package = configparser.ConfigParser()
    package.read(ROOT / "setup.cfg")
    name, entry = package["options.entry_points"]["console_scripts"].split("=")
    assert (name.strip(), entry.strip()) == ("cskd-jax", "cskd_jax.__main__:start")
    process = python("-c", "from cskd_jax.__main__ import start; start()", "config", "shwo")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: config must be followed by show or keys")


@pytest.mark.parametrize("module", MODULES)
def test_help_of_a_module_is_that_of_its_command(module, capsys):
    process = python("-m", module, "--help")
    assert (process.returncode, process.stderr) == (0, "")
    usage = MODULES[module]
    assert process.stdout.splitlines()[2].startswith(usage)
    assert main([*usage.split()[:2], "-h"]) == 0
    assert capsys.readouterr().out == process.stdout


HELP_OF_ALL = """
import sys
from cskd_jax.__main__ import main
from cskd_jax.commands.table import COMMANDS
for name in COMMANDS:
    assert main(["cskd-jax", name, "--help"]) == 0
print(sorted({"absl", "flax", "jax", "numpy", "sklearn", "tensorflow_datasets", "tqdm"} & sys.modules.keys()))
"""


def test_help_imports_nothing():
    process = python("-c", HELP_OF_ALL)
    assert process.stdout.splitlines()[-1] == "[]", process.stderr


@pytest.mark.parametrize(
    ("module", "hint"),
    [
        ("cskd_jax.train", "did you mean cskd-jax train?"),
        ("cskd_jax.distillation", "did you mean cskd-jax train?"),
        ("cskd_jax.commands.train", "did you mean cskd-jax train?"),
        ("cskd_jax.runs.sweep", "did you mean cskd-jax sweep?"),
        ("cskd_jax.export", "did you mean cskd-jax export?"),
        ("cskd_jax.console", f"the commands are {', '.join(COMMANDS)}"),
    ],
)
def test_other_modules_are_no_commands(module, hint):
    process = python("-m", module, "--config=digits:kd")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"error: {module} is not a command; {hint}\n"


TALKING = """
import os, pathlib, signal, sys
from cskd_jax.commands import command_line

def talk(argv):
    print("first", flush=True)
    sys.stdin.read()  # until the reader is gone
    os.kill(os.getpid(), signal.SIGHUP)
    for _ in range(1000):
        print("more", 100 * "x")
        print("more", file=sys.stderr)
    pathlib.Path(argv[1]).write_text("done")
    print("not flushed before the end")

command_line.start(talk)
"""


def talk(path, **streams):
    command = [sys.executable, "-c", TALKING, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=ENVIRONMENT, **streams)


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    """As `| head -1` does, with standard error to the same pipe, and a connection that is lost."""
    process = talk(tmp_path / "result", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "result").read_text() == "done"


def test_nothing_is_said_about_a_reader_that_goes_away(tmp_path):
    process = talk(tmp_path / "result", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == 1000 * b"more\n"
    process.stderr.close()
    assert process.wait(timeout=20) == 0


def test_a_terminal_that_is_closed_ends_nothing(tmp_path):
    terminal, end = pty.openpty()
    process = talk(tmp_path / "result", stdout=end, stderr=end)
    os.close(end)
    assert os.read(terminal, 100).strip() == b"first"
    os.close(terminal)
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "result").read_text() == "done"


def test_console_that_was_closed_before_the_start(tmp_path):
    process = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m cskd_jax >&- 2>&-'], env=ENVIRONMENT, capture_output=True, cwd=tmp_path
    )
    assert process.returncode == 0


@pytest.mark.parametrize("closed", ["<&- 2>&-", "<&- >&- 2>&-", "2>&-"])
def test_no_file_becomes_a_stream_that_was_closed(closed, tmp_path):
    code = f"""
import os, subprocess
from cskd_jax.commands.streams import outlive_console

outlive_console()
with open({str(tmp_path / "file")!r}, "w") as file:
    os.write(2, b"message")
    subprocess.run(["sh", "-c", "echo message >&2"], check=True)
    assert file.fileno() > 2
"""
    (tmp_path / "program.py").write_text(code, encoding="utf-8")
    command = f'"{sys.executable}" "{tmp_path / "program.py"}" {closed}'
    subprocess.run(["sh", "-c", command], env=ENVIRONMENT, check=True)
    assert (tmp_path / "file").read_bytes() == b""


def test_nothing_waits_where_python_does_not_buffer():
    """On a terminal, the clock of a pause and the line after it would be mixed up."""
    code = """
import os, sys
from cskd_jax.commands.streams import outlive_console

outlive_console()
for file, text in ((sys.stderr, "clock"), (sys.stderr, "\\r"), (sys.stdout, "line")):
    file.write(text)
os.write(1, b".")
"""
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
    )
    assert process.stdout == b"clock\rline."


@pytest.mark.parametrize(("call", "code"), [("outlive_full_disk()", 0), ("", 1)])
def test_console_on_a_full_disk(call, code):
    """Results are in other files; what is shown is lost, unless it is all that a command makes."""
    program = f"""
from cskd_jax.commands.streams import outlive_console, outlive_full_disk

outlive_console()
{call}
print("line", flush=True)
"""
    with open("/dev/full", "wb") as full:
        process = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE)
    assert process.returncode == code
    assert (b"No space left on device" in process.stderr) == bool(code)


@pytest.mark.slow
def test_training_without_a_console(start, small_run, tmp_path):
    process = start([f"{small_run[0]}:ce", *small_run[1:], "--config.epochs=1", f"--workdir={tmp_path / 'run'}"])
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_flags_with_and_without_an_equals_sign(capsys):
    shown = []
    for words in (
        ["digits:kd", "--config.epochs=3", "--config.augment.flip=true"],
        ["--config=digits:kd", "--config.epochs=4", "--config.augment.flip", "--config.epochs=3"],
        ["--config", "digits:kd", "--config.epochs", "3", "--config.augment.flip"],
        ["-config.epochs=3", "-config", "digits:kd", "-config.augment.flip", "1"],
    ):
        assert main(["cskd-jax", "config", "show", *words]) == 0
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1
    assert re.search(r"^\* epochs +3 +\(default 200\)$", shown[0], re.M)
    assert re.search(r"^\* augment.flip +true +\(default false\)$", shown[0], re.M)


def test_shown_configuration(capsys):
    assert main(["cskd-jax", "config", "show", "digits:kd+at", "--config.losses.kd.temperature=2"]) == 0
    *lines, empty, explanation = capsys.readouterr().out.splitlines()
    assert (empty, explanation) == ("", "* marks a value that differs from the default of its key, which follows it.")
    assert lines[:2] == ["digits:kd+at, workdir runs/digits/at+kd-seed0-losses.kd.temperature=2", ""]
    config = load_recipe("digits:kd+at", ["--config.losses.kd.temperature=2"])
    values = schema.flatten(config)
    names = [line[2:].split()[0] for line in lines[2:]]
    assert names[: len(keys.KEYS)] == list(keys.KEYS), "in the order of the schema"
    assert set(names) == set(values)
    marked = {line[2:].split()[0] for line in lines if line.startswith("* ")}
    assert marked == {name for name in names if values[name] != schema.find_key(name).default}
    # What is shown can be typed.
    typed = [f"--config.{name}={line[2:].split()[1]}" for name, line in zip(names, lines[2:], strict=True)]
    again = load_recipe("digits:kd+at", [argument for argument in typed if "config.method=" not in argument])
    assert schema.flatten(again) == values


@pytest.mark.parametrize("method", ["mine", "bkd"])
def test_sources_of_a_method_that_other_recipes_do_not_have(method, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from cskd_jax.configs import digits\n\n\ndef get_config(word='kd'):\n"
        f"    config = digits.get_config(word)\n    config.method = '{method}'\n    return config\n\n\n"
        "def get_sources(word='kd'):\n    return {'losses.kd.weight': 'a thesis'}\n"
    )
    assert main(["cskd-jax", "config", "show", str(tmp_path / "mine.py")]) == 0
    assert capsys.readouterr().out.endswith("\npublished in a thesis:\n  losses.kd.weight  0.9\n")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.beta1=0.8"], "optimizer.beta1 has no effect unless optimizer.name is adamw; it is sgd"),
        (
            ["optimizer.name=adamw", "optimizer.momentum=0.8"],
            "optimizer.momentum has no effect unless optimizer.name is",
        ),
        (["optimizer.schedule=cosine", "optimizer.milestones=(9,)"], "unless optimizer.schedule is step; it is cosine"),
        (["sampler.samples_per_category=8"], "unless sampler.name is balanced; it is uniform"),
        (["dataset.validation_seed=3"], "unless dataset.validation_examples is set; it is None"),
        (["teacher.combine=probabilities"], "unless teacher.others is set; it is ()"),
        (["first_phase.learning_rate=0.1"], "unless first_phase.epochs is set; it is 0"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_overrides_without_an_effect(overrides, message, capsys):
    """Nobody types what is not to be; the value that a key has anyway may be typed."""
    arguments = [f"--config.{override}" for override in overrides]
    for command in (["config", "show"], ["train"]):
        assert main(["cskd-jax", *command, "digits:kd", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    cleared = ["--config.optimizer.schedule=cosine", "--config.optimizer.milestones=()"]
    for arguments in (["--config.optimizer.beta1=0.9"], cleared):
        assert main(["cskd-jax", "config", "show", "digits:kd", *arguments]) == 0


def test_explained_keys(capsys):
    assert main(["cskd-jax", "config", "keys"]) == 0
    everything = capsys.readouterr().out
    for path, key in keys.KEYS.items():
        assert f"{path}\n    " in everything
        assert " ".join(key.meaning.split()) in " ".join(everything.split())
    assert "losses.NAME.start_epoch\n    default 0; an integer from 0 to 1000000\n" in everything
    assert main(["cskd-jax", "config", "keys", "losses.kd."]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert shown == [f"losses.kd.{setting}" for setting in loss_keys("kd")]
    assert main(["cskd-jax", "config", "keys", "*.width"]) == 0
    assert capsys.readouterr().out.startswith("teacher.width\n    default 1.0; a number greater than 0, up to 64\n")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "kd-seed0"),
        (["seed=3"], "kd-seed3"),
        (["epochs=30", "student.width=0.125"], "kd-seed0"),
        (["dataset.data_dir=/data", "log_every=3"], "kd-seed0"),
        (["student.width=0.5", "epochs=1"], "kd-seed0-epochs=1-student.width=0.5"),
        (["epochs=300"], "kd-seed0"),
        (["epochs=300", "drop_last=true", "seed=1"], "kd-seed1-drop_last=True"),
        (
            ["optimizer.milestones=(3,5)", "losses.kd.temperature=2"],
            "kd-seed0-optimizer.milestones=3,5-losses.kd.temperature=2",
        ),
        (["teacher.checkpoint=/some where/else"], "kd-seed0-teacher.checkpoint=[0-9a-f]{8}"),
        ([f"optimizer.milestones={tuple(range(1, 60))}"], "kd-seed0-[0-9a-f]{8}"),
    ],
)
def test_default_folder_is_called_by_what_changes_results(overrides, name):
    config = load_recipe("digits:kd", [f"--config.{override}" for override in overrides])
    assert re.fullmatch(f"runs/digits/{name}", str(default_workdir("digits:kd", config)))


@pytest.mark.parametrize(("word", "name"), [("KD", "kd"), ("Kd+AT", "at+kd"), ("R18_0.5/R18/KD", "R18_0.5/R18/kd")])
def test_default_folder_is_the_same_whatever_the_case_of_the_method(word, name):
    assert str(default_workdir(f"digits:{word}", load_recipe(f"digits:{word}", []))) == f"runs/digits/{name}-seed0"


def test_a_run_that_an_earlier_version_has_left_in_the_plain_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_recipe("digits:kd", ["--config.epochs=1"])
    named = default_workdir("digits:kd", config)
    plain = named.with_name("kd-seed0")
    plain.mkdir(parents=True)
    (plain / "config.json").write_text(json.dumps(identify(config)))
    assert default_workdir("digits:kd", config) == plain
    other = load_recipe("digits:kd", ["--config.epochs=2"])
    assert default_workdir("digits:kd", other) == named.with_name("kd-seed0-epochs=2")
    named.mkdir()
    assert default_workdir("digits:kd", config) == named


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: cskd_jax.run("digits:ce", folder),
        lambda folder: cskd_jax.load_run(folder),
        lambda folder: cskd_jax.distill(
            nn.Dense(2), losses={"cross_entropy": 1.0}, optimizer=optax.sgd(0.1), train=DATA, test=DATA, workdir=folder
        ),
    ],
    ids=["run", "load_run", "distill"],
)
@pytest.mark.parametrize("folder", ["gs://bucket/run", pathlib.Path("s3://bucket/run")])
def test_addresses_are_no_folders_in_python_either(use, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cskd_jax.UserError, match=f"{folder} is a URL, not a folder: name a local or mounted"):
        use(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(cskd_jax.UserError, match=r"notes.txt is a file, not a folder$"):
        local_folder(tmp_path / "notes.txt")


def test_the_home_folder_may_be_named(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_folder("~/runs") == pathlib.Path("/home/me/runs")


def test_folders_whose_path_no_library_can_write(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"the path of the folder a\\udcff is not valid UTF-8: rename it"):
        local_folder(os.fsdecode(b"a\xff"))
    (tmp_path / os.fsdecode(b"b\xff")).mkdir()
    monkeypatch.chdir(tmp_path / os.fsdecode(b"b\xff"))
    with pytest.raises(UserError, match="is not valid UTF-8"):
        local_folder("runs")


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag, capsys):
    assert main(["cskd-jax", flag]) == 0
    assert capsys.readouterr().out == f"cskd-jax {importlib.metadata.version('cskd_jax')}\n"
