"""A run: a teacher phase (unless a checkpoint is given), a student phase, and the results."""

import importlib.metadata
import json
import pathlib
import platform
import time
from typing import Any

import ml_collections

from cskd_jax import config as config_lib
from cskd_jax import parallel
from cskd_jax.checkpoint import load_variables
from cskd_jax.data import ImageDataset, load_dataset
from cskd_jax.errors import UserError
from cskd_jax.logging import say, write_json
from cskd_jax.loop import Evaluation, Network, Phase, Progress
from cskd_jax.models import count_parameters
from cskd_jax.objective import Objective
from cskd_jax.signals import StopRequest

# Packages whose versions decide the numbers.
_PACKAGES = ("cskd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Runs `config` in `workdir` to the end, from wherever an earlier start left it.

    Raises:
      UserError: what the user can mend; InterruptedRun and DivergedError among them.
    """
    config_lib.validate(config)
    parallel.check_batch_size("batch_size", config.batch_size)
    claim(workdir, config)
    results_path = workdir / "results.json"
    if results_path.exists():
        say(f"already done: {results_path}")
        return
    start = time.time()
    dataset = load_dataset(
        config.dataset.name,
        data_dir=config.dataset.data_dir,
        path=config.dataset.path,
        train_examples=config.dataset.train_examples,
    )
    check_channels(config, dataset)
    devices = parallel.describe_devices()
    say(
        f"{dataset.name}: {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images, "
        f"{dataset.num_classes} categories; {devices['count']} x {devices['kind']}; workdir {workdir}"
    )
    student = Network.create(config.student, dataset.num_classes, config.dtype)
    teacher = teacher_variables = teacher_result = None
    if needs_teacher(config):
        teacher = Network.create(config.teacher, dataset.num_classes, config.dtype)
    # Made before the teacher trains: what does not fit in the student's phase should not show hours later.
    phase = Phase("student", config, student, config.losses, config.epochs, dataset, workdir, teacher)
    with StopRequest() as stop:
        if teacher is not None:
            teacher_variables, teacher_result = make_teacher(teacher, config, dataset, workdir, stop)
        variables, progress = phase.run(stop, teacher_variables)
    results = {
        "method": config.method,
        "seed": config.seed,
        "teacher": teacher_result,
        "student": describe(student, variables, progress),
        "dataset": {
            "name": dataset.name,
            "categories": dataset.num_classes,
            "train_examples": len(dataset.train.labels),
            "test_examples": len(dataset.test.labels),
        },
        "devices": devices,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _PACKAGES},
        "config": config_lib.plain(config),
    }
    write_json(results_path, results)
    say_results(results, results_path, time.time() - start)


def needs_teacher(config: ml_collections.ConfigDict) -> bool:
    """Whether any of the losses reads a teacher."""
    return Objective.create(config.losses, num_classes=1).needs_teacher


def make_teacher(
    network: Network, config: ml_collections.ConfigDict, dataset: ImageDataset, workdir: pathlib.Path, stop: StopRequest
) -> tuple[Any, dict[str, Any]]:
    """Trains the teacher with cross-entropy and the student's recipe, or takes it from its checkpoint.

    Returns:
      Its variables on every device, and its entry in results.json.
    """
    if config.teacher.checkpoint is None:
        losses = {"cross_entropy": {"weight": 1.0}}
        phase = Phase("teacher", config, network, losses, config.teacher.epochs, dataset, workdir)
        variables, progress = phase.run(stop)
        return parallel.replicate(variables), describe(network, variables, progress)
    path = config.teacher.checkpoint
    variables, record = load_variables(path)
    if record["network"] != network.identity:
        raise UserError(
            f"teacher.checkpoint {path} holds {record['network']}, the configuration asks for {network.identity}"
        )
    variables = parallel.replicate(variables)
    values = Evaluation(network, config, dataset)(variables)
    say(
        f"teacher: {network.name}, width {network.width:g}, from {path}, top-1 {values['top1']:.4f}, "
        f"top-5 {values['top5']:.4f}"
    )
    return variables, describe(network, variables, Progress({"last": values})) | {"checkpoint": path}


def describe(network: Network, variables: Any, progress: Progress) -> dict[str, Any]:
    """The entry of a network in results.json."""
    return {
        "model": network.name,
        "width": network.width,
        "parameters": count_parameters(variables["params"]),
        **progress.evaluations,
        "images_per_second": progress.images_per_second,
    }


def say_results(results: dict[str, Any], path: pathlib.Path, seconds: float) -> None:
    """Prints the end of a run."""
    for name in ("teacher", "student"):
        if results[name] is not None:
            entry = results[name]
            best = entry.get("best")
            best = f" (best {best['top1']:.4f}, epoch {best['epoch']}, chosen on the test split)" if best else ""
            size = f"{entry['model']}, width {entry['width']:g}, {entry['parameters']:,} parameters"
            say(f"{name}: {size}, last top-1 {entry['last']['top1']:.4f}{best}")
    say(f"done in {seconds:.0f} s: {path}")


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Makes the workdir this configuration's; raises UserError if it is another's."""
    path = workdir / "config.json"
    wanted = config_lib.plain(config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, wanted)
            return
    except OSError as error:
        raise UserError(f"cannot write to workdir {workdir}: {error.strerror}") from None
    found = json.loads(path.read_text())
    different = [
        f"{key} {found.get(key)!r} != {wanted.get(key)!r}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if different:
        raise UserError(
            f"workdir {workdir} holds a run of another configuration ({', '.join(different)}); use another --workdir"
        )


def check_channels(config: ml_collections.ConfigDict, dataset: ImageDataset) -> None:
    """Raises UserError unless mean and deviation are per channel of the images, or one for all."""
    channels = dataset.image_shape[-1]
    if len(config.dataset.mean) not in (1, channels):
        raise UserError(
            f"dataset.mean has {len(config.dataset.mean)} values, the images of {dataset.name} have {channels} channels"
        )
