"""The runs of a sweep."""

import dataclasses
import pathlib
from collections.abc import Sequence

import ml_collections

from cskd_jax.files import refuse_link
from cskd_jax.losses import LOSSES
from cskd_jax.runs import recipes, schema
from cskd_jax.runs.build import load_data
from cskd_jax.runs.workdir import TEACHER_DIGEST, check_workdir, read_json
from cskd_jax.training.objective import needs_teacher

_SUPERVISED = {False: "ce", True: "bce"}  # the word of a teacher's training, of one category per image or of several


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
      sweep: folder of the sweep.
      name: of the run, and of its folder in that of the sweep.
      recipe: FILE:WORD.
      overrides: arguments --config.KEY=VALUE.
      teacher: the run that trains the teacher, or None.
    """

    sweep: pathlib.Path
    name: str
    recipe: str
    overrides: tuple[str, ...]
    teacher: "Run | None" = None

    @property
    def workdir(self) -> pathlib.Path:
        """Folder of the run."""
        return self.sweep / self.name

    @property
    def arguments(self) -> list[str]:
        """Of `cskd_jax.main`."""
        return [f"--config={self.recipe}", *self.overrides, f"--workdir={self.workdir}"]

    @property
    def config(self) -> ml_collections.ConfigDict:
        """Of the run, not validated."""
        return recipes.load_recipe(self.recipe, list(self.overrides))

    @property
    def done(self) -> bool:
        """Whether it has results."""
        return (self.workdir / "results.json").exists()


def make_grid(
    file: str, methods: Sequence[str], seeds: Sequence[int], workdir: pathlib.Path, overrides: Sequence[str]
) -> list[Run]:
    """The runs of a grid, seed by seed, each after the one that trains its teacher.

    Args:
      file: recipe without a word.
      methods: words behind it.
      seeds: of the runs.
      workdir: of the sweep.
      overrides: arguments --config.KEY=VALUE.

    Raises:
      UserError: a method or an override is unknown.
    """
    configs = {word: recipes.load_recipe(f"{file}:{word}", []) for word in methods}
    known = {key for config in configs.values() for key in schema.flatten(config)}
    for argument in overrides:
        key = recipes.override_key(argument)
        if key not in known and key != "method":
            raise schema.unknown_key(key, known)
    own = {word: [o for o in overrides if _concerns(o, config)] for word, config in configs.items()}
    teachers: dict[str, Run] = {}
    runs = []
    for seed in seeds:
        for word in methods:
            config = recipes.load_recipe(f"{file}:{word}", own[word])
            settings, teacher = [*own[word], f"--config.seed={seed}"], None
            if needs_teacher(config.losses) and config.teacher.checkpoint is None and config.teacher.name:
                teacher = _teacher_run(file, config, overrides, workdir)
                # In the runs' configurations, and with it in what they may be compared by, stands the same path.
                settings.append(f"--config.teacher.checkpoint={teacher.workdir / 'student'}")
                teachers.setdefault(teacher.name, teacher)
            runs.append(Run(workdir, f"{word}-seed{seed}", f"{file}:{word}", tuple(settings), teacher))
    return [*teachers.values(), *runs]


def _concerns(override, config):
    """Whether a method has the key: overrides of losses are for those that have the loss."""
    key = recipes.override_key(override)
    return not key.startswith("losses.") or key in schema.flatten(config)


def _teacher_run(file, config, overrides, workdir):
    """The run that trains the teacher of `config`: as any network is trained from labels alone."""
    word = _SUPERVISED[any(LOSSES[name].multilabel for name in config.losses)]
    teacher = config.teacher
    replaced = ("losses.", "student.", "teacher.")
    kept = [o for o in overrides if not (recipes.override_key(o) + ".").startswith((*replaced, "epochs."))]
    network = [f"--config.student.name={teacher.name}", f"--config.student.width={teacher.width}"]
    name = f"teacher-{teacher.name}_{teacher.width:g}"
    return Run(workdir, name, f"{file}:{word}", (*kept, *network, f"--config.epochs={teacher.epochs}"))


def check(runs: Sequence[Run]) -> None:
    """Raises UserError if a configuration or the data are wrong, or a workdir holds another run or is a link."""
    data = {}
    for run in runs:
        config = run.config
        schema.validate(config)
        if run.teacher is None:
            schema.check_teacher_exists(config)
        name = pathlib.PurePath(run.name)
        for folder in (name, *name.parents[:-1]):
            refuse_link(run.sweep / folder)
        path = run.workdir / "config.json"
        if path.exists():
            identity, digest = schema.plain(config), read_json(path).get(TEACHER_DIGEST)
            check_workdir(run.workdir, identity if digest is None else identity | {TEACHER_DIGEST: digest})
        if not run.done:
            data[str(config.dataset)] = config
    # Also prepares them: two runs that start together would get into each other's way.
    for config in data.values():
        load_data(config)
