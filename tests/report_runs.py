"""Folders of finished runs as the report reads them, without training."""

import json

from cskd_jax.runs import schema
from cskd_jax.runs.recipes import load_recipe
from tests.conftest import ROOT


def write_run(folder, recipe, word, seed, last, digest="d", **overrides):
    """results.json and metrics.jsonl of a run, with a best epoch half a point above the last."""
    arguments = [f"--config.{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    config = load_recipe(f"{ROOT}/configs/{recipe}.py:{word}", [*arguments, f"--config.seed={seed}"])
    entry = {"model": config.student.name, "width": config.student.width, "parameters": 1000}
    values = {"top1": last, "top5": 0.9, "loss": 1.0}
    teacher = {"parameters": 4000, "digest": digest, "checkpoint": str(folder.parent / "teacher-net" / "student")}
    results = {
        "method": config.method,
        "seed": seed,
        "teacher": None if config.method == "ce" else teacher | {"last": {"top1": 0.7, "top5": 0.9, "loss": 1.0}},
        "student": entry | {"last": {"epoch": 2, **values}, "best": {"epoch": 1, **values, "top1": last + 0.005}},
        "dataset": {"name": recipe, "categories": 100, "train_examples": 50_000, "test_examples": 10_000},
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1},
        "versions": {"cskd_jax": "0.1.0"},
        "config": schema.plain(config),
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    rows = [{"phase": "student", "split": "test", "epoch": e, "step": e, **values, "top1": last / e} for e in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
