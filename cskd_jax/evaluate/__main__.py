"""Measures trained networks: test scores, overall and by class, number of parameters, FLOPs, and latency.

cskd-jax evaluate DIR [--embedding] [--best] [--config=RECIPE] [--config.KEY=VALUE ...]

  DIR            folder of a run: its student, and its teacher if it has trained one; or folder of one network, such as
                 WORKDIR/student. --workdir=DIR and --checkpoint=DIR name one or the other.
  --embedding    also says how well nearest neighbors and a linear probe tell the classes apart in the embedding
  --best         measures the networks as they were after their best epochs, not after the last ones
  --config       recipe; needed only for a network that is not in a workdir
  --config.KEY   overrides a key of the run's configuration, such as --config.dataset.data_dir=DIR

Prints a table and writes it to evaluation.json in DIR.
`python -m cskd_jax.evaluate` is the same command.

Exit codes: 0 done; 2 something to fix in the command, the configuration or the data.
"""

from cskd_jax.commands import command_line
from cskd_jax.commands.arguments import one_folder
from cskd_jax.errors import UserError


def main(argv: list[str]) -> int:
    """Parses the command line, evaluates, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    parser = command_line.Parser(takes_config=True)
    parser.add_argument("--workdir")
    parser.add_argument("--checkpoint")
    parser.add_argument("--embedding", action="store_true")
    parser.add_argument("--best", action="store_true")
    values = parser.parse(argv)
    folder = one_folder(values, "workdir", "checkpoint", example="cskd-jax evaluate runs/digits/kd-seed0")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    from cskd_jax import console

    console.start()
    # Imported late: mistakes in the command should not wait for everything.
    from cskd_jax.console import say
    from cskd_jax.distributed.devices import Devices
    from cskd_jax.evaluate.measure import evaluate_all, tables
    from cskd_jax.files import write_json
    from cskd_jax.runs.build import load_data, load_data_of_run, load_trained, precision
    from cskd_jax.runs.recipes import override_key
    from cskd_jax.training.checkpoint import FOLDER
    from cskd_jax.training.metrics import task_of

    is_network = values.checkpoint is not None or (values.workdir is None and (folder / FOLDER).is_dir())
    folders = [folder] if is_network else _networks(folder, FOLDER)
    config = _config(folder, folder.absolute().parent if is_network else folder, values)
    command_line.set_up_jax()
    devices = Devices()
    devices.check_batch_size("batch_size", config.batch_size)
    named = values.config or any(override_key(text) == "dataset.data_dir" for text in values.overrides)
    dataset = load_data(config) if named else load_data_of_run(config)
    networks = {path.resolve().name: load_trained(path, config, dataset, best=values.best) for path in folders}
    with precision(config):
        evaluation = evaluate_all(networks, config, dataset, devices, values.embedding)
    say(tables(evaluation, task_of(dataset.multilabel).names))
    write_json(folder / "evaluation.json", evaluation)
    say(f"written: {folder / 'evaluation.json'}")


def _config(folder, workdir, values):
    """Returns the configuration of the recipe if one is given, or else of the run."""
    from cskd_jax.runs import recipes, schema
    from cskd_jax.runs.results import refuse_distillation
    from cskd_jax.runs.workdir import run_config

    if values.config:
        config = recipes.load_recipe(values.config, values.overrides)
    elif not (workdir / "config.json").is_file():
        refuse_distillation(workdir)
        raise UserError(_no_config(folder, workdir, recipes.packaged_recipes()))
    else:
        config = recipes.override(run_config(workdir), values.overrides)
    schema.validate(config)
    return config


def _no_config(folder, workdir, known):
    """Returns the message that a recipe is needed, and which one if a known recipe has the data of an import."""
    from cskd_jax.runs.imports import IMPORT, read_origin

    origin = read_origin(folder)
    if origin is None:
        beside = "" if workdir == folder else f" in {workdir}"
        return f"{folder} belongs to no run: there is no config.json{beside}; name the recipe with --config=RECIPE"
    example = f", such as --config={origin['dataset']}" if origin.get("dataset") in known else ""
    return f"{folder} holds an imported network ({IMPORT}), not a run: name the recipe with --config=RECIPE{example}"


def _networks(workdir, checkpoints):
    folders = [workdir / name for name in ("teacher", "student") if (workdir / name / checkpoints).is_dir()]
    if not folders:
        raise UserError(f"{workdir} holds no checkpoints of a teacher or a student")
    return folders


if __name__ == "__main__":
    command_line.start(main)
