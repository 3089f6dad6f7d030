"""The training loop, which trains one student through its phases, evaluates, saves and resumes."""

import contextlib
import dataclasses
import math
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp

from cskd_jax.data.batches import read_steps
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import InterruptedRun, UserError
from cskd_jax.models import count_parameters
from cskd_jax.training.callbacks import Meter, Progress, Row, Start
from cskd_jax.training.checkpoint import FOLDER, Checkpoints, Record
from cskd_jax.training.evaluation import Evaluation
from cskd_jax.training.metrics import task_of
from cskd_jax.training.networks import Variables, draws_random_numbers
from cskd_jax.training.optimizers import learning_rate_of_step
from cskd_jax.training.programs import Programs
from cskd_jax.training.setup import Setup
from cskd_jax.training.state import TrainState


class Loop:
    """The training of one student.

    Args:
      name: Name of the student and of its folder in the workdir.
      programs: Compiled programs of its training.
      record: Description of the network for its checkpoints.
      setup: Setup that the students share.

    Attributes:
      programs: Compiled programs of the training.
    """

    def __init__(self, name: str, programs: Programs, record: Record, setup: Setup):
        self.programs = programs
        self._name, self._record, self._setup = name, record, setup
        self._parts, self._sampler, self._total_steps = programs.parts, setup.sampler, programs.parts[-1].end
        self._task = task_of(setup.data.multilabel)
        self._evaluations: dict[str, Evaluation] = {}
        # The split on which the best epoch is chosen.
        self._choice = "test" if setup.data.validation is None else "validation"
        # Without a workdir, the variables of the best epoch are kept here until the test split is measured.
        self._best_variables: Variables | None = None

    @property
    def record(self) -> Record:
        """Returns the record that the first checkpoint would have."""
        return self._record

    def evaluation_on(self, split: str) -> Evaluation:
        """Returns an evaluation on a split, "test", "train" or "validation"."""
        if split not in self._evaluations:
            data = self._setup.data
            self._evaluations[split] = Evaluation(
                self.programs.network,
                {"test": data.test, "train": data.train, "validation": data.validation}[split],
                data.num_classes,
                normalize=self._setup.normalize,
                batch_size=self._sampler.batch_size,
                devices=self._setup.devices,
            )
        return self._evaluations[split]

    def say_what_depends_on_devices(self) -> None:
        """Reports a missing training mode, and why results depend on the number of devices if they do."""
        count, state, network = (
            self._setup.devices.count,
            self.programs.states[0],
            self.programs.network.on_axis(None),
        )
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

    def _pause(self, what):
        return self._setup.pause(f"{self._name}: {what}")

    def _batches(self, step):
        """Yields (size of the global batch, this process's rows of it) of each step from `step` on."""
        devices, micro_batch_size = self._setup.devices, self._setup.micro_batch_size

        def rows(size):
            return devices.interleave(size, micro_batch_size)[devices.local_rows(size)]

        for size, batch in read_steps(self._setup.data.train, self._sampler, range(step, self._total_steps), rows):
            yield size, devices.shard(batch)

    def run(self, stop: StopRequest, teacher_variables: Any = None) -> tuple[TrainState, Progress, list[Row]]:
        """Trains to the end from the newest checkpoint.

        Args:
          stop: Request to stop, which is checked after every step.
          teacher_variables: Variables of the teacher, replicated over the devices.

        Returns:
          The state, the progress, and the rows of the history since the start or resumption.

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
            start = Start(
                student=self._name,
                step=step,
                steps=self._total_steps,
                steps_per_epoch=self._sampler.steps_per_epoch,
                images_done=self._sampler.images_before(step),
                images=self._sampler.images_before(self._total_steps),
                task=self._task,
                progress=progress,
                learning_rate=self._learning_rate,
            )
            with Meter(start, self._setup.callbacks, self._setup.log_every) as meter:
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
        """Returns the state of the newest checkpoint, or None, and the progress."""
        if checkpoints is None:
            return None, Progress()
        restored = checkpoints.restore(lambda step: self.programs.states[self._part_of(step - 1)])
        return (None, Progress()) if restored is None else (restored[0], Progress(**restored[1].progress))

    def _part_of(self, step):
        """Returns the number of the phase of the step that follows `step` steps."""
        return next((number for number, part in enumerate(self._parts) if step < part.end), len(self._parts) - 1)

    def _learning_rate(self, step):
        """Returns the learning rate of a step, by its number from 1."""
        part = self._parts[self._part_of(step - 1)]
        return learning_rate_of_step(part.schedule, step - 1 - part.optimizer_start)

    def _announce(self, step):
        size = count_parameters(self.programs.states[0].params["network"])
        verb = "training" if step == 0 else f"resuming at step {step} of {self._total_steps}:"
        epochs = self._total_steps // self._sampler.steps_per_epoch
        self._say(
            f"{verb} {self._record.describe_network()}, {size:,} parameters, "
            f"{epochs} epoch{'s' if epochs > 1 else ''} of {self._sampler.steps_per_epoch} steps"
        )

    def _compile(self, state, step):
        """Compiles the next step and returns the state, which is newly made if `state` is None."""
        number = self._part_of(step)
        with self._pause("compiling the training step"):
            if state is None:
                state = self.programs.compile_and_init(number)
            else:
                self.programs.compile(number, self._sampler.batch_size)
        return state

    def _enter_part(self, state, step):
        """Returns the state with a fresh optimizer if a phase with one begins."""
        number = self._part_of(step)
        if step == 0 or step != self._parts[number].start or not self._parts[number].fresh:
            return state
        return self.programs.with_fresh_optimizer(number, state)

    def _train_epoch(self, state, teacher_variables, step, batches, meter, stop):
        """Trains from `step` to the end of the epoch, or until a stop is requested."""
        pending, number = deque(), self._part_of(step)
        meter.start_clock()
        end = (step // self._sampler.steps_per_epoch + 1) * self._sampler.steps_per_epoch
        while step < end and not stop.reached():
            size, batch = next(batches)
            if not self.programs.is_compiled(number, size):
                # Compilation blocks the host; it should not count as time of the steps in flight, or of the next.
                _drain(pending, meter)
                phase = f" of phase {number + 1}" if number else ""
                with self._pause(f"compiling the training step{phase} for batches of {size}"):
                    self.programs.compile(number, size)
                meter.start_clock()
            state, metrics = self.programs.step(number, size, state, teacher_variables, batch)
            step += 1
            pending.append((step, size, metrics))
            # Metrics of finished steps are read without waiting; only a step too far ahead of the devices waits.
            while pending and (len(pending) >= self._setup.devices.steps_in_flight or pending[0][2]["loss"].is_ready()):
                meter.add(*pending.popleft())
        _drain(pending, meter)
        return state, step

    def _save(self, state, step, meter, checkpoints):
        """Evaluates if an epoch has ended, and saves if there is a workdir."""
        score = -math.inf  # what is saved in the middle of an epoch is never the best
        if step % self._sampler.steps_per_epoch == 0:
            is_first = all(row["split"] == "train" for row in meter.history)
            with self._pause("compiling and running the evaluation" if is_first else "evaluating"):
                values = self.evaluation_on(self._choice)(state.averaged)
            is_best = meter.end_epoch(step, self._choice, values)
            score = values[self._task.score]
            if self._choice != "test":
                if is_best and checkpoints is None:
                    self._best_variables = jax.device_get(state.averaged)
                if step == self._total_steps:
                    with self._pause("evaluating the test split"):
                        self._measure_test(state, meter, checkpoints)
        if checkpoints is not None:
            progress = dataclasses.asdict(meter.progress)
            record = dataclasses.replace(self._record, finished=step == self._total_steps, progress=progress)
            with self._pause("saving"):
                checkpoints.save(step, state, record, score)
                if step == self._total_steps:
                    checkpoints.wait()

    def _measure_test(self, state, meter, checkpoints):
        """Evaluates on the test split the best epoch, which the validation split chose, and the last epoch."""
        evaluate, best = self.evaluation_on("test"), meter.progress.evaluations["best"]["epoch"]
        best_step, last = best * self._sampler.steps_per_epoch, (self._total_steps, evaluate(state.averaged))
        entries = {"best": last, "last": last}
        if best_step != self._total_steps:
            try:
                variables = self._best_variables if checkpoints is None else checkpoints.read(best_step)
                entries["best"] = best_step, evaluate(self._setup.devices.replicate(variables))
            except UserError as error:  # This is no reason to lose the last epoch.
                self._say(f"the best epoch, {best}, cannot be measured, the last one stands in its place: {error}")
        meter.end_test(entries)


def _drain(pending, meter):
    while pending:
        meter.add(*pending.popleft())
