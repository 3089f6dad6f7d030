"""The memory of the machine."""

import contextlib
import ctypes
import os
import pathlib
import resource

# Options of glibc's mallopt and their values: one heap for all threads, for blocks of any size, which never shrinks.
_ONE_HEAP = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}


def keep_freed_memory() -> None:
    """Keeps memory that is freed for later arrays of this process; to be called before there are threads.

    glibc returns large blocks to the kernel, which clears each page before it hands it out again. On a CPU, that was a
    tenth of the time of a training step, and several heaps took a quarter more memory than one. Another C library is
    left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in _ONE_HEAP.values():
            mallopt(option, value)


def total_memory() -> int:
    """Returns the bytes of memory that the machine has, or as many of them as a container may use."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # It is "max" if there is no limit.
            sizes.append(int(pathlib.Path(path).read_text(encoding="ascii")))
    return min(sizes)


def memory_left() -> int:
    """Returns the bytes of memory that this process does not use; other processes may use some of them."""
    try:
        taken = int(pathlib.Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
            "SC_PAGE_SIZE"
        )
    except OSError:  # macOS has no such file.
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(0, total_memory() - taken)
