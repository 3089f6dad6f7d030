"""Kills processes of small runs at random moments and checks that every run ends as an undisturbed one, bit for bit.

python benchmarks/faults.py [--kills=50] [--processes=1,2] [--seed=0] [--folder=DIR]

Each run trains a teacher and a student on the digits under `cskd_jax.supervise`, with data that it prepares itself, and
is sent up to four SIGKILL, each to one of its processes and at a random moment: while it imports, prepares data,
compiles, trains, evaluates or saves. For every kill the benchmark prints the seconds until the supervisor has noticed
and until it is about to train again. It ends with code 1 when a run does not end as it should.
"""

import argparse
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

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.measuring import Part, render
from cskd_jax.training.checkpoint import load_variables

ROOT = pathlib.Path(__file__).resolve().parents[1]
KILLS_PER_RUN = 4
ARGUMENTS = (
    f"--config={ROOT}/configs/digits.py",
    "--config.dataset.train_examples=160",
    "--config.teacher.width=0.0625",
    "--config.student.width=0.0625",
    "--config.teacher.epochs=2",
    "--config.epochs=6",
)


class Job:
    """A supervised run in a folder of its own.

    Args:
      folder: Folder of the run, which is made.
      processes: Number of processes of the run.
      cache: Folder of JAX's compilation cache.
    """

    def __init__(self, folder: pathlib.Path, processes: int, cache: pathlib.Path):
        self.folder = folder
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        supervise = [sys.executable, "-m", "cskd_jax.supervise", f"--processes={processes}", "--"]
        main = [sys.executable, "-m", "cskd_jax.main", *ARGUMENTS]
        main += [f"--workdir={folder}/run", f"--config.dataset.data_dir={folder}/data"]
        self._process = subprocess.Popen(
            supervise + main, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
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
        pid = self._process.pid
        try:
            children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
            os.kill(int(rng.choice(children)), signal.SIGKILL)
        except (FileNotFoundError, IndexError, ProcessLookupError):
            return None
        return time.monotonic()

    def finish(self) -> dict[str, object]:
        """Waits for the end; returns digests of all final arrays, evaluations, and the rows of the log."""
        self.wait_for("no line says this")
        if self._process.wait() != 0:
            raise RuntimeError(f"{self.folder} ended with {self._process.returncode}:\n{''.join(self._read)}")
        outcome = {}
        for phase in ("teacher", "student"):
            saved = load_variables(str(self.folder / "run" / phase))
            outcome[phase] = saved.digest, saved.record.progress["evaluations"]
        rows = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        return outcome | {"rows": [json.loads(row) for row in rows]}


def campaign(kills: int, processes: int, folder: pathlib.Path, rng: random.Random) -> Part:
    """Runs with `kills` kills in all; raises RuntimeError if one does not end as an undisturbed one."""
    cache = folder / "cache"
    Job(folder / f"{processes}-first", processes, cache).finish()
    start = time.monotonic()
    expected = Job(folder / f"{processes}-undisturbed", processes, cache).finish()
    length = time.monotonic() - start
    noticed, resumed, runs = [], [], 0
    while len(noticed) < kills:
        job = Job(folder / f"{processes}-{runs}", processes, cache)
        for _ in range(min(KILLS_PER_RUN, kills - len(noticed))):
            # The rest of a run gets shorter: with its whole length most runs would end before the second kill.
            time.sleep(rng.uniform(0, 0.8 * length))
            moment = job.kill_one(rng)
            end = moment and job.wait_for("ended by SIGKILL")
            if end is None:
                break
            noticed.append(end - moment)
            # The first sign that it trains again; a kill near the end may leave nothing to train.
            again = job.wait_for("compiling the training step")
            if again is not None:
                resumed.append(again - moment)
        if job.finish() != expected:
            raise RuntimeError(f"{job.folder} did not end as an undisturbed run")
        runs += 1
        print(f"{processes} processes: {len(noticed)} kills, {runs} runs, all as the undisturbed one", flush=True)
    rows = [
        {
            "seconds after the kill until": name,
            "count": len(values),
            "median": statistics.median(values),
            "largest": max(values),
        }
        for name, values in (("noticed", noticed), ("reading the program to train again", resumed))
        if values
    ]
    notes = [
        f"{runs} runs with {len(noticed)} kills, all bit-identical to an undisturbed one (which took {length:.1f} s)",
        "the wait before a restart (1, 2, 4, 8 s) is part of the second row, and so are imports and tracing",
    ]
    return Part(f"Runs of {processes} process{'es' * (processes > 1)} killed at random moments", rows, notes)


def main() -> None:
    """Prints a table for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--processes", default="1,2", help="of the runs, each with its share of the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="kept; default: a temporary one")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.processes.split(",")]
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for index, processes in enumerate(counts):
            share = arguments.kills * (index + 1) // len(counts) - arguments.kills * index // len(counts)
            print("\n" + render(campaign(share, processes, folder, rng)), flush=True)


if __name__ == "__main__":
    main()
