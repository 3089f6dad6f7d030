"""The files with the metrics of a run: metrics.jsonl and TensorBoard."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from cskd_jax.distributed import processes
from cskd_jax.files import open_append, write_text
from cskd_jax.training.callbacks import ROW_KEYS, Callback, Start


class MetricsFiles(Callback):
    """A callback that writes the history to WORKDIR/metrics.jsonl and WORKDIR/tensorboard/STUDENT.

    Only the first process writes.

    Args:
      workdir: Folder of the run.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._path, self._tensorboard = workdir, workdir / "metrics.jsonl", None

    def on_start(self, start: Start) -> None:
        """Removes rows of later steps that an interrupted run left in metrics.jsonl."""
        self._start, self._tensorboard = start, None
        processes.on_first(self._remove_later_rows, start)

    def _remove_later_rows(self, start):
        kept = [row for row in read_rows(self._path) if row["phase"] != start.student or row["step"] <= start.step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Adds a row to the files."""
        if not processes.is_first():
            return
        # Opened for every row, because the students of a trainer share the file.
        with open_append(self._path) as file:
            file.write(json.dumps(row) + "\n")
        if self._tensorboard is None:
            # This imports all of PyTorch if it is installed, so it is done while the devices have steps to do.
            from tensorboardX import SummaryWriter

            folder = self._workdir / "tensorboard" / self._start.student
            self._tensorboard = SummaryWriter(str(folder), purge_step=self._start.step + 1)
        for name, value in row.items():
            if name not in ROW_KEYS:
                self._tensorboard.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def on_end(self) -> None:
        """Flushes and closes the files of TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a metrics.jsonl; invalid lines, such as a truncated one, are skipped."""
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict) and row.keys() >= ROW_KEYS:
                    yield row
