"""Processes that are not left behind by the one that started them."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # of prctl(2)
# Looked up here: between fork and exec, as little as possible should happen.
_prctl = ctypes.CDLL(None).prctl


def die_with_parent() -> None:
    """Makes the child get SIGKILL when its parent is gone, however that ended: a `preexec_fn` of `subprocess.Popen`."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
