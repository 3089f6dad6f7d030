"""Gives random inputs to the parsers of files from outside, which must read them or refuse them in one line.

python benchmarks/fuzz.py [--inputs=200000] [--parser=pickle|safetensors|records] [--seed=0] [--first=0] [--folder=DIR]

The inputs are mutations of real files and generated ones (tests/random_inputs.py). Input N of a seed is always the
same, whatever was read before it: --first=N --inputs=1 reads it alone. It is a failure if an input raises anything but
the package's own error, starts a program, opens a connection, uses Python's pickle, or takes ten seconds or a GiB of
memory. What fails is kept in --folder, with the error beside the file, up to a hundred of each parser, and the exit
code is 1.
"""

import argparse
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.measuring import Part, render
from tests.hostile_inputs import happened, peak_memory, watch
from tests.random_inputs import GENERATORS, Input, read

SECONDS, MEBIBYTES = 10, 1024
_PROGRESS_SECONDS = 10
_MOST_FAILURES = 100


class _TooLongError(BaseException):
    """Raised in the middle of an input that takes too long; no parser catches it."""


def _interrupt(*_):
    raise _TooLongError(f"it took {SECONDS} s")


def make_input(parser: str, seed: int, number: int) -> Input:
    """Returns an input of a parser, a name and the content of the file."""
    return GENERATORS[parser](random.Random(f"{seed} {parser} {number}"))


def campaign(parser: str, inputs: int, seed: int, folder: pathlib.Path, first: int = 0) -> dict[str, Any]:
    """Reads inputs and returns a row of figures; what fails is kept in a folder.

    Args:
      parser: Name of the parser, a key of `GENERATORS`.
      inputs: Number of inputs.
      seed: Seed of all inputs.
      folder: Folder of what fails.
      first: Number of the first input.
    """
    accepted, failures, slowest, last_line = 0, 0, 0.0, time.monotonic()
    make_input(parser, seed, first)  # The real files are made once.
    begin, memory = time.monotonic(), peak_memory()
    signal.signal(signal.SIGALRM, _interrupt)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        for number in range(first, first + inputs):
            given = make_input(parser, seed, number)
            outcome, seconds = _outcome(given, pathlib.Path(scratch))
            before, memory = memory, peak_memory()
            grown = memory - before
            if isinstance(outcome, str) or grown > MEBIBYTES:
                failures += 1
                error = outcome if isinstance(outcome, str) else f"it took {grown:,.0f} MiB of memory\n"
                _keep(folder, f"{parser}-{seed}-{number}", given, error)
            else:
                accepted += outcome
            slowest = max(slowest, seconds)
            if time.monotonic() - last_line > _PROGRESS_SECONDS:
                last_line = time.monotonic()
                print(f"{parser}: {number + 1 - first:,} of {inputs:,}, {failures} failures", flush=True)
            if failures >= _MOST_FAILURES:
                inputs = number + 1 - first
                break
    return {
        "parser": parser,
        "inputs": inputs,
        "seconds": time.monotonic() - begin,
        "accepted": accepted,
        "refused": inputs - accepted - failures,
        "failed": failures,
        "slowest (ms)": 1e3 * slowest,
        "peak memory (MiB)": memory,
    }


def _outcome(given, folder):
    """Returns whether an input was accepted, or the text of its failure; and the seconds that it took."""
    happened.clear()
    begin = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        outcome = read(given, folder)
    except (Exception, _TooLongError):
        outcome = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - begin
    return (f"it made happen: {', '.join(happened)}\n" if happened else outcome), seconds


def _keep(folder, name, given, error):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-{given[0]}").write_bytes(given[1])
    (folder / f"{name}-error.txt").write_text(error, encoding="utf-8")
    print(f"FAILED: {error.strip().splitlines()[-1]} ({folder / name}-{given[0]})", flush=True)


def main() -> None:
    """Prints a table with the figures of each parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="for each parser")
    parser.add_argument("--parser", choices=sorted(GENERATORS), help="default: all, one after the other")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("fuzz-failures"), help="of what fails")
    arguments = parser.parse_args()
    sys.addaudithook(watch)
    chosen = [arguments.parser] if arguments.parser else sorted(GENERATORS)
    rows = [campaign(name, arguments.inputs, arguments.seed, arguments.folder, arguments.first) for name in chosen]
    failed = sum(row["failed"] for row in rows)
    notes = [f"seed {arguments.seed}; an input may take {SECONDS} s and {MEBIBYTES} MiB, and nothing may be executed"]
    notes += [f"what failed is in {arguments.folder}"] if failed else []
    print("\n" + render(Part("Random inputs for the parsers of files from outside", rows, notes)))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
