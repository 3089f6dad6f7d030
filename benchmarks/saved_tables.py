"""Tables of the documentation from what other benchmarks have saved in docs/results, for evidence.py."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from cskd_jax.interop.checkpoints import known_checkpoints

# Bytes per second between devices: of the links of a TPU v4, or of NVLink; and of Ethernet with 100 Gb/s.
_LINKS = (50e9, 12.5e9)
_COLUMNS = 3
# What the data sets of the verified checkpoints are.
_IMAGES = {"cifar100": "CIFAR-100, {:,} images", "image_folder": "CIFAR-10, JPEG, {:,} images"}


def costs(folder: pathlib.Path) -> str:
    """Returns the time and memory of a step of each method, by methods.py."""
    rows = sorted(
        (row for part in _saved(folder, "costs-*.json", "methods") for row in part["rows"]),
        key=lambda row: row["method"],
    )
    cells = [(f"`{row['method']}`", f"{row['of kd']:.2f}", f"{row['memory MB']:.0f}") for row in rows]
    height = -(-len(cells) // _COLUMNS)
    cells += [("", "", "")] * (_COLUMNS * height - len(cells))
    header = ("word", "time / `kd`", "MB") * _COLUMNS
    return _table(header, [sum(cells[place::height], ()) for place in range(height)], left=(0, 3, 6))


def traffic(folder: pathlib.Path) -> str:
    """Returns how much the collectives of a step receive on each device, by scaling.py."""
    purposes = ("gradients, metrics", "losses", "BatchNorm statistics")
    devices: dict[tuple[str, ...], list[str]] = {}
    for networks, row in _steps(folder):
        moved = (f"{row[f'{purpose} kB']:,.0f}" for purpose in purposes)
        what = networks, f"{row['batch']:,}", f"{row['categories']:,}", *moved, str(row["collectives"])
        devices.setdefault(what, []).append(str(row["devices"]))
    header = (
        "networks",
        "devices",
        "global batch",
        "classes",
        *(f"{purpose}, kB" for purpose in purposes),
        "collectives",
    )
    return _table(header, [(what[0], ", ".join(found), *what[1:]) for what, found in devices.items()])


def memory(folder: pathlib.Path) -> str:
    """Returns the memory that a step needs on each device, by scaling.py."""
    kinds = {"arguments": "state and batch, MB", "temporary": "rest of the step, MB", "teacher pass": "teacher, MB"}
    header = ("networks", "devices", "global batch", "classes", *kinds.values())
    rows = []
    for networks, row in _steps(folder):
        sizes = (f"{row[f'{kind} MB']:,.0f}" for kind in kinds)
        rows.append((networks, *(f"{row[name]:,}" for name in ("devices", "batch", "categories")), *sizes))
    return _table(header, rows)


def limits(folder: pathlib.Path) -> str:
    """Returns how long it takes to move what a ring all-reduce of gradients and losses moves."""
    moved = {}
    for networks, row in _steps(folder):
        size = 2e3 * (row["gradients, metrics kB"] + row["losses kB"])
        moved[networks, f"{row['batch']:,}", f"{row['categories']:,}"] = size
    header = (
        "networks",
        "global batch",
        "classes",
        "moved per step, MB",
        *(f"at {link / 1e9:g} GB/s, ms" for link in _LINKS),
    )
    return _table(header, [
        (*what, f"{size / 1e6:,.0f}", *(f"{1e3 * size / link:.1f}" for link in _LINKS)) for what, size in moved.items()
    ])  # fmt: skip


def sums(folder: pathlib.Path) -> str:
    """Returns the time of a sum over devices, by scaling.py."""
    (part,) = _saved(folder, "scaling-cifar100.json", "sum")
    rows = [(str(row["processes"]), str(row["devices of each"]), f"{row['sum ms']:.1f}") for row in part["rows"]]
    return _table(("processes", "devices of each", "ms"), rows)


def faults(folder: pathlib.Path) -> str:
    """Returns how long killed runs stood still, by faults.py."""
    rows = []
    for name, part in json.loads((folder / "faults.json").read_text(encoding="utf-8")).items():
        if name.startswith("kills"):
            noticed, again = part["rows"]
            figures = [
                (str(row["count"]), *(f"{row[of]:.1f}" for of in ("median", "largest"))) for row in (noticed, again)
            ]
            rows.append((part["title"], *sum(figures, ())))
    header = ("", "noticed", "median, s", "largest, s", "trained again", "median, s", "largest, s")
    return _table(header, rows)


def checkpoints(folder: pathlib.Path) -> str:
    """Returns the known public checkpoints, and the accuracies that `import-torch --verify` measured of them."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("checkpoints/*/import.json")]
    verified = {entry["sha256"]: entry["verified"] for entry in found}
    measured = {
        digest: (_IMAGES[entry["dataset"]].format(entry["images"]), entry["top1"]) for digest, entry in verified.items()
    }
    sets = sorted({images for images, _ in measured.values()}, reverse=True)
    rows = []
    for checkpoint in known_checkpoints().values():
        mean, std = (", ".join(f"{value:g}" for value in checkpoint.images[name]) for name in ("mean", "std"))
        address = f"[{checkpoint.path.rpartition('/')[2]}]({checkpoint.repository}/blob/HEAD/{checkpoint.path})"
        stated = "" if checkpoint.stated is None else f"{checkpoint.stated:.2f}"
        images, top1 = measured.get(checkpoint.sha256, ("", 0.0))
        cells = (f"{100 * top1:.2f}" if images == name else "" for name in sets)
        rows.append((address, f"`{checkpoint.model}`", checkpoint.dataset, mean, std, stated, *cells))
    return _table(("file", "network", "trained on", "mean", "standard deviation", "stated", *sets), rows, left=range(5))


def _steps(folder: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (networks, row) of the compiled steps, by the number of devices, of images and of classes."""
    for part in _saved(folder, "scaling-*.json", "step"):
        for row in sorted(part["rows"], key=lambda row: [row[name] for name in ("categories", "batch", "devices")]):
            yield part["title"].partition(": ")[2], row


def _saved(folder: pathlib.Path, pattern: str, part: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8"))[part] for path in sorted(folder.glob(pattern))]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Returns a table in Markdown; `left` are the columns of words."""
    marks = ["---" if place in left else "---:" for place in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, marks, *rows))
