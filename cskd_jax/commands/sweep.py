"""Trains several methods with several seeds, all with one teacher, whose outputs all methods of a seed share.

cskd-jax sweep RECIPE --methods=ce,kd,cskd --seeds=0-2 [--pairs=TEACHER/STUDENT,...] [--teacher_seeds=0-2]
               [--grid KEY=VALUE,VALUE ...] [--workdir=DIR] [--together=N] [--jobs=N] [--config.KEY=VALUE ...]

  RECIPE         a packaged recipe such as digits, or a file such as configs/digits.py; --config=RECIPE is the same
  --methods      words that may follow the recipe: methods, several together (kd+at), or networks and a method
                 (R152_0.5/R34_0.25/kd)
  --seeds        seeds of the runs, such as 0,1,2 or 0-2; default: 0
  --pairs        pairs of networks, such as resnet56/resnet20,vgg13/vgg8; each is trained with all methods
  --teacher_seeds  seeds of the teachers, such as 0-2: a teacher is trained with each, and all methods with every
                 teacher
  --grid         values of keys that are tried in all combinations, each with the methods that have the key:
                 --grid losses.kd.weight=0.5,0.9 losses.kd.temperature=2,4. They are compared by the last epoch on a
                 validation split, which --config.dataset.validation_examples=N holds out, with the first of the seeds,
                 in the folder search; search.csv has all scores. The best values are then trained with all seeds on
                 the whole training split, and measured on the test split.
  --workdir      folder of the sweep; default: runs/sweep/RECIPE. A run is in METHOD-seedSEED, with its output in
                 log.txt. The same command continues: finished runs are skipped, interrupted ones resume.
  --together     largest number of runs that are trained together, in one process, with one forward pass of the teacher
                 for each batch; default: all methods of a seed, as far as memory allows. A run has the same results
                 alone and together.
  --jobs         number of processes at the same time; default: 1. If CUDA_VISIBLE_DEVICES lists several GPUs, each
                 process takes one.
  --config.KEY   overrides a key (docs/configuration.md) of every run; config.losses.NAME only of methods that have NAME

The teacher is trained once, with cross-entropy and the seed of the recipe (--config.seed), in teacher-NETWORK, one for
each network that the runs name as teacher; --config.teacher.checkpoint=DIR provides one instead.

A sweep continues when its terminal is closed or its connection is lost. `python -m cskd_jax.sweep` is the same command.

Exit codes: 0 all done; 1 some runs failed, which the summary lists, and the others are done; 2 something to fix in the
command, the configuration or the data; 75 stopped by a signal, with everything saved: the same command resumes.
"""

import collections
import functools
import pathlib
import re

from cskd_jax.commands import command_line
from cskd_jax.commands.arguments import number, seeds
from cskd_jax.commands.streams import outlive_full_disk
from cskd_jax.configs import networks
from cskd_jax.errors import UserError
from cskd_jax.files import local_folder


def main(argv: list[str]) -> int:
    """Parses the command line, runs the grid, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _parse(argv):
    """Returns the values of the flags, and the recipe; raises UserError for what can be seen to be wrong at once."""
    advice = {"teacher": "name it with --config.teacher.name=NETWORK, or several with --pairs=TEACHER/STUDENT,..."}
    parser = command_line.Parser(takes_config=True, advice=advice)
    parser.add_argument("--methods", type=_words)
    parser.add_argument("--seeds", type=seeds, default=[0])
    parser.add_argument("--pairs", type=_words, default=[])
    parser.add_argument("--teacher_seeds", type=functools.partial(seeds, flag="--teacher_seeds"))
    parser.add_argument("--grid", nargs="+", action="extend", default=[])
    parser.add_argument("--workdir", type=local_folder)
    parser.add_argument("--together", type=number(int, 1, 1000))
    parser.add_argument("--jobs", type=number(int, 1, 1000), default=1)
    values = parser.parse(argv)
    recipe = parser.recipe(values)
    if ":" in recipe:
        raise UserError(f"--config={recipe} names a method; a sweep takes its methods from --methods")
    if any(argument.partition("=")[0] == "--config.method" for argument in values.overrides):
        raise UserError("a sweep takes its methods from --methods, such as --methods=ce,kd, not from --config.method")
    if not values.methods or "" in values.methods:
        raise UserError("--methods must name at least one method, such as --methods=ce,kd,cskd")
    _check_each_once("--methods", [networks.in_order(word.lower()) for word in values.methods])
    _check_each_once("--seeds", values.seeds)
    _check_each_once("--teacher_seeds", values.teacher_seeds or [])
    for pair in values.pairs:
        if not re.fullmatch("[^/]+/[^/]+", pair):
            raise UserError(f"--pairs is {pair or 'empty'}; it must list TEACHER/STUDENT, such as resnet56/resnet20")
    _check_each_once("--pairs", [pair.lower() for pair in values.pairs])
    return values, recipe


def _run(argv):
    values, recipe = _parse(argv)
    from cskd_jax import console
    from cskd_jax.runs import recipes

    file = recipes.recipe_file(recipe)
    words = [f"{pair}/{method}" for pair in values.pairs for method in values.methods] or values.methods
    for word in words:
        recipes.read_recipe(f"{file}:{word}")
    outlive_full_disk()
    console.start()
    # Imported late, so that mistakes in the command are reported at once.
    from cskd_jax.runs import search
    from cskd_jax.runs.grid import check, check_overrides, check_workdirs, group, make_grid
    from cskd_jax.runs.lock import locked
    from cskd_jax.runs.sweep import FailedRunsError, sweep

    workdir = values.workdir or pathlib.Path("runs") / "sweep" / file.stem
    grid = search.parse(values.grid)
    # After a search, the methods learn from the whole training split.
    overrides = search.without_validation(values.overrides) if grid else values.overrides
    common = {"seeds": values.seeds, "workdir": workdir, "overrides": overrides}
    make = functools.partial(make_grid, str(file), teacher_seeds=values.teacher_seeds or (None,), **common)
    runs = make(words)  # Also where a search comes first, since this finds mistakes in the overrides.
    trials = search.make_trials(str(file), words, values.seeds[0], workdir, values.overrides, grid) if grid else []
    searched = {trial.word for trial in trials}
    others = [run for run in runs if run.word not in searched]
    check_overrides([*search.runs_of(trials), *others], [*values.overrides, *grid])
    if grid:
        check(search.runs_of(trials))
        check_workdirs(others)
        search.check_outcomes(trials, make)
    else:
        check(runs)
    with locked(workdir / "sweep.lock", f"another sweep is running in {workdir}"):
        failure = None
        if grid:
            try:
                sweep(group(search.runs_of(trials), values.together), values.jobs)
            except FailedRunsError as error:
                failure = error
            best = search.choose(trials, workdir)
            if failure is not None and best.keys() != searched:
                raise failure
            runs = make(words, settings={word: search.as_overrides(changes) for word, changes in best.items()})
            check(runs)
        sweep(group(runs, values.together), values.jobs)
        if failure is not None:  # A value may diverge, and another be chosen.
            raise failure


def _words(text):
    return [word.strip() for word in text.split(",")]


def _check_each_once(name, values):
    if len(set(values)) < len(values):
        raise UserError(f"{name} lists {collections.Counter(values).most_common(1)[0][0]} twice")
