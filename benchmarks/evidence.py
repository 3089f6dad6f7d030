"""Rebuilds the tables and figures of docs/results.md and README.md from the raw results in docs/results.

python benchmarks/evidence.py             rewrites the tables, and draws the figures (pip install matplotlib)
python benchmarks/evidence.py --check     names what is not as the raw results have it, and changes nothing
python benchmarks/evidence.py --pack=NAME FOLDER [FOLDER...]   packs the runs in folders into docs/results/NAME.tar.xz

An archive holds what `cskd-jax report` reads of each run, and the table of a search: once it is unpacked, that command
shows the same tables. Each folder is packed under its own name. A figure carries the digest of the numbers that it
shows, so that checking it does not need matplotlib.
"""

import argparse
import csv
import hashlib
import io
import json
import pathlib
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from PIL import Image
from scipy import stats

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cskd_jax.report import markdown, tables
from cskd_jax.report.runs import Comparison, Row, Run, compare, find_runs, find_unfinished
from cskd_jax.report.statistics import PairedDifference, paired_difference, summarize
from cskd_jax.report.tables import Table
from cskd_jax.report.write import mean_curve
from cskd_jax.training.records import read_rows

ROOT = pathlib.Path(__file__).resolve().parents[1]
RAW = ROOT / "docs" / "results"
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
_PACKED = {"config.json", "results.json", "metrics.jsonl", "evaluation.json", "log.txt", "search.csv"}
_BLOCK = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_DIGEST = "Digest of the numbers"


def pack(folders: list[pathlib.Path], archive: pathlib.Path) -> None:
    """Writes the files of runs into an archive; equal files make equal bytes."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for folder in folders:
            for path in sorted(path for path in folder.rglob("*") if path.name in _PACKED):
                content = path.read_bytes()
                member = tarfile.TarInfo(str(folder.name / path.relative_to(folder)))
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def unpack(folder: pathlib.Path) -> None:
    """Unpacks all archives into a folder."""
    for path in sorted(RAW.glob("*.tar.xz")):
        with tarfile.open(path) as archive:
            # Python 3.11 has no filters before 3.11.4, and 3.12 asks for one. The archives are our own.
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def comparison_in(*folders: pathlib.Path) -> Comparison:
    """Returns the comparison of the runs in those of the folders that exist."""
    (found,) = compare(find_runs(folder for folder in folders if folder.is_dir()))
    return found


def _methods(folder: pathlib.Path) -> Comparison:
    return comparison_in(folder / "methods", folder / "tuned")


def _text(*found: Table | None) -> str:
    return "\n".join(markdown.table(table) for table in found if table is not None)


def methods(folder: pathlib.Path) -> str:
    """Returns what `cskd-jax report` shows of the comparison of methods."""
    comparison = _methods(folder)
    unfinished = [(path.relative_to(folder), why) for path, why in find_unfinished([folder])]
    found = tables.results(comparison), tables.differences(comparison), tables.embeddings(comparison)
    return f"{markdown.escape(tables.recipe(comparison))}\n\n{_text(*found, tables.unfinished(unfinished))}"


def summary(folder: pathlib.Path) -> str:
    """Returns the scores of the methods and their differences from the references, for the README."""
    comparison = _methods(folder)
    found = {difference.label: difference for difference in tables.paired_differences(comparison)}
    rows = []
    for row in comparison.rows:
        lines = (found.get(f"{row.label} - {reference.label}") for reference in comparison.references)
        shown = (tables.NONE if line is None else _difference(line.corrected) for line in lines)
        rows.append((row.label, tables.summary(row.summary("last")), *shown))
    header = ("method", "last epoch: top-1, %", *(f"minus {row.label}" for row in comparison.references))
    return _text(Table("Methods", header, rows))


def _difference(difference: PairedDifference, digits: int = 2) -> str:
    """Returns a mean difference with the ends of its interval."""
    if difference.margin is None:
        return f"{difference.mean:+.{digits}f}"
    low, high = difference.mean - difference.margin, difference.mean + difference.margin
    return f"{difference.mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def ratios(row: Row) -> dict[int, float]:
    """Returns {seed: within / between} of the runs whose embeddings were measured."""
    measured = {run.results["seed"]: run.embedding for run in row.runs}
    return {seed: found["within"] / found["between"] for seed, found in measured.items() if found is not None}


def tightness(folder: pathlib.Path) -> str:
    """Returns how tight the classes are, beside the accuracy, and their difference from training on labels alone."""
    comparison = _methods(folder)
    measured = {row: ratios(row) for row in comparison.rows if ratios(row)}
    reference, rows = comparison.references[0], []
    for row, values in measured.items():
        found = paired_difference(values, measured[reference], comparisons=len(measured) - 1)
        shown = (tables.NONE, tables.NONE)
        if found is not None and row is not reference:
            shown = (_difference(found, 3), found.verdict)
        ratio, score = summarize(list(values.values())), row.summary("last")
        rows.append((row.label, tables.summary(ratio, 3), *shown, tables.summary(score)))
    points = [point for row, values in measured.items() for point in _points(row, values)]
    found = stats.spearmanr(*zip(*points, strict=True))
    header = ("method", "within / between", f"minus {reference.label}", "what it shows", "last epoch: top-1, %")
    note = (
        f"Differences are of runs with the same seed, with intervals that hold for all {len(measured) - 1} lines "
        f"together. Spearman's rank correlation of within / between with top-1 over the {len(points)} runs: "
        f"{found.statistic:+.2f}."
    )
    return _text(Table("Tightness and accuracy", header, rows, (note,)))


def _points(row: Row, values: Mapping[int, float]) -> list[tuple[float, float]]:
    """Returns (within / between, score) of each run of a row that was measured."""
    return [(values[seed], score) for seed, score in row.scores("last").items() if seed in values]


def search(folder: pathlib.Path) -> str:
    """Returns the trials of the searches, as their tables have them."""
    trials: list[dict[str, str]] = []
    for path in sorted(folder.glob("search/*/search.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            trials += csv.DictReader(file)
    keys = sorted({key for trial in trials for key in trial if key.startswith("losses.")})
    rows = []
    for trial in trials:
        values = (trial.get(key) or tables.NONE for key in keys)
        score = f"{100 * float(trial['validation_last']):.2f}"
        rows.append((trial["word"], *values, score, trial["chosen"] or tables.NONE))
    return _text(Table("Search", ("method", *keys, "validation: top-1, %", "chosen"), rows))


def samples(folder: pathlib.Path) -> str:
    """Returns each loss against labels alone, for every order of the images."""
    comparison = comparison_in(folder / "samples")
    plain = {_order(row.config): row for row in comparison.rows if row.learns_from_labels}
    others = sorted((row for row in comparison.rows if not row.learns_from_labels), key=lambda row: _place(row.config))
    rows = []
    for row in others:
        reference = plain[_order(row.config)]
        found = tables.paired(row, reference, comparisons=len(others))
        shown = (tables.NONE, tables.NONE) if found is None else (_difference(found), found.verdict)
        scores = tables.summary(reference.summary("last")), tables.summary(row.summary("last"))
        rows.append((_order(row.config), _centers(row.config), str(len(row.runs)), *scores, *shown))
    compared = ("ce: top-1, %", "cskd: top-1, %", "cskd minus ce")
    header = ("images in a batch", "centers", "seeds", *compared, "what it shows")
    note = f"After the last epoch. The intervals hold for all {len(others)} lines together."
    table = Table("Samples per class", header, rows, (note,))
    return f"{markdown.escape(tables.recipe(comparison))}\n\n{_text(table)}"


def _order(config: Mapping[str, Any]) -> str:
    """Returns how many images of a class a batch has, in words."""
    if config["sampler.name"] == "uniform":
        return "at random"
    return f"{config['sampler.samples_per_category']} of each class"


def _centers(config: Mapping[str, Any]) -> str:
    """Returns what the centers of category structure are made of, in words."""
    momentum = config.get("losses.category_structure.center_momentum")
    if momentum is not None:
        return f"running, momentum {momentum:g}"
    return "of all samples" if config.get("losses.category_structure.filter_misclassified") is False else "as published"


def _place(config: Mapping[str, Any]) -> tuple[bool, int, str]:
    return config["sampler.name"] != "uniform", config["sampler.samples_per_category"], _centers(config)


def pytorch(folder: pathlib.Path) -> str:
    """Returns kd by this package and by benchmarks/torch_training.py, with the same seeds."""
    theirs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("pytorch/*/results.json"))]
    paths = folder.glob("pytorch/*/metrics.jsonl")
    epochs = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    images = theirs[0]["config"]["dataset.train_examples"] / summarize([row["train_seconds"] for row in epochs]).mean
    together = {run.results["seed"]: run for run in find_runs([folder / "methods"]) if run.results["method"] == "kd"}
    ours = [together[run["config"]["seed"]] for run in theirs]
    (alone,) = find_runs([folder / "alone"])
    rows = [
        _trained("cskd_jax", [(run.score("last"), run.score("best")) for run in ours],
                 alone.results["student"]["images_per_second"]),
        _trained("PyTorch", [(100 * run["last"], 100 * run["best"]) for run in theirs], images),
    ]  # fmt: skip
    same = _evaluations(alone) == _evaluations(together[alone.results["seed"]])
    header = ("trained by", "seeds", "last epoch: top-1, %", "best epoch: top-1, %", "images/s, alone")
    note = (
        "Images/s are of training alone, without evaluation. The losses and scores of this run of ours "
        f"{'equal' if same else 'differ from'} those of the same run trained together with the other methods."
    )
    return _text(Table("KD against PyTorch", header, rows, (note,)))


def _trained(by: str, scores: list[tuple[float, float]], images: float) -> tuple[str, ...]:
    last, best = (summarize(list(column)) for column in zip(*scores, strict=True))
    return by, str(last.count), tables.summary(last), tables.summary(best), f"{images:.0f}"


def _evaluations(run: Run) -> list[Mapping[str, Any]]:
    return [row for row in read_rows(run.folder / "metrics.jsonl", evaluations=True) if row["phase"] == "student"]


BLOCKS: dict[str, Callable[[pathlib.Path], str]] = {
    function.__name__: function for function in (methods, summary, tightness, search, samples, pytorch)
}


class Figure(NamedTuple):
    """A figure.

    Attributes:
      numbers: The numbers that it shows, which JSON can hold.
      draw: Draws them into the axes of matplotlib that it is given.
      panels: Number of axes.
    """

    numbers: dict[str, Any]
    draw: Callable[..., None]
    panels: int

    @property
    def digest(self) -> str:
        """Returns the digest of the numbers."""
        return hashlib.sha256(json.dumps(self.numbers).encode()).hexdigest()


def figures(folder: pathlib.Path) -> dict[str, Figure]:
    """Returns {name of the file: figure}."""
    comparison = _methods(folder)
    costs = {row["method"]: row["ms"] for row in json.loads((RAW / "steps.json").read_text())["methods"]["rows"]}
    examples, batch = comparison.runs[0].results["dataset"]["train_examples"], comparison.runs[0].config["batch_size"]
    curves = {}
    for row in comparison.rows:
        curve = mean_curve(row)
        if curve is not None:
            minutes = curve.x * -(-examples // batch) * costs[row.method] / 60_000
            named = {"epochs": curve.x, "minutes": minutes, "top1": curve.y}
            curves[row.label] = {name: values.round(6).tolist() for name, values in named.items()}
    points = {row.label: [(round(x, 6), round(y, 6)) for x, y in _points(row, ratios(row))] for row in comparison.rows}
    return {
        "accuracy.png": Figure(curves, _draw_accuracy, 2),
        "tightness.png": Figure({label: values for label, values in points.items() if values}, _draw_tightness, 1),
    }


def _draw_accuracy(numbers, epochs, minutes):
    for axes, name, label in (epochs, "epochs", "epoch"), (minutes, "minutes", "minutes of training, alone"):
        for row, curve in numbers.items():
            axes.plot(curve[name], curve["top1"], label=row, linewidth=1)
        axes.set_xlabel(label)
    epochs.set_ylabel("top-1 on the test split, %")


def _draw_tightness(numbers, axes):
    for position, (row, points) in enumerate(numbers.items()):
        axes.scatter(*zip(*points, strict=True), label=row, s=20, marker="os^vDPX<>*"[position % 10])
    axes.set_xlabel("within / between: smaller is tighter")
    axes.set_ylabel("top-1 on the test split, %")


def draw(figure: Figure, path: pathlib.Path) -> None:
    """Draws a figure into a file, with the digest of its numbers."""
    from matplotlib.figure import Figure as Canvas  # Everything else works without it.

    canvas = Canvas(figsize=(4 * figure.panels + 2.5, 3.6), layout="constrained")
    axes = canvas.subplots(1, figure.panels, squeeze=False)[0]
    figure.draw(figure.numbers, *axes)
    canvas.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    canvas.savefig(path, dpi=110, metadata={_DIGEST: figure.digest, "Software": None})


def drawn_digest(path: pathlib.Path) -> str | None:
    """Returns the digest that a figure carries; None if there is no figure."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(_DIGEST)


def rebuilt(text: str, folder: pathlib.Path) -> str:
    """Returns the text of a page with its blocks as the raw results have them."""
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](folder)}{found[3]}", text)


def main(argv: list[str] | None = None) -> int:
    """Rebuilds, checks, or packs; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pack", metavar="NAME")
    parser.add_argument("folders", nargs="*", type=pathlib.Path)
    arguments = parser.parse_args(argv)
    if bool(arguments.folders) != bool(arguments.pack) or (arguments.check and arguments.pack):
        parser.error("folders are given with --pack, and only with it")
    if arguments.pack:
        pack(arguments.folders, RAW / f"{arguments.pack}.tar.xz")
        return 0
    stale = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        unpack(folder)
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            new = rebuilt(text, folder)
            if new != text:
                stale.append(page)
                if not arguments.check:
                    page.write_text(new, encoding="utf-8")
        for file, figure in figures(folder).items():
            if drawn_digest(RAW / file) != figure.digest:
                stale.append(RAW / file)
                if not arguments.check:
                    draw(figure, RAW / file)
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not as the raw results have it' if arguments.check else 'rebuilt'}")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
