"""Distillation of objects: `distill` trains any network on arrays, with the losses of this package or custom ones."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from cskd_jax.data import ImageDataset
from cskd_jax.data.arrays import channels_first, from_arrays, make_split
from cskd_jax.data.augment import Normalize
from cskd_jax.data.batches import EpochBatches
from cskd_jax.data.fingerprint import fingerprint
from cskd_jax.data.samplers import UniformSampler
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import UserError
from cskd_jax.files import local_folder, write_json
from cskd_jax.inputs import is_count, read_json
from cskd_jax.losses import Method
from cskd_jax.runs.lock import LOCK
from cskd_jax.runs.results import DISTILLATION, FILES, RESULTS, describe_result, write_finite
from cskd_jax.runs.workdir import held
from cskd_jax.training.adapters import as_network
from cskd_jax.training.arrays import digest_of
from cskd_jax.training.callbacks import Callback
from cskd_jax.training.checkpoint import FOLDER, mark_unfinished
from cskd_jax.training.mixing import Mix
from cskd_jax.training.objective import as_settings
from cskd_jax.training.phases import Phase
from cskd_jax.training.teachers import Combine, Teacher, variables_of
from cskd_jax.training.trainer import Student, Trainer

_STUDENT = "student"


def distill(
    student: Any = None,
    *,
    students: Mapping[str, Student] | None = None,
    losses: Mapping[str, Any] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    trainable: Callable[[tuple[str, ...]], bool] | None = None,
    train: tuple[np.ndarray, np.ndarray] | Callable[[int], Iterable[tuple[np.ndarray, np.ndarray]]],
    test: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | None = None,
    steps_per_epoch: int | None = None,
    teacher: Any = None,
    teacher_variables: Mapping[str, Any] | None = None,
    combine_teachers: Combine = "logits",
    student_variables: Mapping[str, Any] | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    drop_last: bool = False,
    seed: int = 0,
    schedule: Callable[[Any], Any] | None = None,
    ema: float | None = None,
    accumulation_steps: int = 1,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    teacher_mean: float | Sequence[float] | None = None,
    teacher_std: float | Sequence[float] | None = None,
    augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    mix: Mix | None = None,
    categories: Sequence[str] | None = None,
    student_features: Sequence[str] = (),
    teacher_features: Sequence[str] = (),
    student_embedding: str | None = None,
    teacher_embedding: str | None = None,
    student_head: str | None = None,
    teacher_head: str | None = None,
    callbacks: Sequence[Callback] | None = None,
    workdir: str | pathlib.Path | None = None,
    devices: int | Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    log_every: int = 50,
    evaluate_every_epochs: int = 1,
) -> Any:
    """Trains a student, with the help of a teacher if its losses read one; or several students at once.

    Args:
      student: Linen module, with any variable collections and any random streams; or an nnx module, from whose weights
        training starts; or a function `(variables, images, train, rngs) -> (outputs, updates)` (see
        `training.adapters`). It is called with images [B, H, W, C], and returns logits [B, K], a dictionary with
        "logits" and other fields of `ModelOutput`, or a `ModelOutput`. Training mode of a linen module is selected by
        its argument `train`, `training`, `is_training` or `deterministic`, if it has one of them.
      students: In place of one student: {name: `Student`}, each with its own network, losses and optimizer. They see
        the same batches, each of which passes through the teacher only once; every student ends exactly as if it had
        been trained alone.
      losses: {name: weight, or settings with a "weight" (1 if left out), or a custom loss}; see
        `training.objective.Objective`.
      optimizer: Optimizer, such as `optax.adamw(1e-3)`. Masks and labels that are given to optax see the tree
        {"network": parameters of the network, "losses": {name: parameters of the loss}}.
      trainable: Function of the path of a parameter of the network, such as ("encoder", "Conv_0", "kernel"), that
        returns whether it is trained; None trains all.
      train: Images [N, H, W, C] and labels: int [N]; 0 and 1 [N, K] if an image has any number of classes; or None for
        losses that read none. uint8 images are divided by 255 and normalized by `mean` and `std`; floats are used
        unchanged. Or a function from an epoch number, counted from 0, to an iterable of such batches, such as a data
        loader; see `data.batches.EpochBatches`.
      test: Images and labels of the test split, all of which are evaluated after every epoch, or at the end if there is
        a `validation`.
      validation: Images and labels of the validation split, which then chooses the best epoch; the test split is
        measured for that and the last epoch.
      steps_per_epoch: Number of batches in an epoch, if `train` is a function; None counts the batches of epoch 0.
      teacher: Network of any kind that `student` allows; None if no loss reads a teacher. Or a `Teacher`, with
        variables, a normalization and an image size, or a list of them, each with a weight; a loss then reads their
        combination, or the one that its setting "teacher" names.
      teacher_variables: Variables of the teacher, such as {"params": ..., "batch_stats": ...}; None for those of an nnx
        module.
      combine_teachers: What is averaged over several teachers, "logits" or "probabilities"; see `teachers.Ensemble`.
      student_variables: Variables that the student starts from (fine-tuning); None for fresh ones, or for those of an
        nnx module.
      epochs: Number of epochs.
      batch_size: Number of images in a batch, over all devices; not read if `train` is a function.
      drop_last: Whether the last, smaller batch of an epoch is left out; not read if `train` is a function.
      seed: Seed of the weights, the order of the images, the augmentation and dropout.
      schedule: Learning rate as a function of the number of updates, for the log; it is already part of the optimizer.
      ema: Decay of an exponential moving average of the variables of the student, which is then evaluated and returned;
        None keeps none.
      accumulation_steps: Number of micro-batches that a batch is divided into, to save memory. An update sees all
        `batch_size` images; batch normalization, and losses that relate images to each other, see micro-batches.
      mean: Mean of the pixels in [0, 1], per channel or one for all. It needs uint8 images.
      std: Standard deviation of the pixels in [0, 1], per channel or one for all. It needs uint8 images.
      teacher_mean: Mean of the normalization that the teacher was trained with; None for that of the student. It needs
        uint8 images.
      teacher_std: Standard deviation of that normalization; None for that of the student. It needs uint8 images.
      augment: Function of images [B, H, W, C] as they are in `train`, a key, and the positions of the images in the
        global batch, int [B], with which each image can get random numbers of its own. It returns images of the same
        shape and dtype, before `mean` and `std` are applied.
      mix: Function that mixes the images of a batch with each other, such as `cskd_jax.Mix(mixup=0.2)`; None leaves
        them unchanged.
      categories: Names of the classes by label; "0", "1", ... by default.
      student_features: Paths of submodules of the student whose outputs are its features, first stage first, for
        losses that read features, such as ("Conv_1", "Block_3/Conv_0").
      teacher_features: Paths of submodules of the teacher, as in `student_features`.
      student_embedding: Path of the submodule of the student whose output is its embedding.
      teacher_embedding: Path of the submodule of the teacher whose output is its embedding.
      student_head: Path, within the parameters of the student, of its classifier, a linear layer on the pooled last
        map, for losses that read it; None for "classifier".
      teacher_head: Path, within the parameters of the teacher, of its classifier, as in `student_head`.
      callbacks: Callbacks; by default `Console`: a progress bar on a terminal, a line for every epoch. () is quiet.
        Each of several students gets copies of its own, which share the objects that the callbacks hold, such as lists.
      workdir: Folder of checkpoints and logs, in which the same call resumes, also after SIGTERM or Ctrl-C, which save
        before they do what they usually do; None writes nothing.
      devices: Devices to compute on, or how many of them; None for all.
      log_every: Number of steps between two rows of the history.
      evaluate_every_epochs: Number of epochs from one evaluation to the next; the last epoch is always evaluated.

    Returns:
      A `Result`: the variables of the student, its metrics such as `metrics["test"]["top1"]`, and the history. For
      several students, {name: `Result`}.

    Raises:
      UserError: Something does not fit together; the message says what.
      TypeError: A network is not a module, a function or a `Network`, or paths are given for one that is not linen.
      DivergedError: A loss or gradient is not finite. With several students, the others are trained to the end first,
        and `results` of the error holds their results.
    """
    _check_kinds(student_features=student_features, teacher_features=teacher_features, callbacks=callbacks, mix=mix)
    several = students is not None
    paths = student_features, student_embedding, student_head
    students = _as_students(students, student, student_variables, paths, losses, optimizer, schedule, ema)
    given = _make_batches(train, steps_per_epoch)
    arrays: Any = train if given is None else given.first
    data = from_arrays(arrays, test, categories, validation)
    if given is not None:
        given.num_classes = data.num_classes
    sampler = given or UniformSampler(len(data.train.labels), batch_size, seed, drop_last)
    normalize, own = _make_normalizations(data, mean, std, teacher_mean, teacher_std)
    teacher_paths = teacher_features, teacher_embedding, teacher_head
    teachers = _as_teachers(teacher, teacher_variables, teacher_paths, None if own.is_same(normalize) else own)
    workdir = None if workdir is None else local_folder(workdir)
    with (
        contextlib.nullcontext() if workdir is None else held(workdir, DISTILLATION, folders=("tensorboard", *students))
    ):
        trainer = Trainer(
            students,
            teachers,
            data=data,
            phases=[Phase(epochs, trainable=trainable)],
            seed=seed,
            sampler=sampler,
            normalize=normalize if data.image_dtype == np.uint8 else None,
            augment=augment,
            callbacks=callbacks,
            workdir=workdir,
            devices=devices,
            log_every=log_every,
            evaluate_every_epochs=evaluate_every_epochs,
            accumulation_steps=accumulation_steps,
            combine_teachers=combine_teachers,
            mix=mix,
        )
        warning = channels_first(data)
        if warning:
            trainer.say(warning)
        if workdir is not None:
            settings = {"epochs": int(epochs), "batch_size": int(sampler.batch_size), "drop_last": drop_last}
            # A setting that is off is not written, because earlier versions did not have it.
            settings |= {} if accumulation_steps == 1 else {"accumulation_steps": int(accumulation_steps)}
            settings |= {} if evaluate_every_epochs == 1 else {"evaluate_every_epochs": int(evaluate_every_epochs)}
            settings["seed"] = int(seed)
            settings |= _describe_inputs(data, normalize, own, paths, teacher_paths, teacher_variables)
            described = isinstance(teacher, list | tuple | Teacher)
            settings |= _describe_teachers(teachers, combine_teachers) if described else {}
            settings |= _describe_students(students, several) | ({"mix": _describe_mix(mix)} if mix else {})
            trainer.say(_claim(workdir, settings, students, trainer))
        with contextlib.nullcontext() if workdir is None else StopRequest(owns_process=False) as stop:
            results = trainer.fit(stop)
            if workdir is not None:
                entries = {name: describe_result(trainer.describe(name), result) for name, result in results.items()}
                write_finite(workdir / RESULTS, entries)
    return results if several else results[_STUDENT]


def _check_kinds(student_features, teacher_features, callbacks, mix):
    """Raises UserError for arguments of the wrong kind, which would otherwise be noticed late, or not at all."""
    for name, paths in (("student_features", student_features), ("teacher_features", teacher_features)):
        if isinstance(paths, str):
            raise UserError(f"{name} is {paths!r}; it must be a list of paths, such as [{paths!r}]")
    is_list = callbacks is None or isinstance(callbacks, Sequence)
    if not is_list or not all(isinstance(callback, Callback) for callback in callbacks or ()):
        raise UserError("callbacks must be a list of instances of cskd_jax.Callback, such as [cskd_jax.Console()]")
    if mix is not None and not callable(mix):
        raise UserError(f"mix is {mix!r}; it must be a function that mixes images, such as cskd_jax.Mix(mixup=0.2)")


def _as_students(students, student, variables, paths, losses, optimizer, schedule, ema) -> Mapping[str, Student]:
    """Returns the students of a call; raises UserError for settings that are missing, or that belong to one of them."""
    if students is None:
        network = as_network(student, *paths)
        if losses is None or optimizer is None:
            raise UserError(
                "a student needs losses and an optimizer, such as losses={'kd': 0.9}, optimizer=optax.sgd(0.1)"
            )
        return {_STUDENT: Student(network, losses, optimizer, schedule, ema, variables)}
    features, embedding, head = paths
    single = {"student": student, "losses": losses, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    single |= {"student_variables": variables, "student_features": features or None}
    single |= {"student_embedding": embedding, "student_head": head}
    given = [name for name, value in single.items() if value is not None]
    if given:
        raise UserError(
            f"{given[0]} applies to a single student: with students={{...}}, give it to each Student, or to the "
            "LinenNetwork(module, ...) of that Student"
        )
    named = isinstance(students, Mapping) and len(students) > 0
    if not named or not all(isinstance(student, Student) for student in students.values()):
        raise UserError("students must be {name: Student(network, losses, optimizer)}, with at least one entry")
    allowed, taken = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*"), {"tensorboard", LOCK, DISTILLATION, *FILES}
    wrong = [name for name in students if not isinstance(name, str) or name in taken or not allowed.fullmatch(name)]
    if wrong:
        raise UserError(
            f"a student cannot be named {wrong[0]!r}, because its folder is named after it: a name is a letter or "
            "digit followed by letters, digits and ._+-, and not that of a file of the workdir, such as tensorboard"
        )
    return students


def _describe_inputs(data, normalize, own, paths, teacher_paths, teacher_variables):
    """Returns a comparable description of the data, the teacher, and how they are read, as JSON."""
    features, embedding, head = zip(paths, teacher_paths, strict=True)
    described = {"mean": normalize.mean, "std": normalize.std, "data": fingerprint(data)}
    described["paths"] = [*features, *embedding]
    described["teacher_variables"] = None if teacher_variables is None else digest_of(teacher_variables)
    if not own.is_same(normalize):
        described |= {"teacher_mean": own.mean, "teacher_std": own.std}
    return described | ({} if head == (None, None) else {"heads": head})


def _describe_students(students, several):
    described = {name: _describe_student(student) for name, student in students.items()}
    return {"students": described} if several else described[_STUDENT]


def _describe_student(student):
    """Returns a comparable description of a student, as JSON."""
    losses = {name: _describe_loss(as_settings(entry)) for name, entry in student.losses.items()}
    variables = None if student.variables is None else digest_of(student.variables)
    ema = {} if student.ema is None else {"ema": float(student.ema)}
    return {"losses": losses, "student_variables": variables, **ema}


def _describe_mix(mix):
    """Returns a comparable description of a function that mixes images, as JSON."""
    if dataclasses.is_dataclass(mix) and not isinstance(mix, type):
        return dataclasses.asdict(mix)
    return _describe_loss(mix)


def _make_normalizations(data, mean, std, teacher_mean, teacher_std):
    """Returns the normalizations of the images for the students and for the teacher."""
    normalize = _make_normalize(data, mean, std)
    own_mean, own_std = mean if teacher_mean is None else teacher_mean, std if teacher_std is None else teacher_std
    own = _make_normalize(data, own_mean, own_std, "teacher_")
    for name, given in (("", normalize), ("teacher_", own)):
        if data.image_dtype != np.uint8 and not given.is_same(Normalize()):
            raise UserError(f"{name}mean and {name}std need uint8 images; float images are used as they are")
    return normalize, own


def _make_normalize(data: ImageDataset, mean: Any, std: Any, name: str = "") -> Normalize:
    """Returns a normalization; raises UserError for one that does not fit the images."""
    try:
        means, deviations = (tuple(map(float, np.atleast_1d(values))) for values in (mean, std))
    except (TypeError, ValueError):
        raise UserError(f"{name}mean and {name}std must be numbers, or one number per channel") from None
    if any(value > 1 for value in means):
        raise UserError(f"{name}mean is {means}; it must be that of pixels in [0, 1]: divide it by 255")
    return Normalize(means, deviations).checked(data.image_shape[-1], name)


def _as_teachers(teacher, variables, paths, own) -> Sequence[Teacher]:
    """Returns the teachers of a call; raises UserError for one without variables, or settings that belong to one.

    Args:
      teacher: Network of the only teacher, a list of teachers, or None.
      variables: Variables of the only teacher.
      paths: Paths within the only teacher of its features, embedding and classifier.
      own: Normalization of the only teacher; None if it is that of the students.
    """
    if teacher is None:
        return []
    if isinstance(teacher, list | tuple | Teacher):
        teacher = [teacher] if isinstance(teacher, Teacher) else teacher
        if not teacher or not all(isinstance(one, Teacher) for one in teacher):
            raise UserError("several teachers must be a non-empty list of Teacher(network, variables)")
        features, embedding, head = paths
        single = {"teacher_variables": variables, "teacher_mean or teacher_std": own}
        single |= {"teacher_features": features or None, "teacher_embedding": embedding, "teacher_head": head}
        given = [name for name, value in single.items() if value is not None]
        if given:
            raise UserError(
                f"{given[0]} applies to a teacher that is a network: here, give it to each Teacher, or to the "
                "LinenNetwork(module, ...) of that Teacher"
            )
        return teacher
    network = as_network(teacher, *paths)
    variables = network.variables if variables is None else variables
    if variables is None:
        raise UserError(
            "a teacher needs teacher_variables, such as the variables of an earlier result, or {} for a function that "
            "needs none"
        )
    return [Teacher(network, variables, normalization=own)]


def _describe_teachers(teachers, combine):
    """Returns a comparable description of several teachers, as JSON."""
    described = []
    for teacher in teachers:
        own, variables = teacher.normalization, variables_of([teacher])
        entry = {"variables": None if variables is None else digest_of(variables), "weight": float(teacher.weight)}
        entry["normalization"] = None if own is None else {"mean": own.mean, "std": own.std}
        network = as_network(teacher.network)
        entry["paths"] = [getattr(network, name, None) for name in ("features", "embedding", "head")]
        described.append(entry | {"image_size": teacher.image_size})
    return {"teachers": described, "combine_teachers": combine}


def _make_batches(train: Any, steps_per_epoch: int | None) -> EpochBatches | None:
    """Returns the batches that a function makes; None if `train` is to hold arrays, which `from_arrays` checks."""
    if callable(train):
        return EpochBatches(train, functools.partial(make_split, "train"), steps_per_epoch)
    if isinstance(train, Iterable) and not isinstance(train, tuple | list) and not hasattr(train, "shape"):
        raise UserError(
            f"train is a {type(train).__name__}, which may be exhausted after one epoch: give arrays, or a function "
            "from an epoch number to an iterable of (images, labels), such as train=lambda epoch: loader"
        )
    return None


def _describe_loss(entry):
    """Returns a comparable description of a loss entry, as JSON: the name of a function, or the fields of a module."""
    if isinstance(entry, Mapping):
        return {key: _describe_loss(value) for key, value in entry.items()}
    if isinstance(entry, Method):
        fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
        # A setting that is off is not written, because earlier versions did not have it.
        left_out = {"parent", "name"} | ({"teacher"} if entry.teacher is None else set())
        return {"class": type(entry).__qualname__} | {
            name: _describe_loss(value) for name, value in fields.items() if name not in left_out
        }
    if isinstance(entry, tuple | list):
        return [_describe_loss(value) for value in entry]
    if isinstance(entry, np.generic):
        return entry.item()
    if isinstance(entry, np.ndarray | jax.Array):
        return digest_of({"": entry})
    if entry is None or isinstance(entry, bool | int | float | str):
        return entry
    return getattr(entry, "__qualname__", type(entry).__qualname__)


def _claim(workdir, identity, students, trainer):
    """Claims the workdir for these settings, students and their trainer; returns a message about it.

    Raises:
      UserError: The workdir holds checkpoints of other settings, or of something else.
    """
    path = workdir / DISTILLATION
    identity = json.loads(json.dumps(identity))
    if not any(workdir.glob(f"*/{FOLDER}/*")):
        write_json(path, identity)
        return f"workdir {workdir}"
    if not path.exists():
        raise UserError(f"workdir {workdir} holds checkpoints that were not made by distill; use another workdir")
    found = read_json(path)
    different = sorted(key for key in identity.keys() | found.keys() if found.get(key) != identity.get(key))
    if different == ["epochs"] and is_count(found.get("epochs")) and found["epochs"] < identity["epochs"]:
        trainer.check_workdir()  # A run that cannot be extended must remain as it is.
        (workdir / RESULTS).unlink(missing_ok=True)
        for name in students:
            mark_unfinished(workdir / name / FOLDER)
    elif different:
        changes = ", ".join(f"{key} {found.get(key)!r} != {identity.get(key)!r}" for key in different)
        raise UserError(f"workdir {workdir} holds another run ({changes}); use another workdir")
    write_json(path, identity)
    state = "already done" if (workdir / RESULTS).exists() else "resuming"
    return (
        f"workdir {workdir}: {state}; the optimizer, the augmentation, the batches that a function makes after the "
        "first, and the code of networks and functions cannot be compared with those of the earlier run"
    )
