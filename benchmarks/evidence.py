"""Rebuilds the measured tables and figures of the documentation from the raw results in docs/results.

python benchmarks/evidence.py             rewrites the tables, and draws the figures (pip install matplotlib)
python benchmarks/evidence.py --check     names what is not as the raw results have it, and changes nothing
python benchmarks/evidence.py --pack=NAME FOLDER [FOLDER...]   packs the runs in folders into docs/results/NAME.tar.xz

An archive holds what `cskd-jax report` reads of each run, the table of a search, and the records of imported networks:
once it is unpacked, that command shows the same tables of the methods. Their notes also depend on the packaged recipes,
so the tables may have to be rebuilt when those change. Each folder is packed under its own name. The JSON files beside
the archives are what other benchmarks saved. A figure carries the digest of the numbers that it shows, so that checking
it does not need matplotlib.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import math
import pathlib
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import stats

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import saved_tables
from cskd_jax.report import markdown, tables
from cskd_jax.report.runs import Comparison, Row, Run, compare, find_runs, find_unfinished
from cskd_jax.report.statistics import CONFIDENCE, PairedDifference, paired_difference, summarize
from cskd_jax.report.tables import Table
from cskd_jax.report.write import mean_curve
from cskd_jax.runs.results import RESULTS

ROOT = pathlib.Path(__file__).resolve().parents[1]
RAW = ROOT / "docs" / "results"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "methods", "scaling", "checkpoints")),
)
_PACKED = {"config.json", "results.json", "metrics.jsonl", "evaluation.json", "log.txt", "search.csv", "import.json"}
_BLOCK = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Methods with category structure, and what is nearest to each of them without it.
_STRUCTURE = (("cskd", "ce"), ("cskd_paper", "cskd_paper-logits"), ("cskd+kd", "kd-ce1"))
# Methods that were not timed, and those of which they are a part.
_PART_OF = {"intra": "cskd", "inter": "cskd"}
# Folders that the block `pytorch` describes.
_OF_PYTORCH = {"pytorch", "alone"}
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
    """Copies all raw results into a folder, archives unpacked."""
    for path in RAW.glob("*.json"):
        shutil.copy(path, folder)
    for path in sorted(RAW.glob("*.tar.xz")):
        with tarfile.open(path) as archive:
            # Python 3.11 has no filters before 3.11.4, and 3.12 asks for one. The archives are our own.
            archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


@functools.cache  # Several blocks and the figures show the same runs.
def comparison_in(folder: pathlib.Path) -> Comparison:
    """Returns the comparison of the runs in a folder, which all share data, networks and teacher."""
    (found,) = compare(find_runs([folder]))
    return found


def named(comparison: Comparison) -> dict[str, Row]:
    """Returns {name: row}: what the folders of its runs have before their seed, which is shorter than its label."""
    found: dict[str, Row] = {}
    for row in comparison.rows:
        names = {run.folder.name.rpartition("-seed")[0] for run in row.runs}
        if len(names) > 1 or names & found.keys():
            raise SystemExit(f"{', '.join(sorted(names))}: a row needs a name of its own")
        found[names.pop()] = row
    return found


class Spread(NamedTuple):
    """How much values vary from seed to seed, beyond what a seed adds to all rows and a row adds to all seeds.

    Attributes:
      deviation: Deviation of the residuals, assumed to be that of all rows; None for less than two rows or seeds.
      freedom: Degrees of freedom of its estimate.
      lines: Number of differences whose intervals hold together.
    """

    deviation: float | None
    freedom: int
    lines: int

    def difference(self, ours: Mapping[int, float], reference: Mapping[int, float]) -> PairedDifference | None:
        """Returns our values minus those of a reference, both by seed; None if they have no seed in common."""
        found = paired_difference(ours, reference)
        if found is None or self.deviation is None or found.count == 1:
            return found
        quantile = stats.t.ppf(1 - (1 - CONFIDENCE) / self.lines / 2, self.freedom)
        return found._replace(margin=float(quantile) * self.deviation * math.sqrt(2 / found.count))


def spread_of(rows: Sequence[Mapping[int, float]], lines: int) -> Spread:
    """Returns the spread of the rows, {seed: value}, that have all seeds."""
    seeds = sorted(set().union(*rows))
    values = np.array([[row[seed] for seed in seeds] for row in rows if len(row) == len(seeds)])
    freedom = (len(values) - 1) * (len(seeds) - 1)
    if freedom < 1:
        return Spread(None, 0, lines)
    residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    return Spread(math.sqrt((residuals**2).sum() / freedom), freedom, lines)


def _pooled(spread: Spread) -> str:
    """Says how the intervals of differences were made."""
    if spread.deviation is None:
        return "One seed supports no claim."
    return (
        f"All intervals hold together with {CONFIDENCE:.0%} confidence (Bonferroni for {spread.lines} differences, "
        "including those of one seed). Their width comes from how much rows vary beyond what a seed adds to all of "
        f"them: a deviation of {spread.deviation:.3f}, estimated from the rows that have all seeds ({spread.freedom} "
        "degrees of freedom) and assumed to be equal in all rows."
    )


def _text(*found: Table | None) -> str:
    return "\n".join(markdown.table(table) for table in found if table is not None)


def runs(folder: pathlib.Path) -> str:
    """Returns which runs there are, how long it took to train them, and on what; and which have failed."""
    rows, versions = [], {}
    for path in sorted({path.relative_to(folder).parts[0] for path in folder.rglob(RESULTS)} - _OF_PYTORCH):
        hours: dict[Any, float] = {}
        found = find_runs([folder / path])
        for run in found:
            # Runs of a sweep with the same seed are trained together, and each has the time of all.
            key = run.folder.parent, run.results["seed"]
            hours[key] = max(hours.get(key, 0), _training_hours(run))
            for name, version in run.results["versions"].items():
                versions.setdefault(name, set()).add(version)
        devices = sorted({run.results["devices"]["count"] for run in found})
        counts = str(len(found)), str(len(hours)), " or ".join(map(str, devices))
        rows.append((path, *counts, f"{sum(hours.values()):.1f}"))
    header = ("folder", "runs", "groups", "devices", "hours")
    listed = (f"{name} {' and '.join(sorted(found))}" for name, found in versions.items() if name != "cskd_jax")
    note = (
        "A group is the runs of a sweep with the same seed, which are trained together and share the teacher's "
        f"forward pass. Hours are of training, without evaluation. Versions: {', '.join(listed)}."
    )
    unfinished = [(path.relative_to(folder), why) for path, why in find_unfinished([folder])]
    return _text(Table("Runs", header, rows, (note,)), tables.unfinished(unfinished))


def _training_hours(run: Run) -> float:
    images = run.results["dataset"]["train_examples"] * run.config["epochs"]
    return images / run.results["student"]["images_per_second"] / 3600


def methods(folder: pathlib.Path) -> str:
    """Returns what `cskd-jax report` shows of the comparison of methods."""
    comparison = comparison_in(folder / "methods")
    found = tables.results(comparison), tables.differences(comparison)
    return f"{markdown.escape(tables.recipe(comparison))}\n\n{_text(*found)}"


def _summary(folder):
    """Returns the table of `summary`, and the methods of its rows by their name."""
    shown = named(comparison_in(folder / "methods"))
    scores = {name: row.scores("last") for name, row in shown.items()}
    compared = ("ce", "kd")
    # Each row with ce, each but ce with kd.
    spread = spread_of(list(scores.values()), lines=2 * len(scores) - 3)
    rows = []
    for name, ours in scores.items():
        found = [None if name == other else spread.difference(ours, scores[other]) for other in compared]
        rows.append((name, str(len(ours)), tables.summary(shown[name].summary("last")), *map(_cell, found)))
    header = ("method", "seeds", "last epoch: top-1, %", *(f"minus {name}" for name in compared))
    table = Table("ResNet56 to ResNet8 on CIFAR-100", header, rows, (_pooled(spread),))
    return table, {name: row.method for name, row in shown.items()}


def summary(folder: pathlib.Path) -> str:
    """Returns the scores of the methods, and their differences from ce and kd."""
    return _text(_summary(folder)[0])


def headline(folder: pathlib.Path) -> str:
    """Returns the rows of `summary` with the most seeds that are no variants of a method, compared with ce."""
    table, method_of = _summary(folder)
    most = max(int(row[1]) for row in table.rows)
    rows = [row[:4] for row in table.rows if row[0] == method_of[row[0]] and int(row[1]) == most]
    note = (
        "Mean ± sample standard deviation over the seeds. The intervals hold together, with the others of the first "
        f"table of docs/results.md, with {CONFIDENCE:.0%} confidence."
    )
    return _text(table._replace(header=table.header[:4], rows=rows, notes=(note,)))


def _cell(found: PairedDifference | None, digits: int = 2) -> str:
    """Returns a difference with the ends of its interval as a text, or a text for none."""
    if found is None:
        return tables.NONE
    if found.margin is None or found.count == 1:
        return f"{found.mean:+.{digits}f}"
    low, high = found.mean - found.margin, found.mean + found.margin
    return f"{found.mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def ratios(row: Row) -> dict[int, float]:
    """Returns {seed: within / between} of the test images' embeddings after the last epoch."""
    unmeasured = [str(run.folder) for run in row.runs if run.embedding is None]
    if unmeasured:
        raise SystemExit(f"{unmeasured[0]} was not measured: cskd-jax evaluate --embedding")
    return {run.results["seed"]: run.embedding["within"] / run.embedding["between"] for run in row.runs}


def tightness(folder: pathlib.Path) -> str:
    """Returns how tight the classes are, and the difference from training on labels alone, beside the accuracy."""
    comparison = comparison_in(folder / "methods")
    shown = named(comparison)
    ratio_of = {name: ratios(row) for name, row in shown.items()}
    spread = spread_of(list(ratio_of.values()), lines=len(ratio_of) - 1)
    rows = []
    for name, values in ratio_of.items():
        if name != "ce":
            found = spread.difference(values, ratio_of["ce"])
            rows.append((name, str(len(values)), _cell(found, digits=3), _tighter(found)))
    means = [(summarize(list(ratio_of[name].values())).mean, row.summary("last").mean) for name, row in shown.items()]
    correlation = stats.spearmanr(*zip(*means, strict=True)).statistic
    note = (
        f"{_pooled(spread)} Over the {len(means)} methods, Spearman's rank correlation of the mean within / between "
        f"with the mean top-1 is {correlation:+.2f}, which describes these methods and tests nothing."
    )
    header = ("method", "seeds", "within / between, minus ce", "what it shows")
    return _text(tables.embeddings(comparison), Table("Tightness", header, rows, (note,)))


def _tighter(found: PairedDifference) -> str:
    """Says what a difference of within / between shows."""
    return {"lower": "tighter", "higher": "looser"}.get(found.verdict, found.verdict)


def structure(folder: pathlib.Path) -> str:
    """Returns what category structure adds to the same method without it, in accuracy and in tightness."""
    shown = named(comparison_in(folder / "methods"))
    pairs = [pair for pair in _STRUCTURE if shown.keys() >= set(pair)]
    score_of = {name: row.scores("last") for name, row in shown.items()}
    ratio_of = {name: ratios(row) for name, row in shown.items()}
    score_spread, ratio_spread = (spread_of(list(of.values()), lines=2 * len(pairs)) for of in (score_of, ratio_of))
    rows = []
    for ours, reference in pairs:
        score = score_spread.difference(score_of[ours], score_of[reference])
        ratio = ratio_spread.difference(ratio_of[ours], ratio_of[reference])
        name, count = f"{ours} - {reference}", str(score.count)
        rows.append((name, count, _cell(score), score.verdict, _cell(ratio, digits=3), _tighter(ratio)))
    note = _pooled(score_spread)
    if ratio_spread.deviation is not None:
        note += f" For within / between, that deviation is {ratio_spread.deviation:.3f}."
    header = ("difference", "seeds", "top-1, points", "what it shows", "within / between", "what it shows")
    return _text(Table("What category structure adds", header, rows, (note,)))


def search(folder: pathlib.Path) -> str:
    """Returns the trials of the searches, as their tables have them."""
    trials: list[dict[str, str]] = []
    for path in sorted((folder / "search").iterdir()):
        with (path / "search.csv").open(encoding="utf-8", newline="") as file:
            trials += csv.DictReader(file)
    keys = sorted({key for trial in trials for key in trial if key.startswith("losses.")})
    rows = []
    for trial in trials:
        values = (trial.get(key) or tables.NONE for key in keys)
        score = f"{100 * float(trial['validation_last']):.2f}" if trial["validation_last"] else trial["metric"]
        rows.append((trial["word"].rpartition("/")[2], *values, score, trial["chosen"] or tables.NONE))
    config = find_runs([folder / "search"])[0].config
    held_out = config["dataset.validation_examples"]
    note = f"Seed {config['seed']}, {config['epochs']} epochs, {held_out:,} training images held out to choose by."
    return _text(Table("Search", ("method", *keys, "validation: top-1, %", "chosen"), rows, (note,)))


def samples(folder: pathlib.Path) -> str:
    """Returns category structure against labels alone, for every order of the images."""
    comparison = comparison_in(folder / "samples")
    scores = {row: row.scores("last") for row in comparison.rows}
    plain = {_order(row.config): row for row in comparison.rows if row.learns_from_labels}
    others = sorted((row for row in comparison.rows if not row.learns_from_labels), key=lambda row: _place(row.config))
    # Rows that differ only in their centers are nearly copies of each other, so one of them stands for all.
    distinct = [*plain.values(), *{_order(row.config): row for row in others}.values()]
    spread = spread_of([scores[row] for row in distinct], lines=len(others))
    rows = []
    for row in others:
        reference = plain[_order(row.config)]
        found = spread.difference(scores[row], scores[reference])
        both = tables.summary(reference.summary("last")), tables.summary(row.summary("last"))
        shown = tables.NONE if found is None else found.verdict
        rows.append((
            _order(row.config), _centers(row.config), str(len(scores[row])), *both,
            _cell(found), shown,
        ))  # fmt: skip
    compared = ("ce: top-1, %", "cskd: top-1, %", "cskd minus ce")
    header = ("images in a batch", "centers", "seeds", *compared, "what it shows")
    table = Table("Samples per class", header, rows, (f"After the last epoch. {_pooled(spread)}",))
    return f"{markdown.escape(tables.recipe(comparison))}\n\n{_text(table)}"


def _order(config: Mapping[str, Any]) -> str:
    """Returns how many images of a class a batch has, in words."""
    if config["sampler.name"] == "uniform":
        return "at random"
    return f"{config['sampler.samples_per_category']} of each class"


def _centers(config: Mapping[str, Any]) -> str:
    """Returns what the centers of category structure are made of, in words."""
    momentum = config["losses.category_structure.center_momentum"]
    which = "correct" if config["losses.category_structure.filter_misclassified"] else "all"
    return f"of {which} samples" + ("" if momentum is None else f", running with momentum {momentum:g}")


def _place(config: Mapping[str, Any]) -> tuple[bool, int, str]:
    return config["sampler.name"] != "uniform", config["sampler.samples_per_category"], _centers(config)


def pytorch(folder: pathlib.Path) -> str:
    """Returns kd by this package and by benchmarks/torch_training.py: the scores of all seeds, and how fast each is."""
    ours, ours_timed = named(comparison_in(folder / "methods"))["kd"].runs, find_runs([folder / "alone"])
    theirs, theirs_timed = (
        [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"pytorch/{name}*/results.json"))]
        for name in ("kd-seed", "alone")
    )
    scores = [run.score("last") for run in ours], [100 * run["last"] for run in theirs]
    speeds = (
        [run.results["student"]["images_per_second"] for run in ours_timed],
        [run["images_per_second"] for run in theirs_timed],
    )
    epochs = ours[0].config["epochs"]
    images = epochs * ours[0].results["dataset"]["train_examples"]
    rows = [
        (
            by, str(len(last)), tables.summary(summarize(last)), f"{min(speed):.0f} to {max(speed):.0f}",
            f"{images / max(speed) / 60:.0f} to {images / min(speed) / 60:.0f}",
        )
        for by, last, speed in zip(("cskd_jax", "PyTorch"), scores, speeds, strict=True)
    ]  # fmt: skip
    low, high = stats.ttest_ind(*scores).confidence_interval(CONFIDENCE)
    difference = summarize(scores[0]).mean - summarize(scores[1]).mean
    note = (
        f"cskd_jax minus PyTorch: {difference:+.2f} points, {CONFIDENCE:.0%} interval {low:+.2f} to {high:+.2f} "
        "(Student's t for independent seeds). Images/s are of training without evaluation and compilation, alone on "
        f"the machine: the lowest and the highest of {len(theirs_timed)} runs each of {theirs_timed[0]['epochs']} "
        f"epochs, which took turns. Minutes are those of {epochs} epochs at this speed."
    )
    header = ("trained by", "seeds", "last epoch: top-1, %", "images/s", "minutes")
    return _text(Table("KD against PyTorch", header, rows, (note,)))


# {block: function that makes it, and the raw results that it needs}
BLOCKS: dict[str, tuple[Callable[[pathlib.Path], str], str]] = {
    "runs": (runs, "methods"),
    "methods": (methods, "methods"),
    "headline": (headline, "methods"),
    "summary": (summary, "methods"),
    "tightness": (tightness, "methods"),
    "structure": (structure, "methods"),
    "search": (search, "search"),
    "samples": (samples, "samples"),
    "pytorch": (pytorch, "pytorch"),
    "costs": (saved_tables.costs, "costs-1.json"),
    "traffic": (saved_tables.traffic, "scaling-cifar100.json"),
    "memory": (saved_tables.memory, "scaling-cifar100.json"),
    "sums": (saved_tables.sums, "scaling-cifar100.json"),
    "limits": (saved_tables.limits, "scaling-cifar100.json"),
    "faults": (saved_tables.faults, "faults.json"),
    "checkpoints": (saved_tables.checkpoints, "checkpoints"),
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
    comparison = comparison_in(folder / "methods")
    steps = {row["method"]: row for row in json.loads((folder / "steps.json").read_text())["methods"]["rows"]}
    # Each method was timed in turn with kd, so their ratio is surer than both times.
    costs = {method: row["of kd"] * steps["kd"]["ms"] for method, row in steps.items()}
    costs["kd"] = steps["kd"]["ms"]
    examples, batch = comparison.runs[0].results["dataset"]["train_examples"], comparison.runs[0].config["batch_size"]
    curves, points = {}, {}
    for name, row in named(comparison).items():
        curve = mean_curve(row)
        if curve is not None:
            minutes = curve.x * -(-examples // batch) * costs[_PART_OF.get(row.method, row.method)] / 60_000
            drawn = {"epochs": curve.x, "minutes": minutes, "top1": curve.y}
            curves[name] = {axis: values.round(6).tolist() for axis, values in drawn.items()}
        scores = row.scores("last")
        points[name] = [(round(ratio, 6), round(scores[seed], 6)) for seed, ratio in ratios(row).items()]
    return {
        "accuracy.png": Figure(curves, _draw_accuracy, 2),
        "tightness.png": Figure(points, _draw_tightness, 1),
    }


def _draw_accuracy(numbers, epochs, minutes):
    for axes, name, label in (epochs, "epochs", "epoch"), (minutes, "minutes", "minutes of training, alone"):
        for position, (row, curve) in enumerate(numbers.items()):
            # There are ten colors.
            style = ("-", "--", ":")[position // 10 % 3]
            axes.plot(curve[name], curve["top1"], label=row, linewidth=1, linestyle=style)
        axes.set_xlabel(label)
    epochs.set_ylabel("top-1 on the test split, %")


def _draw_tightness(numbers, axes):
    for position, (row, points) in enumerate(numbers.items()):
        axes.scatter(*zip(*points, strict=True), label=row, s=20, marker="os^vDPX<>*dph"[position % 13])
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


def rebuilt(texts: Sequence[str], folder: pathlib.Path) -> list[str]:
    """Returns the texts of pages with their blocks as the raw results have them.

    Raises:
      SystemExit: Raw results are shown nowhere, a block is there twice or unknown, or it has no end.
    """
    names = [name for text in texts for _, name, _ in _BLOCK.findall(text)]
    expected = [name for name, (_, needed) in BLOCKS.items() if (folder / needed).exists()]
    marks = [sum(text.count(mark) for text in texts) for mark in ("<!-- evidence:", "<!-- end -->")]
    if sorted(names) != sorted(expected) or marks != [len(names)] * 2:
        raise SystemExit(f"the pages must have these blocks, each once: {', '.join(expected)}")
    return [_BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]][0](folder)}{found[3]}", text) for text in texts]


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
        texts = [page.read_text(encoding="utf-8") for page in PAGES]
        for page, text, new in zip(PAGES, texts, rebuilt(texts, folder), strict=True):
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
