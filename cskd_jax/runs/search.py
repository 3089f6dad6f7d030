"""A search for the settings of a sweep's methods: its runs, and the settings that are best on the validation split."""

import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections

from cskd_jax.console import say
from cskd_jax.errors import UserError
from cskd_jax.files import csv_text, write_text
from cskd_jax.runs import recipes, schema
from cskd_jax.runs.grid import Run, check_workdirs, concerns, concerns_none, make_grid
from cskd_jax.runs.keys import indifferent
from cskd_jax.runs.results import RESULTS, read_validation
from cskd_jax.runs.workdir import describe_changes
from cskd_jax.training import rules
from cskd_jax.training.metrics import task_that_measured

FOLDER, TABLE = "search", "search.csv"
_VALIDATION = "dataset.validation_examples"
# Sections and keys whose values do not belong to one method: teacher, data and seed are common to all methods.
_COMMON = ("teacher.", "dataset.", "seed.", "method.")


class Trial(NamedTuple):
    """A run of a search.

    Attributes:
      word: Word of the method, with its networks if they are named.
      values: {key: its value as a string}.
      run: The run, whose results have the scores of the validation split.
    """

    word: str
    values: Mapping[str, str]
    run: Run


def parse(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Returns {key: its values as strings} from arguments KEY=VALUE,VALUE.

    Raises:
      UserError: An argument is not of this form, names a key twice, or names a key that is common to all methods.
    """
    grid: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.lstrip("-").removeprefix("config.")
        # A comma within parentheses belongs to a value, as in optimizer.milestones=(10,20),(15,25).
        values = re.findall(r"(?:\([^()]*\)|[^,()])+", text)
        if not equals or not key or not values or ",".join(values) != text:
            raise UserError(f"--grid takes KEY=VALUE,VALUE, such as losses.kd.weight=0.5,0.9; got {argument}")
        if f"{key}.".startswith(_COMMON):
            raise UserError(
                f"--grid cannot vary {key}: it varies settings of methods; --seeds and --methods set the others"
            )
        if key in indifferent():
            raise UserError(f"--grid cannot vary {key}, which does not change results")
        found = schema.find_key(key)
        read = values if found is None else [rules.parse(key, value, found.rule) for value in values]
        if key in grid or any(value in read[:number] for number, value in enumerate(read)):
            raise UserError(f"--grid lists {key} twice" if key in grid else f"--grid lists a value of {key} twice")
        grid[key] = values
    return grid


def make_trials(
    recipe: str,
    words: Sequence[str],
    seed: int,
    workdir: pathlib.Path,
    overrides: Sequence[str],
    grid: Mapping[str, Sequence[str]],
) -> list[Trial]:
    """Returns the runs of a search: each method with every combination of values for the grid keys that it has.

    A teacher that is trained for the search does not learn from the validation split either.

    Args:
      recipe: Recipe without a word.
      words: Words that follow the recipe.
      seed: Seed of all runs.
      workdir: Folder of the sweep, in which the search has its own folder.
      overrides: Arguments --config.KEY=VALUE.
      grid: {key: its values as strings}.

    Raises:
      UserError: No method has a key of the grid, or there is no validation split.
    """
    trials, found = [], set()
    for word in words:
        plain = recipes.load_recipe(f"{recipe}:{word}", [])
        own = [override for override in overrides if _has(plain, override)]
        base = recipes.load_recipe(f"{recipe}:{word}", own)
        if base.dataset.validation_examples is None:
            raise UserError(f"--grid compares values on a validation split: add --config.{_VALIDATION}=N")
        keys = [key for key in grid if _has(plain, key)]
        found.update(keys)
        for values in itertools.product(*(grid[key] for key in keys)) if keys else ():
            changes = dict(zip(keys, values, strict=True))
            settings = as_overrides(changes)
            config = recipes.override(base.copy_and_resolve_references(), settings)
            label = describe_changes(schema.flatten(base), schema.flatten(config))
            runs = make_grid(recipe, [word], [seed], workdir / FOLDER, own, settings={word: settings}, label=label)
            trials.append(Trial(word, changes, runs[-1]))
    for key in grid.keys() - found:
        known = {k for word in words for k in schema.flatten(recipes.load_recipe(f"{recipe}:{word}", []))}
        raise concerns_none(key) if key in known else schema.unknown_key(key, known)
    return trials


def as_overrides(values: Mapping[str, str]) -> list[str]:
    """Returns values as arguments --config.KEY=VALUE."""
    return [f"--config.{key}={value}" for key, value in values.items()]


def without_validation(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides of the runs that follow a search, which learn from the whole training split."""
    return [*overrides, f"--config.{_VALIDATION}=None"]


def runs_of(trials: Sequence[Trial]) -> list[Run]:
    """Returns the runs of a search, the teachers first."""
    runs = [trial.run for trial in trials]
    return list(dict.fromkeys([*(run.teacher for run in runs if run.teacher is not None), *runs]))


def check_outcomes(trials: Sequence[Trial], make: Callable[..., list[Run]]) -> None:
    """Raises UserError if the folders of the runs that follow a search would be refused whatever it chooses.

    Args:
      trials: Runs of the search.
      make: Function from words, and from the `settings` of `make_grid`, to the runs that follow from them.
    """
    outcomes: dict[str, list[list[str]]] = {}
    for trial in trials:
        outcomes.setdefault(trial.word, []).append(as_overrides(trial.values))
    for word, choices in outcomes.items():
        refusals = []
        for settings in choices:
            try:
                check_workdirs(make([word], settings={word: settings}))
            except UserError as refusal:
                refusals.append(refusal)
        if len(refusals) == len(choices):
            raise refusals[0]


def choose(trials: Sequence[Trial], workdir: pathlib.Path) -> dict[str, Mapping[str, str]]:
    """Returns {word: its best values}, judged by the validation split after the last epoch, and writes a table of all.

    Args:
      trials: Runs of the search. Among equal scores, the first wins; runs that failed are not chosen, so a word without
        a run that is done is missing.
      workdir: Folder of the sweep, which gets search.csv.
    """
    done = [trial for trial in trials if (trial.run.workdir / RESULTS).exists()]
    scores = {trial.run: _score(trial.run) for trial in done}
    best = {}
    for trial in done:
        if trial.word not in best or scores[trial.run][1] > scores[best[trial.word].run][1]:
            best[trial.word] = trial
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    rows: list[list[Any]] = [["word", *keys, "metric", "validation_last", "chosen", "folder"]]
    for trial in trials:
        name, score = scores.get(trial.run, ("failed", ""))
        chosen = "yes" if best.get(trial.word) is trial else ""
        values = [trial.values.get(key, "") for key in keys]
        rows.append([trial.word, *values, name, score, chosen, str(trial.run.workdir.relative_to(workdir))])
    write_text(workdir / TABLE, csv_text(rows))
    for word, trial in best.items():
        name, score = scores[trial.run]
        values = ", ".join(f"{key}={value}" for key, value in trial.values.items())
        count = sum(other.word == word for other in trials)
        say(f"{word}: {values} is the best of {count} on the validation split, {name} {score:.4f}")
    say(f"all results of the search: {workdir / TABLE}")
    return {word: trial.values for word, trial in best.items()}


def _score(run: Run) -> tuple[str, float]:
    """Returns the name of the score and the score of a run on the validation split after the last epoch."""
    values = read_validation(run.workdir / RESULTS)
    task = task_that_measured(values)
    return task.names[task.score], float(values[task.score])


def _has(config: ml_collections.ConfigDict, override: str) -> bool:
    """Returns whether the configuration of a method has the key of an override, or a key."""
    return concerns(override, config) and recipes.override_key(override) in {*schema.flatten(config), "method"}
