"""The folder of a run: which run it belongs to, whether the run is done, and how it is extended."""

import contextlib
import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from cskd_jax.configs import networks
from cskd_jax.console import say
from cskd_jax.data import ImageDataset
from cskd_jax.data.fingerprint import fingerprint
from cskd_jax.errors import UserError, shorten
from cskd_jax.files import refuse_links, refuse_other_kinds, write_json
from cskd_jax.losses import LOSSES
from cskd_jax.runs import keys, recipes, schema
from cskd_jax.runs.lock import LOCK, locked
from cskd_jax.runs.results import FILES, FOLDERS, RESULTS
from cskd_jax.training.checkpoint import FOLDER, mark_unfinished
from cskd_jax.training.objective import needs_teacher
from cskd_jax.training.optimizers import DOT_VERSION

# Entries of config.json other than the configuration have a space in their names: the digests of given checkpoints, the
# fingerprint of the data, "losses.NAME version" for a loss whose formula is not its first, the version of the
# optimizer, and the number of devices, which changes results by rounding.
TEACHER_DIGEST, STUDENT_DIGEST = "teacher.checkpoint digest", "student.checkpoint digest"
DATA_FINGERPRINT = "dataset fingerprint"
DEVICES = "number of devices"
_VERSION = " version"

# Maximum length of the changes in the name of the default folder; longer ones are replaced by a digest.
_NAME_LENGTH = 100

# The key with the number of epochs of each phase.
_EPOCHS = {"teacher": "teacher.epochs", "student": "epochs"}


def identify(config: ml_collections.ConfigDict, digests: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the identity of a run as in config.json, without the fingerprint of the data.

    Args:
      config: Configuration of the run.
      digests: Digests of the given checkpoints by `TEACHER_DIGEST` and `STUDENT_DIGEST`; None if one is not given.
    """
    identity = schema.plain(config)
    identity |= {f"losses.{name}{_VERSION}": LOSSES[name].version for name in config.losses if LOSSES[name].version > 1}
    if config.optimizer.name == "dot":
        identity[f"optimizer.dot{_VERSION}"] = DOT_VERSION
    return identity | {name: digest for name, digest in (digests or {}).items() if digest is not None}


def digests_in(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the digests of the given checkpoints that an identity has recorded."""
    return {name: found.get(name) for name in (TEACHER_DIGEST, STUDENT_DIGEST)}


def default_workdir(recipe: str, config: ml_collections.ConfigDict) -> pathlib.Path:
    """Returns the default folder of a run of a recipe: runs/RECIPE/WORD-seedSEED.

    Changes to the recipe that affect results are appended, so that a trial with one epoch does not get in the way of
    the real run. A larger number of epochs is not appended: it extends the run.

    Args:
      recipe: RECIPE or RECIPE:WORD.
      config: Configuration of the run, which is the recipe with overrides.
    """
    word = networks.run_name(recipe.partition(":")[2] or config.method, config.method)
    plain = pathlib.Path("runs") / recipes.recipe_file(recipe).stem / f"{word}-seed{config.seed}"
    base, values = schema.flatten(recipes.load_recipe(recipe, [])), schema.flatten(config)
    if values["epochs"] > base["epochs"]:
        del values["epochs"]
    named = plain.with_name(plain.name + describe_changes(base, values))
    # Earlier versions used this name whatever the configuration changed.
    return plain if not named.exists() and _holds(plain, config) else named


def describe_changes(base: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """Returns "-KEY=VALUE" for every override that changes results, as part of a file name."""
    in_order = [*(key for key in keys.KEYS if key in values), *(key for key in values if key not in keys.KEYS)]
    passed = {"seed", *keys.indifferent()}
    changed = {key: values[key] for key in in_order if key not in passed and values[key] != base.get(key)}
    text = "".join(f"-{key}={_in_file_name(value)}" for key, value in changed.items())
    return text if len(text) <= _NAME_LENGTH else f"-{_short_digest(text)}"


def _in_file_name(value):
    if isinstance(value, tuple):
        return ",".join(map(_in_file_name, value))
    text = str(value).removesuffix(".0")
    return text if re.fullmatch(r"[A-Za-z0-9._+-]{1,40}", text) else _short_digest(text)


def _short_digest(text):
    # Paths need not be valid UTF-8.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]


def _holds(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> bool:
    """Returns whether the folder holds exactly this run."""
    try:
        found = schema.read_flat(workdir / "config.json")
    except (OSError, UserError):
        return False
    config = schema.with_values(config, kept_values(workdir, config))
    return not _differences(found, identify(config, digests_in(found)))


def kept_values(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns {key: value} where an earlier version did something other than the default, if the run began with it.

    Args:
      workdir: Folder of the run.
      config: Requested configuration; a value that is not the default is left as it is.
    """
    path, requested = workdir / "config.json", schema.flatten(config)
    if not path.is_file() or not _has_checkpoints(workdir):
        return {}
    found = schema.complete(schema.read_flat(path))
    changed = {name: key for name, key in keys.KEYS.items() if key.has_changed}
    return {
        name: key.before
        for name, key in changed.items()
        if requested[name] == key.default and found[name] == key.before
    }


def devices_of(workdir: pathlib.Path) -> int | None:
    """Returns how many devices the run in the workdir computes on; None if nothing in it would be continued."""
    path = workdir / "config.json"
    if not path.is_file() or not _has_checkpoints(workdir):
        return None
    count = schema.read_flat(path).get(DEVICES, 1)  # Earlier versions used one, unless asked for more.
    if not isinstance(count, int) or count < 1:
        raise UserError(f"{path}: {DEVICES} must be a positive integer")
    return count


def check_workdir(workdir: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """Raises UserError if the run in the workdir cannot be read, or cannot be continued as the requested one.

    A run with checkpoints can be continued if nothing that changes its results differs, or if it is to train for more
    epochs. A workdir without checkpoints can be used for any run.

    Args:
      workdir: Folder of the run.
      identity: Result of `identify`, possibly with the fingerprint of the data.
    """
    try:
        found = _recorded(workdir, identity)
    except OSError as error:
        raise UserError(f"cannot read workdir {workdir}: {error.strerror}") from None
    if not _has_checkpoints(workdir):
        return
    different = _differences(found, identity)
    reasons = {key: _reason(workdir, key, found, identity) for key in different}
    if any(reason is not None for reason in reasons.values()):
        texts = [
            f"{shorten(key, 100)} {shorten(repr(old), 100)} != {shorten(repr(new), 100)}{reasons[key] or ''}"
            for key, (old, new) in different.items()
        ]
        raise UserError(
            f"workdir {workdir} holds a run with another configuration ({', '.join(texts)}); use another --workdir"
        )


@contextlib.contextmanager
def held(workdir: pathlib.Path, *written: str, folders: Sequence[str] = FOLDERS) -> Iterator[None]:
    """Holds a workdir for this process.

    Args:
      workdir: Folder of the run. It may be a symbolic link; a link within it is rejected, since a folder from elsewhere
        may contain links to files of the user.
      written: Names of files written into it besides `results.FILES`.
      folders: Names of folders into which files are written.

    Raises:
      UserError: Another process holds it, or something in it is a link, or a folder where a file belongs.
    """
    with locked(workdir / LOCK, f"another job is running in workdir {workdir}"):
        files, inner = ([workdir / name for name in names] for names in ((*FILES, *written), folders))
        refuse_links([*files, *inner])
        refuse_other_kinds(files, inner)
        yield


def is_done(workdir: pathlib.Path, epochs: int) -> bool:
    """Returns whether the run in a workdir has finished this number of epochs.

    Raises:
      UserError: It holds results or checkpoints of something else.
    """
    if not (workdir / RESULTS).exists():
        return False
    _refuse_foreign(workdir)
    return schema.read_flat(workdir / "config.json").get("epochs", epochs) >= epochs


def names_same_data(workdir: pathlib.Path, identity: Mapping[str, Any]) -> bool:
    """Returns whether the run in a workdir found its data in the folders that are named now."""
    found = _recorded(workdir, identity)
    return all(found.get(key) == identity.get(key) for key in ("dataset.path", "dataset.data_dir"))


def check_data(workdir: pathlib.Path, identity: Mapping[str, Any], dataset: ImageDataset) -> None:
    """Raises UserError if the run in a workdir was made with other data."""
    check_workdir(workdir, {**identity, DATA_FINGERPRINT: fingerprint(dataset)})


def claim(workdir: pathlib.Path, identity: Mapping[str, Any], dataset: ImageDataset) -> None:
    """Claims the workdir for a run, and removes the logs of an earlier run without checkpoints.

    If the run is extended to more epochs, its results are removed first, then its network is marked as unfinished, and
    then its configuration is replaced. If the process dies in between, the same command continues.

    Raises:
      UserError: The run in the workdir cannot be continued as the requested one, or its data have changed.
    """
    _refuse_foreign(workdir)
    identity = {**identity, DATA_FINGERPRINT: fingerprint(dataset)}
    check_workdir(workdir, identity)
    if not _has_checkpoints(workdir):
        (workdir / "metrics.jsonl").unlink(missing_ok=True)
    else:
        found = schema.complete(_recorded(workdir, identity))
        for phase, key in _EPOCHS.items():
            if found[key] < identity[key]:
                (workdir / RESULTS).unlink(missing_ok=True)
                mark_unfinished(workdir / phase / FOLDER)
                say(f"{phase}: extended from {found[key]} to {identity[key]} epochs")
    write_json(workdir / "config.json", identity)


def run_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the configuration of the run in `workdir`; raises UserError if there is none."""
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"{workdir} is not the workdir of a run: there is no {path.name} in it")
    return schema.restore({key: value for key, value in schema.read_flat(path).items() if " " not in key}, str(path))


def _has_checkpoints(workdir: pathlib.Path, phase: str = "*") -> bool:
    return any(workdir.glob(f"{phase}/{FOLDER}/*"))


def _refuse_foreign(workdir):
    """Raises UserError if a workdir holds checkpoints or results but no configuration, which a run writes first."""
    path = workdir / "config.json"
    if path.exists():
        return
    if _has_checkpoints(workdir):
        raise UserError(f"workdir {workdir} holds checkpoints that were not made by a recipe; use another --workdir")
    refuse_links([workdir / RESULTS])
    if (workdir / RESULTS).exists():
        raise UserError(f"workdir {workdir} holds {RESULTS} but no {path.name} of its run; use another --workdir")


def _recorded(workdir: pathlib.Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    path = workdir / "config.json"
    return schema.read_flat(path) if path.exists() else dict(identity)


def _differences(found: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (recorded value, requested value)} of all differences that change results."""
    passed, both = {DEVICES, *keys.indifferent()}, found.keys() & identity.keys()
    # The digest identifies the network, whose folder may have moved.
    passed |= {name.removesuffix(" digest") for name in (TEACHER_DIGEST, STUDENT_DIGEST) if name in both}
    passed |= {"teacher.others"} if TEACHER_DIGEST in both else set()
    if DATA_FINGERPRINT not in both:
        passed.add(DATA_FINGERPRINT)  # Older runs have none, and it is not known before the data are loaded.
    old, new = schema.complete(found), schema.complete(identity)
    if not needs_teacher(_losses(new)):
        passed |= {"teacher.checkpoint", "teacher.others"}
    different = {}
    for key in sorted((old.keys() | new.keys()) - passed, key=lambda key: (key != "method", key)):
        missing = 1 if key.endswith(_VERSION) else None
        values = old.get(key, missing), new.get(key, missing)
        # Earlier versions allowed overrides that nothing reads.
        if values[0] != values[1] and (schema.is_read(key, old) or schema.is_read(key, new)):
            different[key] = values
    return different


def _reason(workdir: pathlib.Path, key: str, found: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """Returns why a key may not differ, "" if no reason is needed; None if it may, which extends the run."""
    if key == DATA_FINGERPRINT:
        return ": the data differ in their images, labels, or classes"
    if key.endswith(_VERSION):
        section, _, name = key.removesuffix(_VERSION).partition(".")
        kind = "loss" if section == "losses" else section
        return f": the formula of the {kind} {name} has changed between versions of cskd_jax"
    if key not in _EPOCHS.values():
        return ""
    old, new = schema.complete(found), schema.complete(identity)
    if key == "teacher.epochs":
        if not needs_teacher(_losses(new)) or new.get("teacher.checkpoint") is not None:
            return ""
        if _has_checkpoints(workdir, "student"):
            return f": the student has learned from a teacher trained for {old[key]} epochs"
    if new[key] < old[key]:
        return ": a run can be extended to more epochs, but not cut to fewer"
    why = schema.why_not_extend(old)
    return None if why is None else f": {why}"


def _losses(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    names = {key.split(".")[1] for key in flat if key.startswith("losses.")} & LOSSES.keys()
    return {name: {"teacher": flat.get(f"losses.{name}.teacher")} for name in names}
