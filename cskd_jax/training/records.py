"""The files with the metrics of a run: metrics.jsonl and TensorBoard."""

import contextlib
import json
import logging
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from cskd_jax.distributed import processes
from cskd_jax.errors import UserError, printable
from cskd_jax.files import open_append, write_text
from cskd_jax.inputs import is_count, is_number, is_text, open_regular, parse_json, unsound
from cskd_jax.training.callbacks import ROW_KEYS, Callback, Start

_logger = logging.getLogger(__name__)

_ROW_TESTS = {"phase": is_text, "split": is_text, "step": is_count, "epoch": is_count}
_TRAINING = b'"split": "train"'
_MAX_FILE, _MAX_LINE = 512 << 20, 64 << 10
# Rows of evaluations alone, and of all kinds; with log_every 50, the latter are 25 million steps.
_MAX_EVALUATIONS, MAX_ROWS = 200_000, 500_000
_MAX_UNSOUND = 200


class MetricsFiles(Callback):
    """A callback that writes the history to WORKDIR/metrics.jsonl and WORKDIR/tensorboard/STUDENT.

    Only the first process writes.

    Args:
      workdir: Folder of the run.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._path = workdir, workdir / "metrics.jsonl"
        self._tensorboard, self._shows = None, True

    def on_start(self, start: Start) -> None:
        """Removes rows of later steps that an interrupted run left in metrics.jsonl.

        If a validation split chooses the best epoch, the rows of the test split are removed too: the end writes them.
        """
        self._start, self._tensorboard = start, None
        processes.on_first(self._remove_later_rows, start)

    def _remove_later_rows(self, start):
        rows = list(read_rows(self._path))
        own = [row for row in rows if row["phase"] == start.student]
        rewritten = "test" if any(row["split"] == "validation" for row in own) else None
        kept = (
            row
            for row in rows
            if row["phase"] != start.student or (row["step"] <= start.step and row["split"] != rewritten)
        )
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Adds a row to the files."""
        if not processes.is_first():
            return
        # Opened for every row, because the students of a trainer share the file.
        try:
            with open_append(self._path) as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            error.filename = str(self._path)  # Python names no file for an error in writing.
            raise
        if self._shows:
            try:
                self._show(row)
            except OSError as error:  # A full disk, for example. The run does not depend on these files.
                self._shows = False
                _logger.warning("TensorBoard files in %s are no longer written: %s", self._workdir, error)

    def _show(self, row):
        if self._tensorboard is None:
            folder = self._workdir / "tensorboard" / self._start.student
            self._tensorboard = _TensorBoard(folder, self._start.step + 1)
        values = {name: value for name, value in row.items() if name not in ROW_KEYS}
        self._tensorboard.add({printable(f"{row['split']}/{name}"): v for name, v in values.items()}, row["step"])

    def on_end(self) -> None:
        """Flushes and closes the files of TensorBoard."""
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):  # What could not be written has been reported.
                self._tensorboard.close()


class _TensorBoard:
    """A writer of TensorBoard's files.

    tensorboardX's own `SummaryWriter` writes in a thread, which a full disk kills, and then waits for it forever.

    Args:
      folder: Folder of the files, which is created.
      first_step: First step to be written; TensorBoard hides what an earlier writer wrote for later steps.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        # This imports all of PyTorch if it is installed, so it is done while the devices are busy with steps.
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        messages: Any = event_pb2  # Its classes are made when it is imported, which type checkers do not see.
        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = messages.Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(str(folder.absolute() / "events"))
        start = messages.SessionLog(status=messages.SessionLog.START)
        self._writer.write_event(self._event(step=first_step, session_log=start))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Writes values under their tags."""
        for tag, value in values.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._scalar(tag, value))
            self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def read_rows(path: pathlib.Path, *, evaluations: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the rows of a metrics.jsonl; unsound lines are skipped, with a warning that counts them at the end.

    A last line that was cut off, which a killed run leaves, is skipped without one.

    Args:
      path: Path of the file, which may be missing.
      evaluations: Whether the rows of training steps, which are most of the rows, are skipped.

    Raises:
      UserError: The file is not a regular file, or it is larger, or has more rows or unsound lines, than that of a run.
    """
    try:
        file = open_regular(path, _MAX_FILE)
    except FileNotFoundError:
        return
    rows, unsound_lines, last = 0, 0, b"\n"
    most = _MAX_EVALUATIONS if evaluations else MAX_ROWS
    with file:
        while line := file.readline(_MAX_LINE):
            last = line
            if evaluations and _TRAINING in line:
                continue
            row = _parse_row(line)
            if row is None:
                unsound_lines += 1
            else:
                rows += 1
                yield row
            if rows > most:
                raise UserError(f"{path} has more than {most:,} rows")
            if unsound_lines > _MAX_UNSOUND:
                raise UserError(
                    f"{path} is not a metrics file: more than {_MAX_UNSOUND:,} of its lines are not rows of JSON"
                )
    unsound_lines -= not last.endswith(b"\n") and _parse_row(last) is None
    if unsound_lines > 0:
        _logger.warning("%s: lines that are not rows of JSON were skipped: %d", path, unsound_lines)


def _parse_row(line):
    """Returns the row in a line; None if it is unsound."""
    if not line.startswith(b"{"):
        return None
    try:
        row = parse_json(line)
    except ValueError:
        return None
    sound = not unsound(row, _ROW_TESTS) and all(is_number(row[key]) for key in row.keys() - ROW_KEYS)
    return row if sound else None
