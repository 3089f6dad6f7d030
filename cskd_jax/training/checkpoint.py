"""Checkpoints with digests. This is the only file that imports Orbax.

Orbax does not notice a changed byte inside an array. Every array is therefore saved with its digest, which is checked
when the array is read; a checkpoint that fails the check is renamed to STEP.damaged, and the newest intact one is used.

Only the first process reads and writes checkpoints: the state is the same on all processes, and only the first one
needs the folder. The others receive what it read, or its error.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import operator
import os
import pathlib
import re
import shutil
import stat
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from cskd_jax.distributed import processes
from cskd_jax.distributed.devices import available
from cskd_jax.errors import InterruptedRun, UserError, one_line, raise_if_of_system
from cskd_jax.files import write_json
from cskd_jax.inputs import MAX_JSON, is_count, read_bytes, read_json
from cskd_jax.training.arrays import digest_array, digest_json, flatten, nest, unflatten, upgrade
from cskd_jax.training.peers import without_peers
from cskd_jax.training.prediction import prediction_of
from cskd_jax.training.saved import Record, Saved

_logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
_ARRAYS, _RECORD = "arrays", "record"
_FIRST_PROCESS = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})

# Version of the array names and of the record; `arrays.upgrade` converts older names.
_VERSION = 2
# Limits on the number of files in a checkpoint, and on the memory that its compressed arrays may take for each byte of
# these files in addition to a fixed amount. Weights hardly compress; arrays that compress well, such as an all-zero
# momentum, have at most a few times the size of the weights.
_MAX_FILES, _MAX_EXPANSION, _FREE = 100_000, 20, 64 << 20
# Types of what Orbax reads in the metadata of all checkpoints when it opens a folder, and the latest time that it can
# show, in nanoseconds.
_METADATA = {
    "item_handlers": dict,
    "metrics": dict,
    "performance_metrics": dict,
    "init_timestamp_nsecs": int,
    "commit_timestamp_nsecs": int,
    "custom_metadata": dict,
}
_LATEST = 2**63
_STEP = re.compile("0|[1-9][0-9]{0,17}")
# Names of files in the folder of the arrays that may be larger than a JSON file: those of OCDBT and of zarr chunks.
_DATA = re.compile(r"[0-9a-f]{32}|[0-9.]+")


class _Snapshot(NamedTuple):
    """The content of a checkpoint to be saved: the step, arrays by name on the host, the record and the score."""

    step: int
    arrays: dict[str, np.ndarray]
    record: Record
    score: float


class Checkpoints:
    """A context manager for the checkpoints of one network, identified by step; saving is asynchronous.

    All processes must call the same methods in the same order, and get the same values or errors.

    Args:
      directory: Folder of the checkpoints, which is created if it is missing.
      keep: Number of most recent checkpoints to keep, in addition to the one with the best score.
      every_minutes: Minimum time between two checkpoints that `offer` saves.
      clock: Function that returns the time in seconds.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        keep: int,
        every_minutes: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._directory, self._seconds, self._clock = directory, 60 * every_minutes, clock
        self._best: _Snapshot | None = None
        self._saved_at = clock()
        self._has_damage = False
        processes.on_first(self._open, keep)

    def _open(self, keep):
        self._directory.mkdir(parents=True, exist_ok=True)
        # Orbax reads the metrics of all checkpoints at once, and takes digits of other scripts for a step as well.
        for path in sorted(self._directory.iterdir()):
            if not path.is_dir() or not re.fullmatch(r"[1-9]\d*|0", path.name):
                continue
            try:
                if not _STEP.fullmatch(path.name):
                    raise _Damaged("its name is not a number of steps")
                _check_files(path)
                _check_metadata(path)
            except _Damaged as damage:
                self._set_aside(path, damage)
        try:
            self._manager = self._make_manager(keep)
        except Exception as error:  # Orbax raises whatever strange folders make it raise.
            raise UserError(f"cannot open the checkpoints in {self._directory}: {one_line(error)}") from error

    def _make_manager(self, keep):
        policy = checkpoint_managers.preservation_policy
        return ocp.CheckpointManager(
            self._directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy.AnyPreservationPolicy(
                    [
                        policy.LatestN(keep),
                        policy.BestN(get_metric_fn=_score, n=1),
                    ]
                ),
                # Without this the scores are not written to disk, and a resumed run would not know the best.
                best_fn=_score,
                cleanup_tmp_directories=True,
                create=False,
                multiprocessing_options=_FIRST_PROCESS,
            ),
        )

    def save(self, step: int, tree: Any, record: Record, score: float = -math.inf) -> None:
        """Starts saving and returns once the arrays are on the host.

        Args:
          step: Number of steps done, which must be greater than for any existing checkpoint.
          tree: Tree of arrays, equal on all devices.
          record: Record to save with the arrays.
          score: Score of the network; higher is better.
        """
        processes.on_first(self._save, step, tree, record, score)

    def offer(self, step: int, tree: Any, record: Record, score: float, is_best: bool) -> bool:
        """Saves like `save` if it is time to, and returns whether it did.

        A state that is the best so far but is not saved is kept on the host, and saved before the next checkpoint.
        """
        return processes.on_first(self._offer, step, tree, record, score, is_best)

    def _offer(self, step, tree, record, score, is_best):
        is_time = self._clock() - self._saved_at >= self._seconds
        if is_time:
            self._save(step, tree, record, score)
        elif is_best:
            self._best = _Snapshot(step, flatten(jax.device_get(tree)), record, score)
        return is_time

    def _save(self, step, tree, record, score):
        if self._best is not None and self._best.step == step:
            self._best = None
        self._save_best()
        self._write(_Snapshot(step, flatten(jax.device_get(tree)), record, score))
        self._saved_at = self._clock()

    def _save_best(self):
        """Saves the best state since the last checkpoint if it is still only on the host."""
        if self._best is not None:
            best, self._best = self._best, None
            self._write(best)

    def _write(self, snapshot):
        step, arrays, record, score = snapshot
        values = dataclasses.asdict(record) | {"version": _VERSION}
        content = {"record": values, "digests": {name: digest_array(array) for name, array in arrays.items()}}
        parts = {
            _ARRAYS: ocp.args.StandardSave(arrays),
            _RECORD: ocp.args.JsonSave(content | {"digest": digest_json(content)}),
        }
        with self._saving():
            saved = self._manager.save(step, args=ocp.args.Composite(**parts), metrics={"score": score, "step": step})
        if not saved:
            raise RuntimeError(f"Orbax refused to save step {step} into {self._directory}")

    def wait(self) -> None:
        """Waits until pending checkpoints are written."""
        processes.on_first(self._wait)

    def _wait(self):
        with self._saving():
            self._manager.wait_until_finished()

    def restore(self, template: Callable[[int], Any]) -> tuple[Any, Record] | None:
        """Returns the newest intact checkpoint as (tree of numpy arrays, record); None if there is none.

        Newer checkpoints that are damaged are renamed, with a warning, because training writes those steps again.

        Args:
          template: Function from the step of a checkpoint to a tree with the expected shapes and dtypes.

        Raises:
          UserError: There are checkpoints but none is intact, their arrays do not match the template, or their record
            cannot be read although it is intact.
        """
        return processes.on_first(self._restore, template)

    def read(self, step: int, template: Any, select: Callable[[Any], Any]) -> Any:
        """Returns part of the tree of a checkpoint.

        Args:
          step: Step of the checkpoint.
          template: Tree with the expected shapes and dtypes.
          select: Function from the tree to the part of it that is wanted.

        Raises:
          UserError: The checkpoint is damaged.
        """
        return processes.on_first(self._read_part, step, template, select)

    def _read_part(self, step, template, select):
        self._save_best()
        with self._saving():
            self._manager.wait_until_finished()
        arrays, *_ = _read_intact(self._directory / str(step))
        return select(unflatten(arrays, template))

    def _restore(self, template):
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self._directory / str(step)
            try:
                arrays, record, _ = _read(path)
                return unflatten(arrays, template(step)), record
            except _Damaged as damage:
                self._set_aside(path, damage)
                self._manager.reload()
        if self._has_damage:
            raise UserError(f"no checkpoint in {self._directory} is intact; the same command starts over")
        return None

    def _set_aside(self, path, damage):
        aside = path.with_name(f"{path.name}.damaged")
        _logger.warning(
            "checkpoint %s is damaged (%s): renamed to %s, looking for an older one", path, damage, aside.name
        )
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        self._has_damage = True

    def __enter__(self):
        return self

    def __exit__(self, exception_type, *_):
        # Waits for pending saves, so that nothing is lost, however the block ends.
        if exception_type in (None, InterruptedRun):
            processes.on_first(self._close)
        elif processes.is_first():
            # Other errors may have occurred in this process only.
            self._close()

    def _close(self):
        with self._saving():
            self._save_best()
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self):
        """Turns errors of asynchronous saving, which may surface in any later call, into a UserError."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise errors of many kinds.
            # TensorStore puts this last, after everything that it was about to do.
            full = os.strerror(errno.ENOSPC)
            reason = full if full in str(error) else one_line(error)
            raise UserError(
                f"cannot save a checkpoint in {self._directory}: {reason}; earlier checkpoints are untouched"
            ) from error


def load_variables(path: str, *, best: bool = False) -> Saved:
    """Returns the network of the newest checkpoint in a folder.

    Args:
      path: Folder of one network, such as `WORKDIR/teacher`.
      best: Whether to return that of the best epoch instead, as the validation split chose it, or the test split if
        there is none.

    Raises:
      UserError: There is no checkpoint, or the one that is asked for is damaged.
    """
    return _load(_best(path) if best else _newest(path))


def load_record(path: str) -> Saved:
    """Returns the network of the newest checkpoint in a folder without its variables and digest, using no device.

    Args:
      path: Folder of one network, such as `WORKDIR/teacher`.

    Raises:
      UserError: There is no checkpoint, or the record of the newest is damaged.
    """
    newest = _newest(path)
    try:
        record = Record.from_json(read_json(newest / _RECORD / "metadata")["record"])
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {newest} is damaged ({type(error).__name__}: {one_line(error)})") from None
    return Saved({}, record, int(newest.name), "")


def _newest(path):
    return _all(path)[-1]


def _best(path):
    """Returns the checkpoint with the best score; raises UserError if none has a score."""
    scores = {}
    for checkpoint in _all(path):
        with contextlib.suppress(FileNotFoundError):
            try:
                metrics = _read_metrics(checkpoint)
            except _Damaged as damage:
                raise UserError(f"checkpoint {checkpoint} is damaged ({damage})") from None
            if metrics["score"] > -math.inf:  # An epoch that was not evaluated has that score.
                scores[checkpoint] = _score(metrics)
    if not scores:
        raise UserError(f"checkpoint {path}: none of its checkpoints has a score, so none of them is the best")
    return max(scores, key=lambda checkpoint: scores[checkpoint])


def _read_metrics(path):
    """Returns the metrics of a checkpoint; raises FileNotFoundError if it has none, and _Damaged for unsound ones."""
    try:
        metrics = json.loads(read_bytes(path / "metrics" / "metrics", MAX_JSON))  # A score may be infinite.
        sound = all(type(metrics[name]) in (int, float) for name in ("score", "step"))
    except (UserError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _Damaged(f"{type(error).__name__} while reading its metrics: {one_line(error)}") from None
    if not sound:
        raise _Damaged("its metrics are not numbers")
    return metrics


def _all(path):
    """Returns the checkpoints of a network in the order of their steps; raises UserError if there is none."""
    folder = pathlib.Path(path) / FOLDER
    steps = _steps(folder)
    if not steps:
        inside = [str(found.parent) for found in sorted(pathlib.Path(path).glob(f"*/{FOLDER}"))]
        meant = f"; did you mean {' or '.join(inside[:3])}?" if inside else ""
        raise UserError(f"checkpoint {path}: there is no checkpoint in {folder}{meant}")
    return [folder / str(step) for step in steps]


def _steps(folder):
    """Returns the steps of the checkpoints in a folder, in order."""
    return sorted(int(p.name) for p in folder.glob("*") if _STEP.fullmatch(p.name) and p.is_dir())


def _load(path):
    """Returns the network of a checkpoint; raises UserError if it is damaged."""
    arrays, record, digest = _read_intact(path)
    try:
        tree = nest(arrays)
        variables = tree.get("ema", {"params": tree["params"].get("network", {}), **tree.get("collections", {})})
        variables = without_peers(variables)
        variables |= prediction_of(tree["params"], tree.get("memory", {}), record.prediction.get("loss"))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):  # Names that are not paths in a network.
        raise UserError(f"checkpoint {path} is damaged (its arrays are not those of a network)") from None
    return Saved({"params": {}, **variables}, record, int(path.name), digest)


class _Damaged(Exception):
    pass


def _read_intact(path):
    """Returns what `_read` returns; raises UserError if the checkpoint is damaged."""
    try:
        return _read(path)
    except _Damaged as damage:
        raise UserError(f"checkpoint {path} is damaged ({damage})") from None


def _read(path):
    """Returns the arrays by name, the record and the digest of a checkpoint; raises _Damaged if it is damaged."""
    available()  # Orbax uses them; that there are none would look like damage.
    parts = {_ARRAYS: ocp.args.StandardRestore(), _RECORD: ocp.args.JsonRestore()}
    try:
        stored = _check_files(path)
        # Orbax warns of what it has no handler for, such as the metrics that its manager has written.
        handlers: Any = dict.fromkeys((_RECORD, "metrics"), ocp.JsonCheckpointHandler())
        handlers[_ARRAYS] = ocp.StandardCheckpointHandler()
        handler = ocp.CompositeCheckpointHandler(**handlers)
        with ocp.Checkpointer(handler, multiprocessing_options=_FIRST_PROCESS) as checkpointer:
            shapes = checkpointer.metadata(path.absolute()).item_metadata[_ARRAYS]
            claimed = sum(math.prod(array.shape) * array.dtype.itemsize for array in shapes.values())
            if claimed > _FREE + _MAX_EXPANSION * stored:
                raise _Damaged(f"its arrays would take {claimed:,} bytes, but its files have {stored:,}")
            for name, array in shapes.items():
                # TensorStore allocates whole chunks.
                if any(map(operator.gt, array.storage.chunk_shape, array.shape)):
                    raise _Damaged(f"the chunks of {name} are larger than the array")
            restored = checkpointer.restore(path.absolute(), args=ocp.args.Composite(**parts))
        arrays = {name: np.asarray(array) for name, array in restored[_ARRAYS].items()}
        content = restored[_RECORD]
        digest = content.pop("digest")
        digests, version = dict(content["digests"]), content["record"].get("version", 1)
    except _Damaged:
        raise
    except Exception as error:  # Orbax raises whatever the damage makes its parsers raise.
        raise_if_of_system(error, f"cannot read checkpoint {path}")
        raise _Damaged(f"{type(error).__name__} while reading: {one_line(error)}") from error
    if digest != digest_json(content):
        raise _Damaged("the digest of its record differs")
    if set(arrays) != set(digests):
        raise _Damaged("arrays are missing")
    for name, array in arrays.items():
        if digest_array(array) != digests[name]:
            raise _Damaged(f"the digest of {name} differs")
    digest = digest_json({name: digest_array(array) for name, array in arrays.items()})
    if not is_count(version):
        raise _Damaged("its record has no valid version")
    if version > _VERSION:
        raise UserError(f"checkpoint {path} was written by a newer version of cskd_jax")
    try:
        record = Record.from_json(content["record"])
    except ValueError as error:  # The digest is right, so nothing is damaged that an older checkpoint might have.
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
    arrays = arrays if version == _VERSION else {upgrade(name): array for name, array in arrays.items()}
    return arrays, record, digest


def _check_files(path):
    """Returns the bytes that a checkpoint's files take; raises _Damaged for files that no checkpoint has.

    These are pipes, devices and links, too many files, and anything but array data that is large.
    """
    total = 0
    for count, file in enumerate(path.rglob("*")):
        status = file.lstat()
        if count > _MAX_FILES:
            raise _Damaged("it has too many files")
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise _Damaged(f"{file} is not a regular file")
        is_data = _ARRAYS in file.relative_to(path).parts[:-1] and _DATA.fullmatch(file.name)
        if status.st_size > MAX_JSON and not is_data:
            raise _Damaged(f"{file} has {status.st_size:,} bytes; at most {MAX_JSON:,} are allowed")
        total += _size_without_holes(file, status.st_size)
    return total


def _check_metadata(path):
    """Raises _Damaged unless Orbax can read the metrics of a checkpoint and when it was saved."""
    try:
        with contextlib.suppress(FileNotFoundError):
            metadata = read_json(path / "_CHECKPOINT_METADATA")
            for name, kind in _METADATA.items():
                value = metadata.get(name)
                if not isinstance(value, kind | None) or (kind is int and abs(value or 0) > _LATEST):
                    raise _Damaged(f"its metadata has no valid {name}")
        with contextlib.suppress(FileNotFoundError):
            _read_metrics(path)
    except (UserError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _Damaged(f"{type(error).__name__} while reading its metrics: {one_line(error)}") from None


def _size_without_holes(file, size):
    """Returns how many bytes a file has before its first hole; holes take no space, so any number of them is free."""
    if size == 0:
        return 0
    with file.open("rb") as opened:
        return os.lseek(opened.fileno(), 0, os.SEEK_HOLE)


def _score(metrics: Any) -> Any:
    # Among equal scores, the earliest is the best, as in the results.
    return metrics["score"], -metrics["step"]


def mark_unfinished(folder: pathlib.Path) -> None:
    """Marks the network of the newest checkpoint in a folder as not trained to the end.

    A damaged checkpoint stays as it is, since reading it reports the damage.
    """
    steps = _steps(folder)
    if not steps:
        return
    path = folder / str(max(steps)) / _RECORD / "metadata"
    try:
        content = read_json(path)
        sound = content.pop("digest") == digest_json(content) and Record.from_json(content["record"]).finished
    except (OSError, UserError, ValueError, KeyError):
        return
    if sound:
        content["record"]["finished"] = False
        write_json(path, content | {"digest": digest_json(content)})
