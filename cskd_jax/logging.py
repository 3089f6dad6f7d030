"""What a run tells people and files: console, progress bar, metrics.jsonl, TensorBoard."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import tqdm

from cskd_jax import parallel
from cskd_jax.files import open_append, write_text


def say(message: str) -> None:
    """Prints a line for the person at the console, above the progress bar if one is shown; the first process only."""
    if parallel.is_first():
        tqdm.tqdm.write(message)
        sys.stdout.flush()


def progress_bar(phase: str, total: int, initial: int, unit: str) -> tqdm.tqdm:
    """A bar on standard error, shown only on a terminal; counts `unit`s and estimates the time left."""
    # None: not shown where there is no terminal.
    disable = None if parallel.is_first() else True
    return tqdm.tqdm(
        desc=phase, total=total, initial=initial, unit=f" {unit}", unit_scale=True, disable=disable, dynamic_ncols=True
    )


class MetricsLog:
    """Appends rows of one phase to WORKDIR/metrics.jsonl and to TensorBoard files in WORKDIR/tensorboard/PHASE.

    The first process writes; on the others nothing happens.

    Args:
      workdir: of the run.
      phase: "teacher" or "student".
      step: where the phase starts or resumes; rows of later steps, from a run that was cut off, are removed.
    """

    def __init__(self, workdir: pathlib.Path, phase: str, step: int):
        self._phase = phase
        self._tensorboard, self._folder, self._purge_step = None, str(workdir / "tensorboard" / phase), step + 1
        self._file = None
        parallel.on_first(self._open, workdir / "metrics.jsonl", step)

    def _open(self, path, step):
        kept = [row for row in read_rows(path) if row["phase"] != self._phase or row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open_append(path)

    def write(self, split: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """Adds a row: {"phase", "split", "step", "epoch"} and the values."""
        if self._file is None:
            return
        row = {"phase": self._phase, "split": split, "step": step, "epoch": epoch, **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is None:
            # Imports all of PyTorch where it is installed: here, while the devices have steps to do.
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(self._folder, purge_step=self._purge_step)
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics.jsonl; lines that are none, such as one that was cut off, are left out."""
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict) and {"phase", "split", "step", "epoch"} <= row.keys():
                    yield row
