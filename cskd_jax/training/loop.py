"""The loop: trains one student to the end of its phases, evaluates, saves, resumes."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from cskd_jax.data import ImageDataset, read_batches
from cskd_jax.data.samplers import Sampler
from cskd_jax.distributed import processes
from cskd_jax.distributed.devices import AXIS, Devices, lower
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import InterruptedRun, UserError
from cskd_jax.models import count_parameters
from cskd_jax.training.callbacks import Callback, Meter, Progress, Row, Start
from cskd_jax.training.checkpoint import FOLDER, Checkpoints, Record
from cskd_jax.training.evaluation import Evaluation
from cskd_jax.training.metrics import task_of
from cskd_jax.training.networks import Network, Variables, draws_random_numbers
from cskd_jax.training.optimizers import learning_rate_of_step
from cskd_jax.training.phases import Part
from cskd_jax.training.state import TrainState, check_unchanged, init_network, init_optimizer, init_state
from cskd_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all students of a trainer share.

    Attributes:
      data: Training and test split.
      sampler: Which images make up a batch.
      normalize: Function from images as they are in the data to images as the networks take them.
      augment: Function of images, a key and positions in the global batch, before that; None: the images stay as they
        are.
      key: Key of weights and augmentation; the same for all students, so that their runs pair up.
      devices: Devices to compute on.
      callbacks: Callbacks.
      workdir: Folder of the checkpoints and logs; None: nothing is written.
      log_every: Number of steps between two rows of the history.
      keep_checkpoints: Number of newest checkpoints that are kept beside the best.
    """

    data: ImageDataset
    sampler: Sampler
    normalize: Callable[[jax.Array], jax.Array]
    augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None
    key: jax.Array
    devices: Devices
    callbacks: Sequence[Callback] = ()
    workdir: pathlib.Path | None = None
    log_every: int = 50
    keep_checkpoints: int = 2

    def say(self, message: str) -> None:
        """Tells the callbacks a line for people."""
        for callback in self.callbacks:
            callback.on_message(message)


class Loop:
    """The training of one student.

    Args:
      name: Name of the student, and of its folder in the workdir.
      network: Network that is trained.
      parts: What each phase of the training is made of.
      record: Description of the network that its checkpoints carry.
      setup: What it shares with the other students.
      variables: Variables that it starts from; None for fresh ones.
      teacher: Network of the teacher, or None.
      teacher_variables: Variables of the teacher, or their shapes; None where they do not exist yet.

    Raises:
      UserError: Networks, losses and data do not fit together; nothing has been compiled by then.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        parts: Sequence[Part],
        record: Record,
        setup: Setup,
        *,
        variables: Variables | None = None,
        teacher: Network | None = None,
        teacher_variables: Variables | None = None,
    ):
        self._name, self._network, self._parts, self._setup = name, network.on_axis(AXIS), parts, setup
        self._record, self._variables = record, variables
        self._teacher = None if teacher is None else teacher.on_axis(AXIS)
        self._task, self._sampler = task_of(setup.data.multilabel), setup.sampler
        self._total_steps = parts[-1].end
        # One key for the weights, one for the rest.
        self._init_key, self._key = jax.random.split(setup.key)
        self._steps = [self._make_step(part) for part in parts]
        self._compiled: dict[tuple[int, int], Callable] = {}
        self._evaluate = self.evaluation_on("test")
        self._lower(teacher_variables)

    @property
    def record(self) -> Record:
        """What the first checkpoint would say of the network."""
        return self._record

    @property
    def evaluation(self) -> Evaluation:
        """The evaluation on the test split."""
        return self._evaluate

    def evaluation_on(self, split: str) -> Evaluation:
        """Returns an evaluation on a split, "test" or "train"."""
        data = self._setup.data
        return Evaluation(
            self._network,
            {"test": data.test, "train": data.train}[split],
            data.num_classes,
            normalize=self._setup.normalize,
            batch_size=self._sampler.batch_size,
            devices=self._setup.devices,
        )

    def say_what_depends_on_devices(self) -> None:
        """Says so if a network that does not know of devices makes the results depend on their number."""
        count, state, network = self._setup.devices.count, self._abstract_states[0], self._network.on_axis(None)
        if state.collections and not getattr(network, "has_training_mode", True):
            self._say("the network has no argument that asks for training mode: it is always called in the same way")
        if count == 1:
            return
        images = jax.ShapeDtypeStruct((2, *self._setup.data.image_shape), jnp.float32)
        causes = []
        if not network.synchronized:
            causes = [f"its {name} are computed on each device's part of a batch" for name in state.collections]
        if draws_random_numbers(network, state.variables, images):
            causes.append("it draws random numbers on each device")
        if causes:
            self._say(f"results depend on the number of devices, {count}: {', and '.join(causes)}")

    def _say(self, message):
        self._setup.say(f"{self._name}: {message}")

    def _make_step(self, part):
        normalize, augment = self._setup.normalize, self._setup.augment

        def preprocess(images, key, positions):
            return normalize(images if augment is None else augment(images, key, positions))

        step = make_train_step(
            self._network,
            part.objective,
            part.optimizer,
            preprocess=preprocess,
            teacher=self._teacher,
            axis_name=AXIS,
            task=self._task,
        )
        return self._setup.devices.map_train_step(step)

    def _lower(self, teacher_variables):
        """Traces a new state and a step of every phase; what does not fit shows here, before anything compiles."""
        try:
            teacher_output = None
            self._abstract_teacher = None
            if self._teacher is not None:
                self._abstract_teacher, teacher_output = self._trace_teacher(self._teacher, teacher_variables)
            first, data = self._parts[0], self._setup.data
            self._check_logits()
            label = jax.ShapeDtypeStruct(data.train.labels.shape[1:], data.train.labels.dtype)

            def new_state(variables):
                return init_state(
                    self._init_key,
                    self._network,
                    first.all_losses,
                    first.optimizer,
                    data.image_shape,
                    teacher_output,
                    label,
                    variables,
                )

            self._lowered_state = jax.jit(new_state).lower(self._variables)
            state: TrainState = self._lowered_state.out_info
            self._abstract_states = [state]
            for part in self._parts[1:]:
                opt_state = jax.eval_shape(functools.partial(init_optimizer, part.optimizer), state.params)
                self._abstract_states.append(dataclasses.replace(state, opt_state=opt_state))
            size = self._sampler.batch_size
            self._lowered_steps = [self._lower_step(number, size) for number in range(len(self._parts))]
            check_unchanged(state, self._lowered_steps[0].out_info[0])
        except (TypeError, ValueError, ArithmeticError, FlaxError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{self._name}: {lines[0]}") from error

    def _check_logits(self):
        """Raises ValueError unless the network gives one logit for each class."""
        shape, classes = self._setup.data.image_shape, self._setup.data.num_classes
        output = jax.eval_shape(lambda: init_network(self._network, self._init_key, shape)[1])
        if output.logits.shape != (2, classes):
            raise ValueError(
                f"the logits of two images have shape {output.logits.shape}; the data have {classes} classes, which "
                f"asks for {(2, classes)}"
            )

    def _trace_teacher(self, teacher, variables):
        """Returns the shapes of the teacher's variables and outputs."""
        shape = self._setup.data.image_shape
        if variables is None:
            return jax.eval_shape(lambda: init_network(teacher, self._init_key, shape))
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        alone = teacher.on_axis(None)
        outputs = jax.eval_shape(lambda v, x: alone.apply(v, x, train=False)[0], variables, images)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables), outputs

    def _lower_step(self, number, size):
        """Traces the step of a phase for a global batch of `size`."""
        data, devices = self._setup.data, self._setup.devices
        rows = len(range(size)[devices.local_rows(size)])
        batch = {
            "image": np.zeros((rows, *data.image_shape), data.image_dtype),
            "label": np.zeros((rows, *data.train.labels.shape[1:]), data.train.labels.dtype),
            "index": np.zeros(rows, np.int32),
        }
        arguments = self._abstract_states[number], self._abstract_teacher, devices.shard(batch), self._key
        return lower(self._steps[number], *arguments)

    def _batches(self, step):
        """Yields (size of the global batch, this process's rows of it) of each step from `step` on."""
        split, steps = self._setup.data.train, range(step, self._total_steps)
        for step, images in zip(steps, read_batches(split.images, map(self._local_indices, steps)), strict=True):
            index = self._local_indices(step)
            batch = {"image": images, "label": split.labels[index], "index": index.astype(np.int32)}
            yield len(self._sampler.indices(step)), self._setup.devices.shard(batch)

    def _local_indices(self, step):
        index = self._sampler.indices(step)
        return index[self._setup.devices.local_rows(len(index))]

    def run(self, stop: StopRequest, teacher_variables: Any = None) -> tuple[TrainState, Progress, list[Row]]:
        """Trains to the end from the newest checkpoint.

        Args:
          stop: Request to stop, looked at after every step.
          teacher_variables: Variables of the teacher, replicated over the devices.

        Returns:
          The state, what was measured on the way, and the rows of the history since the start or resume.

        Raises:
          InterruptedRun: `stop` was requested; the state is saved.
          DivergedError: A loss or gradient is not finite.
        """
        with self._open_checkpoints() as checkpoints:
            state, progress = self._restore(checkpoints)
            step = 0 if state is None else int(state.step)
            if step > self._total_steps:
                raise UserError(
                    f"{self._name}: the workdir holds a training of {step} steps, more than the {self._total_steps} "
                    "asked for; use another workdir"
                )
            if state is not None and step == self._total_steps:
                return state, progress, []
            self._announce(step)
            state = self._setup.devices.replicate(self._compile(state, step))
            # The programs were made without a teacher where no loss reads one.
            teacher_variables = None if self._teacher is None else teacher_variables
            start = Start(
                student=self._name,
                step=step,
                steps=self._total_steps,
                steps_per_epoch=self._sampler.steps_per_epoch,
                images_done=self._sampler.images_before(step),
                images=self._sampler.images_before(self._total_steps),
                task=self._task,
                progress=progress,
            )
            with Meter(start, self._setup.callbacks, self._setup.log_every, self._learning_rate) as meter:
                batches = self._batches(step)
                while step < self._total_steps:
                    begin = step
                    state = self._enter_part(state, step)
                    state, step = self._train_epoch(state, teacher_variables, step, batches, meter, stop)
                    if step > begin:
                        self._save(state, step, meter, checkpoints)
                    if stop.requested and step < self._total_steps:
                        saved = "" if self._setup.workdir is None else ", saved"
                        where = f"step {step} of the {self._name}"
                        raise InterruptedRun(f"stopped by {stop.name}{saved} at {where}: the same command resumes")
            return state, progress, meter.history

    def _open_checkpoints(self):
        if self._setup.workdir is None:
            return contextlib.nullcontext()
        return Checkpoints(self._setup.workdir / self._name / FOLDER, self._setup.keep_checkpoints)

    def _restore(self, checkpoints):
        """Returns (state of the newest checkpoint or None, progress)."""
        if checkpoints is None:
            return None, Progress()
        restored = checkpoints.restore(lambda step: self._abstract_states[self._part_of(step - 1)])
        return (None, Progress()) if restored is None else (restored[0], Progress(**restored[1].progress))

    def _part_of(self, step):
        """Returns the number of the phase that makes the step after `step` steps."""
        return next((number for number, part in enumerate(self._parts) if step < part.end), len(self._parts) - 1)

    def _learning_rate(self, step):
        """Returns the learning rate that made a step, by its number from 1."""
        part = self._parts[self._part_of(step - 1)]
        return learning_rate_of_step(part.schedule, step - 1 - part.optimizer_start)

    def _announce(self, step):
        size = count_parameters(self._abstract_states[0].params["network"])
        verb = "training" if step == 0 else f"resuming at step {step} of {self._total_steps}:"
        epochs = self._total_steps // self._sampler.steps_per_epoch
        self._say(
            f"{verb} {self._record.describe_network()}, {size:,} parameters, "
            f"{epochs} epochs of {self._sampler.steps_per_epoch} steps"
        )

    def _compile(self, state, step):
        """Compiles the next step and, where `state` is None, makes a new one meanwhile; returns the state."""
        start, number = time.perf_counter(), self._part_of(step)
        with ThreadPoolExecutor() as pool:
            compiled = pool.submit(self._lowered_steps[number].compile)
            if state is None:
                # Of one process: another kind of machine might round otherwise.
                state = processes.on_first(lambda: jax.device_get(self._lowered_state.compile()(self._variables)))
            # By batch size: the last batch of an epoch may be smaller.
            self._compiled[number, self._sampler.batch_size] = compiled.result()
        self._say(f"compiled in {time.perf_counter() - start:.1f} s")
        return state

    def _enter_part(self, state, step):
        """Returns the state with a fresh optimizer if a phase with one begins."""
        part = self._parts[self._part_of(step)]
        if step == 0 or step != part.start or not part.fresh:
            return state
        params = jax.device_get(state.params)
        init = jax.jit(functools.partial(init_optimizer, part.optimizer))
        opt_state = processes.on_first(lambda: jax.device_get(init(params)))
        return state.replace(opt_state=self._setup.devices.replicate(opt_state))

    def _train_epoch(self, state, teacher_variables, step, batches, meter, stop):
        """Trains from `step` to the end of its epoch, or to the step after which a stop was requested."""
        pending, number = deque(), self._part_of(step)
        meter.start_clock()
        end = (step // self._sampler.steps_per_epoch + 1) * self._sampler.steps_per_epoch
        while step < end and not stop.reached():
            size, batch = next(batches)
            if (number, size) not in self._compiled:
                # Compiling holds up the host: it should not count as time of the steps in flight, or of the next.
                _drain(pending, meter)
                self._compiled[number, size] = self._lower_step(number, size).compile()
                meter.start_clock()
            state, metrics = self._compiled[number, size](state, teacher_variables, batch, self._key)
            step += 1
            pending.append((step, size, metrics))
            # Metrics of finished steps are read without waiting; only a step too far ahead of the devices waits.
            while pending and (len(pending) >= self._setup.devices.steps_in_flight or pending[0][2]["loss"].is_ready()):
                meter.add(*pending.popleft())
        _drain(pending, meter)
        return state, step

    def _save(self, state, step, meter, checkpoints):
        """Evaluates if an epoch has ended, and saves where there is a workdir."""
        score = -math.inf  # what is saved in the middle of an epoch is never the best
        if step % self._sampler.steps_per_epoch == 0:
            values = self._evaluate(state.variables)
            meter.end_epoch(step, values)
            score = values[self._task.score]
        if checkpoints is not None:
            progress = dataclasses.asdict(meter.progress)
            record = dataclasses.replace(self._record, finished=step == self._total_steps, progress=progress)
            checkpoints.save(step, state, record, score)


def _drain(pending, meter):
    while pending:
        meter.add(*pending.popleft())
