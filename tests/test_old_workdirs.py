"""Workdirs that earlier versions left in the middle of an epoch: the present code carries them to their end.

Only where the formula of a loss has changed since then does it refuse to, by name.

tests/fixtures/old_workdirs holds runs of version 1 of the checkpoints, each stopped after step 4 of its last network:
`restarts` in a student whose momentum restarts at every epoch, `memory` in a student of crd, which remembers samples,
and `teacher` in a teacher, before there is a student.
"""

import json
import tarfile

import pytest

from cskd_jax.training.checkpoint import load_variables
from tests import drift
from tests.conftest import ROOT
from tests.tiers import chosen

SETTINGS = [
    "dataset.train_examples=80",
    "batch_size=32",
    "epochs=3",
    "teacher.epochs=2",
    "teacher.name=resnet8",
    "student.name=resnet8",
    "teacher.width=0.0625",
    "student.width=0.0625",
]
METHODS = {"restarts": "cskd", "teacher": "kd"}
CRD = ["losses.crd.num_negatives=64", "losses.crd.embedding_size=16", "optimizer.restart_momentum=False"]
TEACHER_DIGESTS = {"restarts": "aa11d86a1506", "memory": "776ccd889f69"}
# Test loss at the end, as the version that began these runs has it. Kernel gradients have been rounded otherwise since.
LOSSES = {"restarts": 2.320764365316439, "teacher": 2.323596430759804}
# What the version with these kernel gradients made of the runs, by machine and packages.
ENDS = json.loads((ROOT / "tests" / "golden" / "old_workdirs.json").read_text(encoding="utf-8"))


def unpack(name, folder):
    with tarfile.open(ROOT / "tests" / "fixtures" / "old_workdirs" / f"{name}.tar.xz") as archive:
        # The archives are our own. Python 3.11 has no filter before 3.11.4, and 3.12 asks for one.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder / name


def arguments_of(method, workdir, digits_dir, more=()):
    settings = [*SETTINGS, *more, f"dataset.data_dir={digits_dir}"]
    return [f"--config=digits:{method}", f"--workdir={workdir}", *(f"--config.{setting}" for setting in settings)]


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen([*METHODS], 1))
def test_an_old_run_goes_on(name, start, digits_dir, tmp_path):
    workdir = unpack(name, tmp_path)
    before = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    arguments = arguments_of(METHODS[name], workdir, digits_dir)
    # log_every was 1 at the start; it may change. Compiled as the recorded ends were.
    output, error = (process := start(arguments, XLA_FLAGS="")).communicate()
    assert process.returncode == 0, error
    assert f"{'teacher' if name == 'teacher' else 'student'}: resuming at step 4 of" in output
    assert "; 1 x cpu\n" in output  # However many cores there are: so it began.
    assert (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[: len(before)] == before
    assert "dataset fingerprint" in json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    last = json.loads((workdir / "results.json").read_text(encoding="utf-8"))["student"]["last"]
    assert last["epoch"] == 3
    assert last["loss"] == pytest.approx(LOSSES[name], rel=1e-6)
    expected = ENDS.get(drift.fingerprint())
    if expected is not None:
        assert drift.digest_of_run(workdir) == expected[name]


@pytest.mark.slow
def test_an_old_run_of_another_formula_is_refused(start, digits_dir, tmp_path):
    workdir = unpack("memory", tmp_path)
    before = sorted(workdir.rglob("*"))
    output, error = (process := start(arguments_of("crd", workdir, digits_dir, CRD))).communicate()
    assert process.returncode == 2, output
    assert "losses.crd version 1 != 2: the formula of the loss crd has changed between versions of cskd_jax" in error
    assert [path for path in sorted(workdir.rglob("*")) if path.name != "lock"] == before


@pytest.mark.parametrize("name", TEACHER_DIGESTS)
def test_an_old_checkpoint_is_read(name, tmp_path):
    """As a teacher for others; its digest is that of the arrays by the names that they had."""
    saved = load_variables(str(unpack(name, tmp_path) / "teacher"))
    assert saved.variables.keys() == {"params", "batch_stats"}
    assert saved.record.network == {"name": "resnet8", "width": 0.0625}
    assert (saved.step, saved.record.finished, saved.digest[:12]) == (6, True, TEACHER_DIGESTS[name])
