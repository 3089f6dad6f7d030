"""The files with the metrics of a run: metrics.jsonl and TensorBoard."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from cskd_jax.distributed import processes
from cskd_jax.files import open_append, write_text
from cskd_jax.inputs import is_count, is_number, is_text, open_regular, parse_json, unsound
from cskd_jax.training.callbacks import ROW_KEYS, Callback, Start

_ROW_TESTS = {"phase": is_text, "split": is_text, "step": is_count, "epoch": is_count}
_TRAINING = b'"split": "train"'
_MAX_FILE, _MAX_LINE = 1 << 30, 1 << 20


class MetricsFiles(Callback):
    """A callback that writes the history to WORKDIR/metrics.jsonl and WORKDIR/tensorboard/STUDENT.

    Only the first process writes.

    Args:
      workdir: Folder of the run.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._file, self._tensorboard = workdir, None, None

    def on_start(self, start: Start) -> None:
        """Opens metrics.jsonl and removes rows of later steps that an interrupted run left."""
        self._start, self._tensorboard = start, None
        processes.on_first(self._open, self._workdir / "metrics.jsonl", start)

    def _open(self, path, start):
        kept = (row for row in read_rows(path) if row["phase"] != start.student or row["step"] <= start.step)
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open_append(path)

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Adds a row to the files."""
        if self._file is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is None:
            # This imports all of PyTorch if it is installed, so it is done while the devices have steps to do.
            from tensorboardX import SummaryWriter

            folder = self._workdir / "tensorboard" / self._start.student
            self._tensorboard = SummaryWriter(str(folder), purge_step=self._start.step + 1)
        for name, value in row.items():
            if name not in ROW_KEYS:
                self._tensorboard.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def on_end(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_rows(path: pathlib.Path, *, evaluations: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the rows of a metrics.jsonl; unsound lines, such as a truncated one, are skipped.

    Args:
      path: Path of the file, which may be missing.
      evaluations: Whether the rows of training steps, most of all, are skipped.

    Raises:
      UserError: It is no regular file, or larger than any run makes one.
    """
    try:
        file = open_regular(path, _MAX_FILE)
    except FileNotFoundError:
        return
    with file:
        while line := file.readline(_MAX_LINE):
            if evaluations and _TRAINING in line:
                continue
            with contextlib.suppress(ValueError):
                row = parse_json(line)
                if not unsound(row, _ROW_TESTS) and all(is_number(row[key]) for key in row.keys() - ROW_KEYS):
                    yield row
