"""The folder of a run: what it holds, and whose it is."""

import json
import pathlib
from typing import Any

import ml_collections

from cskd_jax.errors import UserError
from cskd_jax.files import write_json
from cskd_jax.runs import schema
from cskd_jax.training.checkpoint import FOLDER

# Beside the configuration, config.json of a run whose teacher was given holds that teacher's digest.
TEACHER_DIGEST = "teacher.checkpoint digest"


def check_workdir(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
    """Raises UserError if the workdir holds checkpoints of another configuration, or cannot be one."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = read_json(path) if path.exists() else identity
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror}") from None
    # Where digests say which teacher it is, its folder may have moved.
    moved = {"teacher.checkpoint"} if TEACHER_DIGEST in found.keys() & identity.keys() else set()
    different = [
        f"{key} {found.get(key)!r} != {identity.get(key)!r}"
        for key in sorted((found.keys() | identity.keys()) - moved - set(schema.INDIFFERENT))
        if found.get(key) != identity.get(key)
    ]
    if different and any(workdir.glob(f"*/{FOLDER}/*")):
        raise UserError(
            f"workdir {workdir} holds a run of another configuration ({', '.join(different)}); use another --workdir"
        )


def claim(workdir: pathlib.Path, identity: dict[str, Any]) -> None:
    """Makes the workdir this configuration's, dropping what one that never came to a checkpoint has logged."""
    if not any(workdir.glob(f"*/{FOLDER}/*")):
        (workdir / "metrics.jsonl").unlink(missing_ok=True)
    write_json(workdir / "config.json", identity)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file of a run; raises UserError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return found


def run_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `workdir`; raises UserError if it holds none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is no workdir of a run: there is no {path.name} in it")
    flat = read_json(path)
    flat.pop(TEACHER_DIGEST, None)
    return schema.restore(flat, str(path))
