"""What people see while a command runs."""

import sys

import tqdm

_muted = False


def mute() -> None:
    """Shows nothing from here on: of several processes, the first one alone speaks to people."""
    global _muted
    _muted = True


def say(message: str) -> None:
    """Prints a line for the person at the console, above the progress bar if one is shown."""
    if not _muted:
        tqdm.tqdm.write(message)
        sys.stdout.flush()


def progress_bar(phase: str, total: int, initial: int, unit: str) -> tqdm.tqdm:
    """Returns a bar on standard error, shown only on a terminal, which counts `unit`s and estimates the time left."""
    # None: not shown where there is no terminal.
    disable = True if _muted else None
    return tqdm.tqdm(
        desc=phase, total=total, initial=initial, unit=f" {unit}", unit_scale=True, disable=disable, dynamic_ncols=True
    )
