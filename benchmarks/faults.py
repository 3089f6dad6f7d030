"""Disturbs small runs at random moments and checks that every run ends as an undisturbed one, bit for bit.

python benchmarks/faults.py [--kills=50] [--processes=1,2] [--together] [--full-disk=0] [--seed=0] [--folder=DIR]
    [--json=FILE]

Each run trains a teacher and a student on the digits under `cskd_jax.supervise`, with data that it prepares itself, and
is sent up to four SIGKILL, each to one of its processes and at a random moment: while it imports, prepares data,
compiles, trains, evaluates or saves. For every kill the benchmark prints the seconds until the supervisor has noticed
and until it is about to train again. It ends with code 1 when a run does not end as it should.

  --kills      in all, shared by what follows; 0 for none
  --processes  numbers of processes of a run
  --together   also kills sweeps of three students that are trained together, or the process that trains them
  --full-disk  number of runs on a small disk, a tmpfs of a random size (which needs root): each must end with one line
               that says so, keep its checkpoints, and go on from them on a larger disk
"""

import argparse
import contextlib
import json
import os
import pathlib
import queue
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.category_structure import describe_environment
from benchmarks.measuring import Part, render, save
from cskd_jax import console
from cskd_jax.training.checkpoint import load_variables

ROOT = pathlib.Path(__file__).resolve().parents[1]
KILLS_PER_RUN = 4
ARGUMENTS = (
    f"--config={ROOT}/configs/digits.py",
    "--config.dataset.train_examples=160",
    "--config.teacher.name=resnet8",
    "--config.teacher.width=0.0625",
    "--config.student.name=resnet8",
    "--config.student.width=0.0625",
    "--config.teacher.epochs=2",
    "--config.epochs=6",
    "--config.save_every_minutes=0",
)


SWEEP = (f"--config={ROOT}/configs/digits.py", "--methods=kd,at,cskd", *ARGUMENTS[1:])


class Job:
    """A supervised command in a folder of its own.

    Args:
      folder: Folder of the job, which is made. The workdir of the command is in it.
      cache: Folder of JAX's compilation cache.
      processes: Number of processes of a run; None for a sweep, which starts its own.
      data: Folder of the data; by default the job prepares its own.
    """

    def __init__(
        self, folder: pathlib.Path, cache: pathlib.Path, processes: int | None = 1, data: pathlib.Path | None = None
    ):
        self.workdir = folder / "run"
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        supervise = [sys.executable, "-m", "cskd_jax.supervise", f"--processes={processes or 1}", "--"]
        command = ["cskd_jax.sweep", *SWEEP] if processes is None else ["cskd_jax.main", *ARGUMENTS]
        command += [f"--workdir={self.workdir}", f"--config.dataset.data_dir={data or folder / 'data'}"]
        self._of_several = processes is None
        self._process = subprocess.Popen(
            [*supervise, sys.executable, "-m", *command],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._lines, self._read = queue.Queue(), []
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self):
        for line in self._process.stdout:
            self._lines.put((time.monotonic(), line))
        self._lines.put(None)

    def wait_for(self, text: str, seconds: float = 600) -> float | None:
        """Returns the moment when a line with `text` came; None if there is none in time or up to the end."""
        end = time.monotonic() + seconds
        while True:
            try:
                item = self._lines.get(timeout=max(end - time.monotonic(), 0))
            except queue.Empty:
                return None
            if item is None:
                self._lines.put(None)
                return None
            moment, line = item
            self._read.append(line)
            if text in line:
                return moment

    def kill_one(self, rng: random.Random) -> float | None:
        """Sends SIGKILL to one of the processes; returns the moment, or None if there is none."""
        found = _children(self._process.pid)
        if self._of_several:  # The sweep, and the process of the runs that it has started.
            found += [child for pid in found for child in _children(pid)]
        try:
            os.kill(rng.choice(found), signal.SIGKILL)
        except (IndexError, ProcessLookupError):
            return None
        return time.monotonic()

    def end(self) -> tuple[int, str]:
        """Waits for the end; returns the exit code and all that was printed."""
        self.wait_for("no line says this")
        return self._process.wait(), "".join(self._read)

    def finish(self) -> dict[str, object]:
        """Waits for the end; returns digests of all final arrays, evaluations, and the rows of the logs.

        Raises:
          RuntimeError: It ended with an error.
        """
        code, output = self.end()
        if code != 0:
            raise RuntimeError(f"{self.workdir} ended with {code}:\n{output}")
        outcome = {}
        for path in sorted(self.workdir.rglob("checkpoints")):
            saved = load_variables(str(path.parent))
            outcome[str(path.relative_to(self.workdir))] = saved.digest, saved.record.progress["evaluations"]
        for path in sorted(self.workdir.rglob("metrics.jsonl")):
            rows = path.read_text(encoding="utf-8").splitlines()
            outcome[str(path.relative_to(self.workdir))] = [json.loads(row) for row in rows]
        return outcome


def _children(pid: int) -> list[int]:
    """Returns the processes that a process has started."""
    try:
        threads = [path / "children" for path in pathlib.Path(f"/proc/{pid}/task").iterdir()]
        return [int(child) for path in threads for child in path.read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def campaign(kills: int, processes: int | None, folder: pathlib.Path, rng: random.Random) -> Part:
    """Runs with `kills` kills in all; raises RuntimeError if one does not end as an undisturbed one.

    Args:
      kills: Number of kills.
      processes: Number of processes of a run; None for sweeps.
      folder: Folder of all runs.
      rng: Random draws.
    """
    what = "sweeps" if processes is None else f"runs of {processes} process{'es' * (processes > 1)}"
    name, cache = processes or "together", folder / "cache"
    Job(folder / f"{name}-first", cache, processes).finish()
    start = time.monotonic()
    expected = Job(folder / f"{name}-undisturbed", cache, processes).finish()
    length = time.monotonic() - start
    noticed, resumed, runs = [], [], 0
    while len(noticed) < kills:
        job = Job(folder / f"{name}-{runs}", cache, processes)
        for _ in range(min(KILLS_PER_RUN, kills - len(noticed))):
            # The rest of a run gets shorter: with its whole length most runs would end before the second kill.
            time.sleep(rng.uniform(0, 0.8 * length))
            moment = job.kill_one(rng)
            end = moment and job.wait_for("by SIGKILL")
            if end is None:
                break
            noticed.append(end - moment)
            # The first sign that it trains again; a kill near the end may leave nothing to train.
            again = job.wait_for("compiling the training step")
            if again is not None:
                resumed.append(again - moment)
        if job.finish() != expected:
            raise RuntimeError(f"{job.workdir} did not end as an undisturbed run")
        runs += 1
        print(f"{what}: {len(noticed)} kills, {runs} of them, all as the undisturbed one", flush=True)
    rows = [
        {
            "seconds after the kill until": row,
            "count": len(values),
            "median": statistics.median(values),
            "largest": max(values),
        }
        for row, values in (("noticed", noticed), ("reading the program to train again", resumed))
        if values
    ]
    notes = [
        f"{runs} {what} with {len(noticed)} kills, all bit-identical to an undisturbed one (which took {length:.1f} s)",
        "the wait before a restart (1, 2, 4, 8 s) is part of the second row, and so are imports and tracing",
    ]
    return Part(f"{what.capitalize()} killed at random moments", rows, notes)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kibibytes: int) -> Iterator[Callable[[], None]]:
    """A context with a disk of a size; what it yields makes the disk large.

    Args:
      folder: Folder that becomes the disk, which is made.
      kibibytes: Size of the disk.
    """
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disks(runs: int, folder: pathlib.Path, rng: random.Random) -> Part:
    """Runs on disks that are too small; raises RuntimeError if one loses anything.

    Args:
      runs: Number of runs.
      folder: Folder of all runs.
      rng: Random draws.
    """
    cache, data = folder / "cache", folder / "data"
    Job(folder / "disk-first", cache, data=data).finish()
    undisturbed = Job(folder / "disk-undisturbed", cache, data=data)
    expected = undisturbed.finish()
    files = [path for path in undisturbed.workdir.rglob("*") if path.is_file()]
    size, last = sum(-(-path.stat().st_size // 4096) * 4 for path in files), _newest_steps(undisturbed.workdir)
    rows = []
    while len(rows) < runs:
        disk, kibibytes = folder / f"disk-{len(rows)}", rng.randrange(40, size)
        with small_disk(disk, kibibytes) as enlarge:
            job = Job(disk, cache, data=data)
            code, output = job.end()
            errors = [line for line in output.splitlines() if line.startswith("error: ")]
            if "Traceback" in output or (code, len(errors)) not in ((0, 0), (2, 1)):
                raise RuntimeError(f"a disk of {kibibytes} kB: it ended with {code}:\n{output}")
            kept = _newest_steps(job.workdir)
            enlarge()
            code, output = (job := Job(disk, cache, data=data)).end()
            for phase, step in kept.items():
                if step < last[phase] and f"{phase}: resuming at step {step} " not in output:
                    raise RuntimeError(
                        f"a disk of {kibibytes} kB: the {phase} did not go on from step {step}:\n{output}"
                    )
            if code != 0 or job.finish() != expected:
                raise RuntimeError(f"a disk of {kibibytes} kB: it did not end as an undisturbed run:\n{output}")
        went_on = ", ".join(f"{phase} {step}" for phase, step in kept.items()) or "the beginning"
        rows.append(
            {"disk (kB)": kibibytes, "ended with": errors[0][:60] if errors else "results", "went on from": went_on}
        )
        print(f"{len(rows)} of {runs} full disks: all as the undisturbed one", flush=True)
    notes = [f"a run takes {size} kB; all that were cut off ended bit-identical to an undisturbed one on a larger disk"]
    return Part("Runs on a disk that is too small", rows, notes)


def _newest_steps(workdir: pathlib.Path) -> dict[str, int]:
    """Returns {phase: step of its newest checkpoint}."""
    found = {phase: list((workdir / phase / "checkpoints").glob("[0-9]*")) for phase in ("teacher", "student")}
    steps = {phase: [int(path.name) for path in paths if path.name.isdigit()] for phase, paths in found.items()}
    return {phase: max(values) for phase, values in steps.items() if values}


def main() -> None:
    """Prints a table for each number of processes, for sweeps, and for full disks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--processes", default="1,2", help="of the runs, each with its share of the kills")
    parser.add_argument("--together", action="store_true", help="also students that are trained together")
    parser.add_argument("--full-disk", type=int, default=0, help="number of runs on a disk that is too small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="kept; default: a temporary one")
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    arguments = parser.parse_args()
    console.start()
    counts: list[int | None] = [int(count) for count in arguments.processes.split(",") if count]
    counts += [None] * arguments.together
    rng, environment, parts = random.Random(arguments.seed), describe_environment(with_torch=False), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for index, processes in enumerate(counts if arguments.kills else []):
            share = arguments.kills * (index + 1) // len(counts) - arguments.kills * index // len(counts)
            parts[f"kills {processes or 'together'}"] = part = campaign(share, processes, folder, rng)
            print("\n" + render(part), flush=True)
            save(arguments.json, environment, parts)
        if arguments.full_disk:
            parts["full disks"] = part = full_disks(arguments.full_disk, folder, rng)
            print("\n" + render(part), flush=True)
            save(arguments.json, environment, parts)


if __name__ == "__main__":
    main()
