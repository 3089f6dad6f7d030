"""A lock that lets one process at a time hold a folder."""

import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import time
from collections.abc import Iterator

from cskd_jax.console import say
from cskd_jax.errors import UserError
from cskd_jax.files import open_append, refuse_other_kinds

_logger = logging.getLogger(__name__)

# Name of the file of a lock, in the folder that is held.
LOCK = "lock"
# A file server releases a lock only some time after a machine has died: NFS, by default, after 90 seconds.
PATIENCE_SECONDS = 120
# Time to wait for a process on this machine that is about to end.
LOCAL_PATIENCE_SECONDS = 3
_POLL_SECONDS = 0.5
# Errors of file systems that do not support such locks.
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: pathlib.Path, holder: str) -> Iterator[None]:
    """Holds the lock for this process; the system releases it when the process ends, however it ends.

    If a process on another machine holds it, this function waits for `PATIENCE_SECONDS`, because the server may not
    know yet that it died. If nothing has been put into the folder by the end, for example after a rejected run, the
    lock and the folders that were made for it are removed.

    Args:
      path: File of the lock; the file and its folder are created if they are missing.
      holder: Description of who else may hold it and where, such as "another job", for the message.

    Raises:
      UserError: Another process holds it, its folder cannot be written to, or something other than a regular file is at
        the path.
    """
    file, made = _open(path)
    while True:
        with file:
            try:
                _acquire(file, holder)
                if not _is_at(path, file):  # Its earlier holder has removed it.
                    file, added = _open(path)
                    made = [*added, *made]
                    continue
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    raise UserError(f"cannot write to workdir {path.parent}: {error.strerror}") from None
                _logger.warning(
                    "%s: this file system does not support locks (%s); do not start a second job", path, error.strerror
                )
            try:
                yield
            finally:
                _leave_no_trace(path, made)
            return


def _open(path):
    """Opens the file of a lock; returns it, and the folders that were made for it, the innermost first."""
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_other_kinds([path], [])
        return open_append(path), made
    except OSError as error:
        raise UserError(f"cannot write to workdir {path.parent}: {error.strerror}") from None


def _is_at(path, file):
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _leave_no_trace(path, made):
    with contextlib.suppress(OSError):
        if os.listdir(path.parent) == [path.name]:
            path.unlink()
            for folder in made:
                folder.rmdir()


def _acquire(file, holder):
    begin, patience = time.monotonic(), None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if patience is None:
                file.seek(0)
                patience = LOCAL_PATIENCE_SECONDS if file.read() == _machine() else PATIENCE_SECONDS
                say(f"{holder}: waiting up to {patience} s for it to finish")
            if time.monotonic() - begin >= patience:
                raise UserError(f"{holder}; wait for it to finish, or use another folder") from None
            time.sleep(_POLL_SECONDS)
        else:
            # This bypasses the buffer of the file, which would try again when the file is closed.
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), _machine().encode())
            return


def _machine():
    """Returns an identifier of this machine and its boot; the host names of containers may not be unique."""
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
