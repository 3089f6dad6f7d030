"""The launch scripts: what they would run, and what they do with command-line tools that only record their calls."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

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
    assert kinds(process.stdout.splitlines()) == ["create", "ssh", "scp", "ssh", "ssh", "ssh"]


# A VM whose state is in a file. Its worker is a folder in which the commands for launch/tpu_worker.sh are carried out,
# unless `ssh` says what happens instead.
TPU_VM = """
case "$4" in
  describe) cat {folder}/$3; grep -q DELETING {folder}/$3 && : > {folder}/$3 ;;
  create) echo READY > {folder}/tpu-vm; echo ACTIVE > {folder}/queued-resources ;;
  delete) : > {folder}/tpu-vm; : > {folder}/queued-resources ;;
  scp) {scp} ;;
  ssh)
    cd {folder}/home
    for word; do case "$word" in --command=*tpu_worker.sh*) {ssh}; eval "${word#--command=}" ;; esac; done ;;
esac
"""
# What ran there must not outlive the VM: the lock waits for it to finish.
GONE = (
    "echo PREEMPTED > {folder}/tpu-vm; echo SUSPENDED > {folder}/queued-resources; "
    "flock cskd_jax/state/first/lock rm -rf cskd_jax/state; exit 255"
)
PREEMPTED_ONCE = f"if [[ $word == *follow* && ! -e {{folder}}/again ]]; then touch {{folder}}/again; {GONE}; fi"
LOST_ONCE = "if [[ $word == *follow* && ! -e {folder}/again ]]; then touch {folder}/again; exit 255; fi"


@pytest.fixture
def tpu_vm(fake, tmp_path):
    """Makes the tools of a TPU VM; `train` is what its Python does, on the worker that writes the workdir."""

    def tpu_vm(train, state="", scp="", ssh=":", writes="/bin/sleep 0.05; touch runs/first/results.json"):
        (tmp_path / "tpu-vm").write_text(state)
        (tmp_path / "queued-resources").write_text("")
        python = tmp_path / "home" / "cskd_jax" / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        (tmp_path / "home" / "cskd_jax" / "launch").symlink_to(LAUNCH)
        python.write_text(f"#!/bin/bash\nprintf 'trains %s\\n' \"$*\"\n{writes}\n{train}\n")
        python.chmod(0o755)
        script = TPU_VM.replace("{scp}", scp).replace("{ssh}", ssh)
        fake("gcloud", script.replace("{folder}", str(tmp_path)))
        fake("sleep", "/bin/sleep 0.02")

    return tpu_vm


NEW = "create ssh ssh scp ssh ssh ssh ssh"  # status, install in three steps, start, follow, status


@pytest.mark.parametrize(
    ("state", "queued", "train", "code", "expected"),
    [
        ("", "0", "exit 0", 0, NEW),
        ("", "1", "exit 0", 0, NEW),
        ("READY", "0", "exit 0", 0, NEW.removeprefix("create ")),
        ("READY", "0", "exit 3", 3, NEW.removeprefix("create ")),
        ("DELETING", "0", "exit 0", 0, NEW),
    ],
    ids=["new", "queued", "there", "diverged", "deleting"],
)
def test_tpu_vm(launch, tpu_vm, state, queued, train, code, expected):
    tpu_vm(train, state)
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE, BUCKET="gs://b", QUEUED=queued)
    assert process.returncode == code, process.stderr
    assert [kind for kind in kinds(calls) if kind != "describe"] == expected.split()
    requests = [call.split()[3] for call in calls if call.startswith("gcloud compute") and " create " in call]
    assert requests == expected.split().count("create") * [["tpu-vm", "queued-resources"][int(queued)]]
    (start,) = [call for call in calls if "tpu_worker.sh start" in call]
    assert "--worker=all" in start
    run = "trains -m cskd_jax.supervise -- .venv/bin/python -m cskd_jax.main --cluster --workdir=runs/first"
    assert process.stdout.splitlines() == [f"{run} {RECIPE}"]
    for folder in ("runs/first gs://b/first", "data gs://b/data", "cache gs://b/cache"):
        assert any(call.startswith("gcloud storage rsync") and call.endswith(folder) for call in calls), folder
    # What is old is deleted only after what is new has arrived, and what is newer here is not replaced.
    copies = [call.split() for call in calls if call.endswith("runs/first gs://b/first")]
    assert ["--delete-unmatched-destination-objects" in copy for copy in copies[-2:]] == [False, True]
    (fetched,) = [call for call in calls if call.endswith("gs://b/first runs/first")]
    assert "--skip-if-dest-has-newer-mtime" in fetched


def test_a_worker_that_does_not_write_the_workdir_does_not_copy_it(launch, tpu_vm):
    """Which one writes it follows from the topology of the slice."""
    tpu_vm("exit 0", writes="")
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE, BUCKET="gs://b")
    assert process.returncode == 0, process.stderr
    assert any(call.endswith("gs://b/first runs/first") for call in calls)
    assert not any(call.endswith("runs/first gs://b/first") for call in calls)


def test_results_that_do_not_reach_the_bucket(launch, tpu_vm, tmp_path):
    """The run is done, but nobody may take its VM away."""
    tpu_vm("exit 0", state="READY")
    tool = tmp_path / "bin" / "gcloud"
    tool.write_text(tool.read_text() + '\n[[ "$*" != *" runs/first gs://b/first" ]] || exit 1\n')
    process, _ = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE, BUCKET="gs://b")
    assert process.returncode == 1
    assert "error: runs/first could not be copied to gs://b/first; its last state is only on this VM" in process.stdout


@pytest.mark.parametrize("name", ["data", "cache"])
def test_runs_that_would_share_a_folder_with_all_others(launch, tpu_vm, name):
    tpu_vm("exit 0")
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", name, RECIPE, BUCKET="gs://b")
    assert process.returncode == 2
    assert process.stderr == f"error: a run cannot be named {name}, because {name} in BUCKET belongs to all runs\n"
    assert calls == []


def test_tpu_vm_that_was_stopped(launch, tpu_vm):
    tpu_vm("exit 0", state="STOPPED")
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE, BUCKET="gs://b")
    assert process.returncode == 1
    assert "error: TPU VM first is stopped: start it with gcloud compute tpus tpu-vm start first" in process.stderr
    assert set(kinds(calls)) == {"describe"}


@pytest.mark.parametrize("queued", ["0", "1"])
def test_tpu_vm_that_is_preempted(launch, tpu_vm, queued):
    tpu_vm("exit 0", ssh=PREEMPTED_ONCE)
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE, BUCKET="gs://b", QUEUED=queued)
    assert process.returncode == 0, process.stderr
    assert "the run is gone" in process.stderr
    assert [kind for kind in kinds(calls) if kind in ("create", "delete")] == ["create", "delete", "create"]
    assert kinds(calls).count("scp") == 2
    assert sum("tpu_worker.sh start" in call for call in calls) == 2


def test_tpu_vm_whose_connection_is_lost(launch, tpu_vm):
    tpu_vm("exit 0", state="READY", ssh=LOST_ONCE)
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE, BUCKET="gs://b")
    assert process.returncode == 0, process.stderr
    assert kinds(calls).count("scp") == 1, "what goes on is not installed anew"


def test_a_run_on_a_tpu_vm_needs_nobody_connected(launch, tpu_vm, tmp_path):
    """The script that started it is killed with all of its processes, as when a laptop is closed; the run goes on."""
    tpu_vm(f"until [[ -e {tmp_path}/enough ]]; do /bin/sleep 0.05; done; exit 75", state="READY")
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "BUCKET": "gs://b"}
    command = ["bash", LAUNCH / "tpu_vm.sh", "run", "first", RECIPE]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, text=True, process_group=0) as process:
        assert process.stdout.readline().startswith("trains ")
        os.killpg(process.pid, signal.SIGKILL)
    (tmp_path / "enough").touch()
    process, calls = launch(LAUNCH / "tpu_vm.sh", "follow", "first")
    assert process.returncode == 75, process.stderr
    assert process.stdout.count("trains ") == 1
    assert sum("tpu_worker.sh start" in call for call in calls) == 1


@pytest.mark.parametrize(
    ("type_", "version"),
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_every_generation_of_tpus_has_its_image(launch, fake, type_, version):
    fake("gcloud")
    process, _ = launch(LAUNCH / "tpu_vm.sh", "--dry-run", "run", "first", RECIPE, BUCKET="gs://b", TYPE=type_)
    create = process.stdout.splitlines()[0]
    assert f"--version={version}" in create
    assert f"--accelerator-type={type_}" in create


def test_tpu_vm_does_not_run_what_it_could_not_install(launch, tpu_vm):
    tpu_vm("exit 0", state="READY", scp="exit 5")
    process, calls = launch(LAUNCH / "tpu_vm.sh", "run", "first", RECIPE, BUCKET="gs://b")
    assert process.returncode == 5, process.stderr
    assert [kind for kind in kinds(calls) if kind != "describe"] == ["ssh", "ssh", "scp"]


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
    variables = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    process, calls = launch(LAUNCH / "slurm.sbatch", RECIPE, "--workdir=w", **variables)
    assert process.returncode == code, process.stderr
    assert calls[0] == f"{SRUN} {sys.executable} -m cskd_jax.main --cluster {RECIPE} --workdir=w"
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
        "PYTHON": sys.executable,
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
    service = yaml.safe_load((LAUNCH / "kubernetes_service.yaml").read_text())
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    name, spec = "cskd-jax-x7k2p", job["spec"]
    assert "name" not in job["metadata"]
    assert name.startswith(job["metadata"]["generateName"])
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {variable["name"]: variable.get("value", name) for variable in container["env"]}
    labels = [job["metadata"]["labels"], spec["template"]["metadata"]["labels"]]
    assert labels == [service["spec"]["selector"]] * 2
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


def test_kubernetes_on_tpus():
    """What is to be put in the place of the GPUs, by uncommenting, is sound."""
    begin, *kinds = re.split(r"      # Google, (?=GPU|TPU)", (LAUNCH / "kubernetes.yaml").read_text())
    rest = kinds[-1].partition("      containers:")[2]
    for kind, label in zip(kinds[1:], ("tpu-v5-lite-podslice", "tpu-v6e-slice"), strict=True):
        lines = [line.replace("# ", "", 1) for line in kind.partition("      containers:")[0].splitlines()[1:]]
        text = begin + "\n".join(lines) + "\n      containers:" + rest
        selector = yaml.safe_load(text)["spec"]["template"]["spec"]["nodeSelector"]
        assert selector["cloud.google.com/gke-tpu-accelerator"] == label
        assert set(selector) == {f"cloud.google.com/gke-tpu-{name}" for name in ("accelerator", "topology")}


def test_docker_is_sent_what_it_copies():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
