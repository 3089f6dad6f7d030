"""What a run tells people and files: console, progress bar, metrics.jsonl, TensorBoard."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from cskd_jax.distributed import processes


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
        processes.on_first(self._open, workdir / "metrics.jsonl", step)

    def _open(self, path, step):
        kept = [row for row in read_rows(path) if row["phase"] != self._phase or row["step"] <= step]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

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
