"""The trainer, which trains students with the help of teachers."""

import copy
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax.core import unfreeze

from cskd_jax.data import ImageDataset
from cskd_jax.data.augment import Normalize
from cskd_jax.data.batches import EpochBatches, Sampler
from cskd_jax.data.samplers import UniformSampler
from cskd_jax.distributed import processes
from cskd_jax.distributed.devices import AXIS, Devices
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import DivergedError, UserError
from cskd_jax.training.adapters import as_network
from cskd_jax.training.callbacks import ROW_KEYS, Callback, Console, Progress
from cskd_jax.training.checks import check_batches, check_losses
from cskd_jax.training.evaluation import Evaluation
from cskd_jax.training.loop import Loop
from cskd_jax.training.mixing import Mix
from cskd_jax.training.networks import Network, Variables, check_collections
from cskd_jax.training.objective import Objective
from cskd_jax.training.participant import Participant
from cskd_jax.training.peers import with_peers
from cskd_jax.training.phases import Phase, make_parts
from cskd_jax.training.prediction import describe_prediction
from cskd_jax.training.programs import Programs, TeacherPass
from cskd_jax.training.records import MAX_ROWS, MetricsFiles, read_rows
from cskd_jax.training.saved import Record
from cskd_jax.training.setup import Setup
from cskd_jax.training.state import TrainState
from cskd_jax.training.teachers import Combine, Teacher, network_of, variables_of


@dataclasses.dataclass(frozen=True)
class Student:
    """A network that is trained.

    Attributes:
      network: A linen module, an nnx module, a function or a `Network`; see `training.adapters`.
      losses: Losses, see `Objective.create`.
      optimizer: Optimizer of {"network": parameters of the network, "losses": {name: parameters of the loss}}. Masks
        and labels given to optax as functions see this tree.
      schedule: Learning rate as a function of the number of updates, for the log; None if it is not known.
      ema: Decay of an exponential moving average of the variables, which is then evaluated and returned; None keeps
        none.
      variables: Variables to start from; None for fresh ones.
      description: Description of the network in its checkpoints; by default the name of its class.
      method: Name of the method in its checkpoints.
    """

    network: Any
    losses: Mapping[str, Any]
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any] | None = None
    ema: float | None = None
    variables: Variables | None = None
    description: Mapping[str, Any] | None = None
    method: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of training a student, whose representation shows its metrics alone.

    Attributes:
      variables: Variables of the network after the last epoch, numpy arrays: {"params": ..., and its other
        collections}. "prediction" holds those of a loss with which the student predicts, such as `simkd`.
      metrics: {split: {metric: value}} after the last epoch. For the splits "test" and "validation", accuracies are
        fractions of the whole split; for "train", the values are means over the last steps.
      last: {"epoch", metrics} of the last epoch, on the test split.
      best: {"epoch", metrics} of the best epoch, on the test split. The validation split chooses the epoch; without
        one, the test split does, so the figures are optimistic.
      validation: {"last": ..., "best": ...}, the same on the validation split; empty without one.
      history: Rows in the order of the steps: {"phase": name of the student, "split", "step", "epoch", metrics}.
      images_per_second: Training speed; None if nothing was trained.
    """

    variables: Variables = dataclasses.field(repr=False)
    metrics: Mapping[str, Mapping[str, float]]
    last: Mapping[str, float] = dataclasses.field(repr=False)
    best: Mapping[str, float] = dataclasses.field(repr=False)
    validation: Mapping[str, Mapping[str, float]] = dataclasses.field(repr=False)
    history: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)
    images_per_second: float | None = dataclasses.field(repr=False)


class Trainer:
    """A trainer of students, each of which is trained to the end of all phases.

    All students see the same images in the same order, with the same augmentation, so that their results can be
    compared in pairs. With a workdir, training resumes bit for bit where an earlier start in the same folder stopped.
    The trainer compares only the shapes of arrays with that start; `distill` and recipes also compare settings and
    data, and lock the folder.

    Args:
      students: {name: student}.
      teachers: Teachers, for losses that read one; several are combined into a `teachers.Ensemble`, unless a loss names
        one of them in its setting `teacher`.
      data: Training and test split, and possibly a validation split, which then chooses the best epoch.
      phases: Phases, in their order.
      batch_size: Number of images in a batch, over all devices.
      seed: Seed of the weights, the order of the images and the augmentation.
      sampler: Sampler that chooses the images of a batch; by default each image once per epoch in random order. With
        `EpochBatches`, a function makes the batches, and the training split of `data` is their first batch.
      normalize: Function from images of the data to inputs of the networks; None leaves them unchanged.
      augment: Function of images [B, H, W, C], a key and the positions of the images in the global batch, applied
        before `normalize`; None leaves the images unchanged.
      callbacks: Callbacks; by default `Console`, which shows progress. () is quiet. Each of several students gets
        copies of its own, which share the objects that the callbacks hold.
      workdir: Folder of checkpoints and logs; None writes nothing.
      devices: Devices to compute on, or how many of them; None for all.
      log_every: Number of steps between two rows of the history.
      keep_checkpoints: Number of most recent checkpoints to keep in addition to the best.
      save_every_minutes: Minimum time between two checkpoints, which are saved at the end of an epoch; the last epoch
        and a stop always save one.
      evaluate_every_epochs: Number of epochs from one evaluation to the next; the last epoch is always evaluated.
      accumulation_steps: Number of micro-batches that a batch is divided into, to save memory: an update sees all
        `batch_size` images; batch normalization, memories, and losses that relate images to each other see
        micro-batches.
      combine_teachers: What is averaged over several teachers, "logits" or "probabilities".
      mix: Function that mixes the images of a batch with each other, for teacher and student alike; None leaves them
        unchanged. With mixing, losses that read one label per image are rejected; cross-entropy and mutual learning
        read both labels.
      stream: Number folded into the seed for weights and augmentation; trainers with different numbers draw
        differently.
      beside: Trainer with the same teacher, data, and everything else that determines the batches, together with which
        this one is to be trained by `fit_together`; None for a trainer that comes first or is alone.

    Attributes:
      state: {name: its `TrainState` at the end of `fit`}.
      teacher_pass: Compiled programs that prepare the batches of all students.

    Raises:
      UserError: Networks, losses, data and devices do not fit together; nothing has been compiled by then.
    """

    def __init__(
        self,
        students: Mapping[str, Student],
        teachers: Sequence[Teacher] = (),
        *,
        data: ImageDataset,
        phases: Sequence[Phase],
        batch_size: int = 128,
        seed: int = 0,
        sampler: Sampler | None = None,
        normalize: Callable[[jax.Array], jax.Array] | None = None,
        augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
        callbacks: Sequence[Callback] | None = None,
        workdir: str | pathlib.Path | None = None,
        devices: Devices | int | Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
        log_every: int = 50,
        keep_checkpoints: int = 2,
        save_every_minutes: float = 0.5,
        evaluate_every_epochs: int = 1,
        accumulation_steps: int = 1,
        combine_teachers: Combine = "logits",
        mix: Mix | None = None,
        stream: int = 1,
        beside: "Trainer | None" = None,
    ):
        integers = [("log_every", log_every, 1), ("accumulation_steps", accumulation_steps, 1)]
        integers += [("evaluate_every_epochs", evaluate_every_epochs, 1), ("keep_checkpoints", keep_checkpoints, 1)]
        for argument, value, low in integers:
            if not isinstance(value, int | np.integer) or value < low:
                raise UserError(f"{argument} is {value!r}; it must be an integer, at least {low}")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise UserError(f"seed is {seed!r}; it must be an integer from 0 to {2**32 - 1}")
        self._workdir = None if workdir is None else pathlib.Path(workdir)
        self._teachers = tuple(teachers)
        self.state: dict[str, TrainState] = {}
        shared = Setup(
            data=data,
            sampler=UniformSampler(len(data.train.labels), batch_size, seed) if sampler is None else sampler,
            normalize=(lambda images: images) if normalize is None else normalize,
            augment=augment,
            key=jax.random.fold_in(jax.random.PRNGKey(seed), stream),
            devices=devices if isinstance(devices, Devices) else Devices(devices),
            callbacks=(Console(),) if callbacks is None else tuple(callbacks),
            workdir=self._workdir,
            log_every=log_every,
            keep_checkpoints=keep_checkpoints,
            save_every_minutes=save_every_minutes,
            evaluate_every_epochs=evaluate_every_epochs,
            accumulation_steps=accumulation_steps,
            mix=mix or None,
        )
        check_batches(shared)
        self._setup = shared
        if beside is None:
            given = normalize if isinstance(normalize, Normalize) else None
            network = network_of(self._teachers, given, combine_teachers, data.multilabel)
            self.teacher_pass = TeacherPass(shared, network, variables_of(self._teachers))
        else:
            self.teacher_pass = beside.teacher_pass
        self._participants = {
            name: self._make_participant(name, student, phases, len(students) > 1) for name, student in students.items()
        }
        if self._workdir is not None:
            self._check_rows(len(students), sum(phase.epochs for phase in phases))

    def _check_rows(self, students, epochs):
        """Raises UserError if metrics.jsonl would get more rows than are read when the students are done.

        Half of them are left for another trainer in the same folder, that of the teacher or of its student.
        """
        every, steps = self._setup.log_every, self._setup.sampler.steps_per_epoch
        splits = 1 if self._setup.data.validation is None else 2
        rows, most = students * epochs * (steps // every + 1 + splits), MAX_ROWS // 2
        if rows > most:
            raise UserError(
                f"log_every is {every}: metrics.jsonl would get up to {rows:,} rows, and at most {most:,} are allowed; "
                "raise log_every, or train fewer epochs or students in one folder"
            )

    def _make_participant(self, name, student, phases, several):
        data, sampler = self._setup.data, self._setup.sampler
        network = as_network(student.network)
        if student.ema is not None and not 0 <= student.ema < 1:
            raise UserError(f"ema is {student.ema!r}; it must be a number in [0, 1), or None")

        def create(losses):
            objective = Objective.create(
                losses,
                num_classes=data.num_classes,
                axis_name=AXIS,
                num_examples=0 if isinstance(sampler, EpochBatches) else len(data.train.labels),
                batch_size=self._setup.micro_batch_size or sampler.batch_size,
                steps_per_epoch=sampler.steps_per_epoch,
            )
            check_losses(objective, data, mixes=self._setup.mix is not None)
            if objective.teacher_reader is not None and not self._teachers:
                raise UserError(f"{name}: losses.{objective.teacher_reader} needs a teacher")
            if objective.average_reader is not None and student.ema is None:
                raise UserError(
                    f"{name}: losses.{objective.average_reader} learns from the moving average of the student, but "
                    "none is kept: give the student an ema, such as 0.99"
                )
            return objective

        parts = make_parts(
            phases,
            student.losses,
            student.optimizer,
            student.schedule,
            steps_per_epoch=sampler.steps_per_epoch,
            create=create,
        )
        record = Record(
            network=dict(student.description or {"name": _class_name(network)}),
            channels=data.image_shape[-1],
            categories=list(data.categories),
            multilabel=data.multilabel,
            images=_describe_images(data, self._setup.normalize),
            method=student.method,
            prediction=describe_prediction(parts[-1].objective),
        )
        if self._workdir is not None:
            record.check(name)
        variables = network.variables if student.variables is None else student.variables
        if variables is not None:
            check_collections("student_variables", variables)
            # Flax returns updated collections as dictionaries, whatever it was given.
            variables = unfreeze({**variables})
        peers = max(part.objective.peers for part in parts)
        if peers and variables is not None:
            raise UserError(f"{name}: a student with peers must start from new weights, but it already has variables")
        # Callbacks hold the state of one student.
        callbacks = map(copy.copy, self._setup.callbacks) if several else self._setup.callbacks
        files = () if self._workdir is None else (MetricsFiles(self._workdir),)
        setup = dataclasses.replace(self._setup, callbacks=(*files, *callbacks))
        with setup.pause(f"{name}: tracing the training step"):
            programs = Programs(
                name,
                with_peers(network, peers),
                parts,
                setup,
                variables=variables,
                teacher_pass=self.teacher_pass,
                ema=student.ema,
            )
        return Participant(name, programs, record, setup)

    def fit(self, stop: StopRequest | None = None) -> dict[str, Result]:
        """Trains every student to the end, all at once: each batch passes through the teacher once.

        Args:
          stop: Request to stop, which is checked before every step; None never stops early.

        Returns:
          {name: result}.

        Raises:
          InterruptedRun: `stop` was requested; with a workdir the state is saved.
          DivergedError: A loss or gradient of a student is not finite. The others are trained to the end first, and
            `results` of the error holds their results.
        """
        results: dict[str, Result] = {}
        diverged: list[DivergedError] = []

        def on_done(_, name, outcome):
            if isinstance(outcome, DivergedError):
                diverged.append(outcome)
            elif isinstance(outcome, UserError):
                raise outcome
            else:
                results[name] = outcome

        fit_together([self], stop, on_done)
        if diverged:
            diverged[0].results = results
            raise diverged[0]
        return results

    def check_workdir(self) -> None:
        """Raises UserError if the newest checkpoints in the workdir do not fit the students; changes nothing."""
        for participant in self._participants.values():
            with participant:
                pass

    def _finish(self, participant):
        """Returns the result of a student that is done, whose state is kept."""
        name, history = participant.name, participant.history
        if participant.state is not None:  # It is None if an earlier call has trained it to the end.
            self.state[name] = jax.device_get(participant.state)
            participant.state = None  # Its devices may need the memory.
        if self._workdir is not None:
            path = self._workdir / "metrics.jsonl"
            rows = processes.on_first(lambda: list(read_rows(path)))
            history = [row for row in rows if row["phase"] == name]
        variables = participant.programs.variables_of(self.state[name])
        return _result(name, variables, participant.progress, history)

    def say(self, message: str) -> None:
        """Sends a line of text to the callbacks."""
        self._setup.say(message)

    def programs(self, name: str) -> Programs:
        """Returns the compiled programs of the training of a student."""
        return self._participants[name].programs

    def describe(self, name: str) -> dict[str, Any]:
        """Returns the description of a student's network in checkpoints."""
        return self._participants[name].record.network

    def evaluate(self, name: str, split: str = "test") -> dict[str, float]:
        """Returns the metrics of a student on a split, "test", "train" or "validation".

        Raises:
          UserError: There is no such student or split, or the student has not been trained.
        """
        if name not in self.state:
            raise UserError(f"there is no trained student {name!r}: fit trains {', '.join(self._participants)}")
        variables = self.programs(name).variables_of(self.state[name])
        return self.evaluation(name, split)(self._setup.devices.replicate(variables))

    def evaluation(self, name: str, split: str = "test") -> Evaluation:
        """Returns the evaluation of a student on a split; raises UserError if it cannot be evaluated."""
        if split == "train" and self._setup.data.unlabeled:
            raise UserError("the training images have no labels to evaluate with")
        if split == "train" and isinstance(self._setup.sampler, EpochBatches):
            raise UserError(
                "batches made by a function cannot be evaluated: give arrays to evaluate the training split"
            )
        return self._participants[name].evaluation_on(split)


def fit_together(
    trainers: Sequence[Trainer],
    stop: StopRequest | None = None,
    on_done: Callable[[Trainer, str, Result | UserError], None] = lambda trainer, name, outcome: None,
) -> None:
    """Trains the students of several trainers at once, as `Trainer.fit` does for one.

    Args:
      trainers: Trainers with the same data, sampler, augmentation, seed, devices and teacher, which may differ in
        everything else: students, phases, workdirs, callbacks. Some may have no teacher.
      stop: Request to stop, which is checked before every step; None never stops early.
      on_done: Function that is called with the trainer, the name and the result of a student once it is done, or with
        the error that ended its training; the others continue.

    Raises:
      InterruptedRun: `stop` was requested; the states of trainers with a workdir are saved.
      UserError: The teacher has no variables.
    """
    with_teacher = next((trainer for trainer in trainers if trainer._teachers), trainers[0])
    teacher_variables = variables_of(with_teacher._teachers)
    if with_teacher._teachers:
        if teacher_variables is None:
            raise UserError("the teacher has no variables: set them before fit")
        teacher_variables = with_teacher._setup.devices.replicate(teacher_variables)
    owners = {participant: trainer for trainer in trainers for participant in trainer._participants.values()}
    for participant in owners:
        participant.say_what_depends_on_devices()
    for trainer in trainers:
        if trainer._teachers and not any(p.programs.reads_teacher for p in trainer._participants.values()):
            trainer.say("no loss reads the teacher: it is not used")

    def done(participant):
        trainer = owners[participant]
        on_done(trainer, participant.name, participant.error or trainer._finish(participant))

    Loop(list(owners), with_teacher.teacher_pass).run(StopRequest() if stop is None else stop, teacher_variables, done)


def _result(name: str, variables: Variables, progress: Progress, history: Sequence[Mapping[str, Any]]) -> Result:
    """Returns the result of a student, with the metrics of the last rows of its history."""
    validation = progress.evaluations if progress.test else {}
    test = progress.test or progress.evaluations
    if not any(row["split"] == "test" for row in history):  # The file was removed, but the checkpoint has the rest.
        history = [*history, {"phase": name, "split": "test", "step": None, **test["last"]}]
    metrics = {row["split"]: {name: value for name, value in row.items() if name not in ROW_KEYS} for row in history}
    last, best = (test.get(name, {}) for name in ("last", "best"))
    return Result(variables, metrics, last, best, validation, history, progress.images_per_second)


def _class_name(network: Network) -> str:
    inner = getattr(network, "module", getattr(network, "function", network))
    return getattr(inner, "__name__", type(inner).__name__)


def _describe_images(data: ImageDataset, normalize: Any) -> dict[str, Any]:
    """Returns the description of the training images in checkpoints."""
    images = {"size": list(data.image_shape[:2])}
    if isinstance(normalize, Normalize):
        images |= {"mean": list(normalize.mean), "std": list(normalize.std)}
    return images
