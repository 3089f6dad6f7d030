"""The runs of a sweep: every method with every seed, and the runs that train their teachers."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from cskd_jax.configs import networks
from cskd_jax.errors import UserError
from cskd_jax.files import entries_below, refuse_link
from cskd_jax.losses import LOSSES
from cskd_jax.runs import recipes, schema
from cskd_jax.runs.build import load_data
from cskd_jax.runs.keys import network_settings
from cskd_jax.runs.trained import check_given
from cskd_jax.runs.workdir import check_workdir, digests_in, identify, is_done, kept_values
from cskd_jax.training.objective import needs_teacher

# What the names of the folders begin with in which a sweep trains its teachers.
TEACHER_FOLDER = "teacher-"
# Keys and sections that concern the training of one student.
_OF_A_STUDENT = {
    "method",
    "epochs",
    "log_every",
    "keep_checkpoints",
    "save_every_minutes",
    "evaluate_every_epochs",
    "losses",
    "student",
    "optimizer",
    "first_phase",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      sweep: Folder of the sweep.
      name: Name of the run, and of its folder in the folder of the sweep.
      recipe: RECIPE:WORD.
      overrides: Arguments --config.KEY=VALUE.
      teacher: Run that trains the teacher; None if there is none.
    """

    sweep: pathlib.Path
    name: str
    recipe: str
    overrides: tuple[str, ...]
    teacher: "Run | None" = None

    @property
    def workdir(self) -> pathlib.Path:
        """Returns the folder of the run."""
        return self.sweep / self.name

    @property
    def config(self) -> ml_collections.ConfigDict:
        """Returns the configuration of the run, not validated."""
        return recipes.load_recipe(self.recipe, list(self.overrides))

    @property
    def word(self) -> str:
        """Returns the word that follows the recipe."""
        return self.recipe.rpartition(":")[2]

    @functools.cached_property
    def _epochs(self) -> int:
        return self.config.epochs

    @property
    def done(self) -> bool:
        """Returns whether the run has results for its number of epochs."""
        # This is asked again and again, possibly about recipes that do not exist.
        return (self.workdir / "results.json").exists() and is_done(self.workdir, self._epochs)


def make_grid(
    recipe: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    workdir: pathlib.Path,
    overrides: Sequence[str],
    *,
    teacher_seeds: Sequence[int | None] = (None,),
    settings: Mapping[str, Sequence[str]] | None = None,
    label: str = "",
) -> list[Run]:
    """Returns the runs of a sweep, seed by seed, each after the run that trains its teacher.

    Args:
      recipe: Recipe without a word: a file or the name of a packaged recipe.
      methods: Words that follow the recipe.
      seeds: Seeds of the runs.
      workdir: Folder of the sweep.
      overrides: Arguments --config.KEY=VALUE.
      teacher_seeds: Seeds of the teachers, each of which trains all students; None is the seed of the recipe.
      settings: {word: further overrides of its students}, which do not concern the teacher.
      label: Text that follows the method in the names of the runs.

    Raises:
      UserError: A method or an override is unknown, or two runs would have the same folder.
    """
    configs = {word: recipes.load_recipe(f"{recipe}:{word}", []) for word in methods}
    known = {key for config in configs.values() for key in schema.flatten(config)}
    for argument in overrides:
        key = recipes.override_key(argument)
        if key not in known and key != "method":
            raise schema.unknown_key(key, known)
        if not any(concerns(argument, config) for config in configs.values()):
            raise concerns_none(key)
    own = {word: [o for o in overrides if concerns(o, config)] for word, config in configs.items()}
    changed = {word: recipes.load_recipe(f"{recipe}:{word}", own[word]) for word in methods}
    runs = []
    for seed, word, teacher_seed in itertools.product(seeds, methods, teacher_seeds):
        config = changed[word]
        changes = [*own[word], *(settings or {}).get(word, ()), f"--config.seed={seed}"]
        name, teacher = f"{networks.run_name(word, config.method)}{label}", None
        if teacher_seed is not None and config.teacher.checkpoint is not None:
            raise UserError(
                f"--teacher_seeds trains teachers, but teacher.checkpoint is {config.teacher.checkpoint}; give only one"
            )
        if needs_teacher(config.losses) and config.teacher.checkpoint is None and config.teacher.name:
            teacher = _teacher_run(recipe, config, overrides, workdir, teacher_seed)
            # Runs are compared by their configurations, so all of them must name the same path.
            changes.append(f"--config.teacher.checkpoint={teacher.workdir / 'student'}")
            name += "" if teacher_seed is None else f"-teacher{teacher_seed}"
        runs.append(Run(workdir, f"{name}-seed{seed}", f"{recipe}:{word}", tuple(changes), teacher))
    runs = list(dict.fromkeys(runs))  # Runs without a teacher are the same for all teachers.
    if None not in teacher_seeds and all(run.teacher is None for run in runs):
        raise UserError(f"--teacher_seeds trains teachers, but none of {', '.join(methods)} learns from one")
    runs = [*dict.fromkeys(run.teacher for run in runs if run.teacher is not None), *runs]
    _check_names(runs)
    return runs


def _check_names(runs: Sequence[Run]) -> None:
    """Raises UserError if two runs have the same name, such as teachers for which a recipe has different epochs."""
    found: dict[str, Run] = {}
    for run in runs:
        first = found.setdefault(run.name, run)
        if first is not run:
            one, other = schema.flatten(first.config), schema.flatten(run.config)
            keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
            raise UserError(
                f"two runs of this sweep would be stored in {run.workdir}, and they differ in {', '.join(keys)}: give "
                "each its own sweep, with its own --workdir"
            )


def check_overrides(runs: Sequence[Run], overrides: Iterable[str]) -> None:
    """Raises UserError for an override, or a key, that none of the runs of a sweep reads.

    Args:
      runs: Runs of the sweep; those of teachers do not count, because many overrides concern students alone.
      overrides: Arguments --config.KEY=VALUE, or keys.
    """
    teachers = {run.teacher for run in runs}
    students = {(run.recipe, run.overrides): run for run in runs if run not in teachers}
    recipe_of = {run.recipe: schema.flatten(recipes.load_recipe(run.recipe, [])) for run in students.values()}
    pairs = [(recipe_of[run.recipe], schema.flatten(run.config)) for run in students.values()]
    schema.check_read(map(recipes.override_key, overrides), pairs)


def group(runs: Sequence[Run], limit: int | None = None) -> list[tuple[Run, ...]]:
    """Returns the runs in groups that can be trained together, because they see the same batches and the same teacher.

    Args:
      runs: Runs of a sweep.
      limit: Largest number of runs in a group; None for no limit.
    """
    teachers = {run.teacher for run in runs}
    groups: list[list[Run]] = []
    shared: list[tuple[Any, Any]] = []
    for run in runs:
        batches, teacher = _what_decides_batches(run.config)
        for number, members in enumerate(groups):
            fits = shared[number][0] == batches and (teacher is None or shared[number][1] in (None, teacher))
            if fits and len(members) != limit and not {run, *members} & teachers:
                members.append(run)
                shared[number] = batches, teacher or shared[number][1]
                break
        else:
            groups.append([run])
            shared.append((batches, teacher))
    return [tuple(members) for members in groups]


def _what_decides_batches(config: ml_collections.ConfigDict) -> tuple[Any, Any]:
    """Returns what determines the batches of a run, and its teacher or None; both can be compared."""
    flat = schema.flatten(config)
    teacher = {key: value for key, value in flat.items() if key.startswith("teacher.")}
    common = {key for key in flat if key.split(".")[0] not in _OF_A_STUDENT} | {"optimizer.accumulation_steps"}
    batches = {key: value for key, value in flat.items() if key in common and key not in teacher}
    return batches, teacher if needs_teacher(config.losses) else None


def concerns(override: str, config: ml_collections.ConfigDict) -> bool:
    """Returns whether a method has the key: those of a loss or of a first phase only concern methods that have one."""
    key = recipes.override_key(override)
    if key.startswith("first_phase."):
        return bool(schema.with_first_phase(config.losses))
    return not key.startswith("losses.") or key in schema.flatten(config)


def concerns_none(key: str) -> UserError:
    """Returns the error for a known key that concerns none of the methods of a sweep."""
    methods = ", ".join(sorted(schema.with_first_phase(LOSSES)))
    return UserError(f"{key} is only for methods with a first phase, {methods}, and none of them is in the sweep")


def _teacher_run(
    recipe: str,
    config: ml_collections.ConfigDict,
    overrides: Sequence[str],
    workdir: pathlib.Path,
    seed: int | None,
) -> Run:
    """Returns the run that trains the teacher of `config` from labels alone."""
    word = recipes.word_without_teacher(multilabel=any(LOSSES[name].multilabel for name in config.losses))
    teacher = config.teacher
    replaced = ("losses.", "first_phase.", "student.", "teacher.")
    kept = [o for o in overrides if not (recipes.override_key(o) + ".").startswith((*replaced, "epochs."))]
    network = [f"--config.student.name={teacher.name}", f"--config.student.width={teacher.width}"]
    network += [f"--config.student.{key}={value}" for key, value in network_settings(teacher).items()]
    if teacher.learning_rate is not None:
        network.append(f"--config.optimizer.learning_rate={teacher.learning_rate}")
    name = f"{TEACHER_FOLDER}{teacher.name}_{teacher.width:g}"
    if seed is not None:
        network.append(f"--config.seed={seed}")
        name += f"-seed{seed}"
    return Run(workdir, name, f"{recipe}:{word}", (*kept, *network, f"--config.epochs={teacher.epochs}"))


def check(runs: Sequence[Run]) -> None:
    """Raises UserError if a configuration, a given checkpoint or the data are wrong, or a workdir is of another run.

    A teacher that students of the sweep have learned from would be lost to them if it was trained further.
    """
    configs = check_workdirs(runs)
    # This also prepares the data: two runs that start together would get in each other's way.
    for config in {str(config.dataset): config for run, config in configs.items() if not run.done}.values():
        load_data(config)


def check_workdirs(runs: Sequence[Run]) -> dict[Run, ml_collections.ConfigDict]:
    """Raises UserError like `check`, but does not read the data.

    Returns:
      {run: its configuration, with the values that its workdir keeps}.
    """
    configs = {run: run.config for run in runs}
    # The run of a teacher has values of its students under other keys, such as epochs for their teacher.epochs.
    for run in sorted(runs, key=lambda run: run.teacher is None):
        schema.validate(configs[run])
    for run, config in configs.items():
        check_given(config, trained_before=run.teacher is not None)
        name = pathlib.PurePath(run.name)
        for folder in (name, *name.parents[:-1]):
            refuse_link(run.sweep / folder)
        path = run.workdir / "config.json"
        if path.exists():
            config = configs[run] = schema.with_values(config, kept_values(run.workdir, config))
            found = schema.read_flat(path)
            check_workdir(run.workdir, identify(config, digests_in(found)))
            epochs = found.get("epochs", config.epochs)
            if epochs < config.epochs and (student := _student_of(run)) is not None:
                raise UserError(
                    f"the teacher {run.workdir} has been trained for {epochs} epochs, and {student} has learned from "
                    f"it, but now it should be trained for {config.epochs}; repeat the overrides of the first command, "
                    "or use another --workdir"
                )
    return configs


def _student_of(teacher):
    """Returns the name of a run of the sweep, made by this or an earlier command, that has this teacher, or None."""
    paths = (pathlib.Path(entry.path) for entry in entries_below(teacher.sweep) if entry.name == "config.json")
    for path in sorted(paths):
        checkpoint = schema.read_flat(path).get("teacher.checkpoint")
        if isinstance(checkpoint, str) and checkpoint.endswith(f"/{teacher.name}/student"):  # The sweep may have moved.
            return path.parent.relative_to(teacher.sweep).as_posix()
    return None
