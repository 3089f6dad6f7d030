"""The memory of the machine."""

import contextlib
import os
import pathlib
import resource


def total_memory() -> int:
    """Returns the memory of the machine in bytes, or the limit of the container if that is lower."""
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
