"""The launch scripts: what they would run, and what they do with command-line tools that only record their calls."""

import os
import pathlib
import shutil
import subprocess

import pytest
import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
RECIPE = "--config=configs/digits.py"


@pytest.fixture
def fake(tmp_path):
    """Puts a tool on PATH that appends its arguments to the file `calls` and then runs a script."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name, script=""):
        path = folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} ${{*//$\'\\n\'/; }}" >> {tmp_path}/calls\n{script}\n')
        path.chmod(0o755)

    add("sleep")  # The scripts wait for clusters.
    return add


@pytest.fixture
def launch(tmp_path):
    """Runs a script with the fake tools on PATH; returns the finished process and the calls."""

    def launch(*command, **environment):
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        process = subprocess.run(
            ["bash", *command], cwd=ROOT, env=os.environ | {"PATH": path} | environment, text=True, capture_output=True
        )
        calls = tmp_path / "calls"
        return process, calls.read_text().splitlines() if calls.exists() else []

    return launch


def kinds(calls):
    """What gcloud was asked to do, in order."""
    return [call.split()[4] for call in calls if call.startswith("gcloud compute tpus")]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", *LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")], check=True)


@pytest.mark.parametrize("script", ["local.sh", "tpu_vm.sh", "slurm.sbatch"])
def test_usage(launch, script):
    process, _ = launch(LAUNCH / script)
    assert process.returncode == 2
    assert "usage: " in process.stderr


def test_local_dry_run(launch):
    process, _ = launch(LAUNCH / "local.sh", "--dry-run", "3", RECIPE, DEVICES="2")
    assert process.returncode == 0, process.stderr
    assert f"-m cskd_jax.supervise --processes=3 -- python -m cskd_jax.main {RECIPE}" in process.stdout
    assert "--xla_force_host_platform_device_count=2" in process.stdout


def test_tpu_vm_dry_run(launch, fake):
    fake("gcloud")
    process, calls = launch(LAUNCH / "tpu_vm.sh", "--dry-run", "run", "first", RECIPE, BUCKET="gs://b")
    assert process.returncode == 0, process.stderr
    assert calls == []
    assert kinds(process.stdout.splitlines()) == ["create", "ssh", "scp", "ssh", "ssh"]


# A VM whose state is in a file; what `scp` and `train` say happens to the copy and the run.
TPU_VM = """
case "$4" in
  describe) cat {folder}/state; grep -q DELETING {folder}/state && : > {folder}/state ;;
  create) echo READY > {folder}/state ;;
  delete) : > {folder}/state ;;
  scp) {scp} ;;
  ssh) case "$*" in *cskd_jax.main*) {train} ;; esac ;;
esac
"""
PREEMPTED_ONCE = "test -e {folder}/again && exit 0; touch {folder}/again; echo PREEMPTED > {folder}/state; exit 255"


@pytest.mark.parametrize(
    ("state", "train", "code", "expected"),
    [
        ("", "exit 0", 0, "create ssh scp ssh ssh"),
        ("READY", "exit 0", 0, "ssh scp ssh ssh"),
        ("READY", "exit 3", 3, "ssh scp ssh ssh"),
        ("", PREEMPTED_ONCE, 0, "create ssh scp ssh ssh delete create ssh scp ssh ssh"),
        ("DELETING", "exit 0", 0, "create ssh scp ssh ssh"),
    ],
    ids=["new", "there", "diverged", "preempted", "deleting"],
)
def test_tpu_vm(launch, fake, tmp_path, state, train, code, expected):
    (tmp_path / "state").write_text(state)
    fake("gcloud", TPU_VM.replace("{train}", train).replace("{scp}", "").replace("{folder}", str(tmp_path)))
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE, BUCKET="gs://b")
    assert process.returncode == code, process.stderr
    assert [kind for kind in kinds(calls) if kind != "describe"] == expected.split()
    run = next(call for call in calls if "cskd_jax.main" in call)
    assert "--worker=all" in run
    assert f"cskd_jax.main --cluster --workdir=runs/first {RECIPE}" in run
    assert "gs://b/first" in run


def test_tpu_vm_does_not_run_what_it_could_not_install(launch, fake, tmp_path):
    (tmp_path / "state").write_text("READY")
    fake("gcloud", TPU_VM.replace("{train}", "exit 0").replace("{scp}", "exit 5").replace("{folder}", str(tmp_path)))
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE, BUCKET="gs://b")
    assert process.returncode == 5, process.stderr
    assert [kind for kind in kinds(calls) if kind != "describe"] == ["ssh", "scp"]


def test_tpu_vm_needs_a_bucket_and_deletes(launch, fake):
    fake("gcloud")
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE)
    assert "BUCKET" in process.stderr
    assert (process.returncode, calls) == (1, [])
    process, calls = launch(LAUNCH / "tpu_vm.sh", "delete", "first")
    assert (process.returncode, kinds(calls)) == (0, ["delete"])


SRUN = "srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task=4"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_slurm(launch, fake, code, requeued):
    fake("srun", f"exit {code}")
    fake("scontrol")
    variables = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "PYTHONPATH": str(ROOT)}
    process, calls = launch(LAUNCH / "slurm.sbatch", RECIPE, "--workdir=w", **variables)
    assert process.returncode == code, process.stderr
    assert calls[0] == f"{SRUN} python -m cskd_jax.main --cluster {RECIPE} --workdir=w"
    assert calls[1:] == ["scontrol requeue 7"] * requeued


# As the real one: SIGTERM to srun kills its task, and only scancel brings one to it.
SRUN_WITH_A_TASK = """
bash -c "trap 'echo saved >> {folder}/calls; exit 75' TERM
touch {folder}/ready; while true; do /bin/sleep 0.05; done" &
trap "kill -9 $!; exit 137" TERM
echo $! > {folder}/task
wait $!
"""


def test_slurm_saves_before_the_time_limit(fake, tmp_path):
    """SIGTERM to the batch script, as --signal=B:TERM sends it, reaches the tasks; the script waits for their end."""
    fake("srun", SRUN_WITH_A_TASK.replace("{folder}", str(tmp_path)))
    fake("scancel", f"kill -TERM $(cat {tmp_path}/task)")
    fake("scontrol")
    environment = os.environ | {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
    }
    command = ["bash", LAUNCH / "slurm.sbatch", RECIPE, "--workdir=w"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=20) == 75
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1:] == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]


def test_slurm_dry_run(launch, fake):
    fake("srun")
    process, calls = launch(LAUNCH / "slurm.sbatch", "--dry-run", RECIPE, "--workdir=w", SLURM_CPUS_PER_TASK="4")
    assert (process.returncode, calls) == (0, [])
    assert f"cskd_jax.supervise -- {SRUN} python -m cskd_jax.main --cluster" in process.stdout


def test_kubernetes(launch, fake):
    """The service and the job fit each other, and the command of a pod is one of ours."""
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["metadata"]["name"] == pod["subdomain"]
    assert spec["completions"] == spec["parallelism"] == int(environment["PROCESSES"])
    fake("python")
    script, (text,) = container["command"], container["args"]
    assert script == ["sh", "-c"]
    process, calls = launch("-c", text, **environment, JOB_COMPLETION_INDEX="1")
    assert process.returncode == 0, process.stderr
    (call,) = calls
    coordinator = f"--coordinator={name}-0.{pod['subdomain']}:8476"
    assert call.startswith(f"python -m cskd_jax.main {coordinator} --processes=2 --process=1 --config=")
    assert pathlib.Path(ROOT / call.split("--config=")[1].split()[0]).is_file()
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert codes == {"FailJob": [2, 3], "Ignore": [75]}
