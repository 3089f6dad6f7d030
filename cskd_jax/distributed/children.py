"""Processes that end with the process that started them."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # An option of prctl(2).
# This is looked up here, because as little as possible should happen between fork and exec.
_prctl = ctypes.CDLL(None).prctl


def die_with_parent() -> None:
    """Makes a child get SIGKILL when its parent ends in any way; for `preexec_fn` of `subprocess.Popen`."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
