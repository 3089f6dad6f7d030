"""One student in the training loop: its state, its steps, its evaluations, and its checkpoints."""

import contextlib
import dataclasses
import math
from collections import deque
from concurrent.futures import Executor
from typing import Any

import jax
import jax.numpy as jnp

from cskd_jax.console import counted
from cskd_jax.distributed import processes
from cskd_jax.errors import UserError
from cskd_jax.models import count_parameters
from cskd_jax.training.callbacks import Meter, Progress, Row, Start
from cskd_jax.training.checkpoint import FOLDER, Checkpoints
from cskd_jax.training.evaluation import Evaluation
from cskd_jax.training.metrics import task_of
from cskd_jax.training.networks import Variables, draws_random_numbers
from cskd_jax.training.optimizers import learning_rate_of_step
from cskd_jax.training.peers import without_peers
from cskd_jax.training.programs import Programs
from cskd_jax.training.saved import Record
from cskd_jax.training.setup import Setup


class Participant:
    """A student in the training loop. As a context manager, it holds its checkpoints and logs.

    Args:
      name: Name of the student and of its folder in the workdir.
      programs: Compiled programs of its training.
      record: Description of the network for its checkpoints.
      setup: Setup of its trainer.

    Attributes:
      name: Name of the student.
      programs: Compiled programs of its training.
      record: Record of the first checkpoint.
      setup: Setup of its trainer.
      step: Number of steps done.
      steps: Total number of steps.
      state: The training state: numpy arrays after a checkpoint is restored, then arrays on the devices; None before
        that.
      progress: Progress of the training.
      history: Rows of the history since the start or resumption.
      error: Error that ended its training while the others continued; None if there was none.
    """

    def __init__(self, name: str, programs: Programs, record: Record, setup: Setup):
        self.name, self.programs, self.record, self.setup = name, programs, record, setup
        self.step, self.steps = 0, programs.parts[-1].end
        self.state: Any = None
        self.progress, self.history = Progress(), list[Row]()
        self.error: UserError | None = None
        self._steps_per_epoch = setup.sampler.steps_per_epoch
        self._task = task_of(setup.data.multilabel)
        self._evaluations: dict[str, Evaluation] = {}
        # The split on which the best epoch is chosen.
        self._choice = "test" if setup.data.validation is None else "validation"
        # Without a workdir, the variables of the best epoch are kept here until the test split is measured.
        self._best_variables: Variables | None = None
        self._checkpoints: Checkpoints | None = None
        self._meter: Meter | None = None
        # Numbers of steps done at the last call of `rest` and at the last checkpoint, or at the start if there was
        # none.
        self._rested = self._saved = 0
        # Score of the state after `_rested` steps.
        self._score = -math.inf
        self._pending: deque[tuple[int, int, Any]] = deque()

    @property
    def done(self) -> bool:
        """Returns whether there is nothing left to train."""
        return self.error is not None or self.step >= self.steps

    def __enter__(self):
        """Restores the newest checkpoint.

        Raises:
          UserError: The workdir holds a longer training.
        """
        self._stack, is_longer = contextlib.ExitStack(), False
        if self.setup.workdir is not None:
            folder = self.setup.workdir / self.name / FOLDER
            checkpoints = Checkpoints(folder, self.setup.keep_checkpoints, self.setup.save_every_minutes)
            self._checkpoints = self._stack.enter_context(checkpoints)
            restored = self._checkpoints.restore(lambda step: self.programs.states[self._part_of(step - 1)])
            if restored is not None:
                self.state, self.progress = restored[0], Progress(**restored[1].progress)
                self.step = self._rested = self._saved = int(self.state.step)
                self._pending.clear()  # An earlier call was interrupted, and what was in flight is done again.
                is_longer = self.step > self.steps or (self.step == self.steps and not restored[1].finished)
        if is_longer:
            self._stack.close()
            raise UserError(
                f"{self.name}: the workdir holds a training run of more than the {self.steps} steps requested, with "
                f"{self.step} of them done; use another workdir"
            )
        return self

    def __exit__(self, *exception):
        # An error of this process alone must not wait for the others.
        self._stack.__exit__(*exception)

    def close(self) -> None:
        """Closes checkpoints and logs; may be called repeatedly."""
        self._stack.close()

    def say(self, message: str) -> None:
        """Sends a line of text to the callbacks."""
        self.setup.say(f"{self.name}: {message}")

    def pause(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Returns a context for something other than training, which the callbacks are told about."""
        return self.setup.pause(f"{self.name}: {what}")

    def say_what_depends_on_devices(self) -> None:
        """Reports a missing training mode, and why results depend on the number of devices if they do."""
        count, state, network = self.setup.devices.count, self.programs.states[0], self.programs.network.on_axis(None)
        if state.collections and not getattr(network, "has_training_mode", True):
            self.say("the network has no argument for training mode: it is always called the same way")
        if count == 1:
            return
        images = jax.ShapeDtypeStruct((2, *self.setup.data.image_shape), jnp.float32)
        causes = []
        if not network.synchronized:
            causes = [f"its {name} are computed on each device's part of a batch" for name in state.collections]
        by_position = getattr(network, "draws_by_position", False)
        if not by_position and draws_random_numbers(network, state.variables, images):
            causes.append("it draws random numbers on each device")
        if causes:
            self.say(f"results depend on the number of devices, {count}: {', and '.join(causes)}")

    def _announce(self):
        """Announces what is about to be trained."""
        size = count_parameters(without_peers(self.programs.states[0].variables)["params"])
        verb = "training" if self.step == 0 else f"resuming at step {self.step} of {self.steps}:"
        epochs = self.steps // self._steps_per_epoch
        self.say(
            f"{verb} {self.record.describe_network()}, {size:,} parameters, "
            f"{counted(epochs, 'epoch')} of {counted(self._steps_per_epoch, 'step')}"
        )

    def compile(self, size: int, pool: Executor) -> None:
        """Compiles the next step in the background, and the program that makes a new state if there is none."""
        self.programs.compile(self._part_of(self.step), size, pool)
        if self.state is None:
            self.programs.compile_init(pool)

    def memory(self, size: int) -> tuple[int, int]:
        """Returns the bytes that the student takes on a device, and the additional bytes that a step takes."""
        return self.programs.memory(self._part_of(self.step), size)

    def compile_ahead(self, pool: Executor) -> None:
        """Compiles what the rest of the epoch, its evaluation and later phases will need, in the background."""
        number = self._part_of(self.step)
        self.programs.compile(number, self.setup.sampler.last_batch_size, pool)
        self.evaluation_on(self._choice).compile(self.programs.variables_of(self.programs.states[0]), pool)
        for later in range(number + 1, len(self.programs.parts)):
            self.programs.compile(later, self.setup.sampler.batch_size, pool)

    def wait_for_compiler(self, size: int) -> None:
        """Waits until the next step is compiled for a global batch of `size`."""
        self.programs.compiled(self._part_of(self.step), size)

    def is_compiled(self, size: int) -> bool:
        """Returns whether the next step is compiled for a global batch of `size`."""
        return self.programs.is_compiled(self._part_of(self.step), size)

    def begin(self, together: int) -> None:
        """Puts a new state, or the state of a checkpoint, on the devices and starts measuring.

        Args:
          together: Number of students that are trained together.
        """
        self._announce()
        state = self.programs.init() if self.state is None else self.state
        self.state = self.setup.devices.replicate(state)
        sampler = self.setup.sampler
        start = Start(
            student=self.name,
            step=self.step,
            steps=self.steps,
            steps_per_epoch=self._steps_per_epoch,
            images_done=sampler.images_before(self.step),
            images=sampler.images_before(self.steps),
            task=self._task,
            progress=self.progress,
            learning_rate=self._learning_rate,
            together=together,
        )
        self._meter = self._stack.enter_context(Meter(start, self.setup.callbacks, self.setup.log_every))
        self.history = self._meter.history

    @property
    def _running_meter(self) -> Meter:
        assert self._meter is not None, "`begin` comes first"
        return self._meter

    def start_clock(self) -> None:
        """Restarts the clock, so that earlier work does not count as training time."""
        self._running_meter.start_clock()

    def train_step(self, size: int, batch: dict[str, Any]) -> None:
        """Dispatches the next step on the output of the teacher pass, plus the rest of the batch.

        Raises:
          DivergedError: The loss of this step or its gradient, or those of an earlier one that was in flight, are not
            finite.
        """
        number = self._part_of(self.step)
        if self.step and self.step == self.programs.parts[number].start and self.programs.parts[number].fresh:
            self.state = self.programs.with_fresh_optimizer(number, self.state)
        self.state, metrics = self.programs.step(number, size, self.state, batch)
        self.step += 1
        self._pending.append((self.step, size, metrics))
        # Metrics of finished steps are read without waiting; only a step too far ahead of the devices waits. Several
        # processes must not read them as soon as they are ready: one would see that the loss has diverged before
        # another, which would wait forever for its part of the next step.
        limit, alone = self.setup.devices.steps_in_flight, not processes.is_distributed()
        while self._pending and (len(self._pending) >= limit or (alone and self._pending[0][2]["loss"].is_ready())):
            self._running_meter.add(*self._pending.popleft())

    def drain(self) -> None:
        """Waits for the steps in flight; raises DivergedError like `train_step`."""
        while self._pending:
            self._running_meter.add(*self._pending.popleft())

    def rest(self, *, stopping: bool) -> None:
        """Evaluates and saves what is due after an epoch.

        Args:
          stopping: Whether training is about to stop, possibly within an epoch; everything that is not yet saved is
            then saved.
        """
        is_best = False
        if self.step != self._rested:
            self._rested, self._score = self.step, -math.inf  # A step that is not evaluated is never the best.
            epoch, within = divmod(self.step, self._steps_per_epoch)
            if self.done or (within == 0 and epoch % self.setup.evaluate_every_epochs == 0):
                self._score, is_best = self._evaluate()
        if self._checkpoints is not None and self.step != self._saved:
            with self.pause("saving"):
                self._save(self._checkpoints, is_best, at_once=stopping or self.done)

    def _evaluate(self):
        """Evaluates the epoch on the split that chooses the best; returns (score, whether it is the best so far)."""
        meter, variables = self._running_meter, self.programs.variables_of(self.state)
        with self.pause("evaluating"):
            values = self.evaluation_on(self._choice)(variables)
        is_best = meter.end_epoch(self.step, self._choice, values)
        if self._choice != "test":
            if is_best and self._checkpoints is None:
                self._best_variables = jax.device_get(variables)
            if self.done:
                with self.pause("evaluating the test split"):
                    self._measure_test(meter)
        return values[self._task.score], is_best

    def _save(self, checkpoints, is_best, *, at_once):
        progress = dataclasses.asdict(self._running_meter.progress)
        record = dataclasses.replace(self.record, finished=self.done, progress=progress)
        snapshot = self.step, self.state, record, self._score
        if at_once:
            checkpoints.save(*snapshot)
        if at_once or checkpoints.offer(*snapshot, is_best):
            self._saved = self.step
        if self.done:
            checkpoints.wait()

    def _measure_test(self, meter):
        """Evaluates both the best epoch, which the validation split chose, and the last epoch on the test split."""
        evaluate, best = self.evaluation_on("test"), meter.progress.evaluations["best"]["epoch"]
        variables = self.programs.variables_of(self.state)
        best_step, last = best * self._steps_per_epoch, (self.steps, evaluate(variables))
        entries = {"best": last, "last": last}
        if best_step != self.steps:
            try:
                variables = self._best_variables
                if self._checkpoints is not None:
                    template = self.programs.states[self._part_of(best_step - 1)]
                    variables = self._checkpoints.read(best_step, template, self.programs.variables_of)
                entries["best"] = best_step, evaluate(self.setup.devices.replicate(variables))
            except UserError as error:  # This is no reason to lose the last epoch.
                self.say(f"the best epoch, {best}, cannot be measured, so the last one is used instead: {error}")
        meter.end_test(entries)

    def evaluation_on(self, split: str) -> Evaluation:
        """Returns an evaluation on a split, "test", "train" or "validation"; raises UserError if there is none."""
        if split not in self._evaluations:
            data = self.setup.data
            splits = {"test": data.test, "train": data.train, "validation": data.validation}
            if splits.get(split) is None:
                names = ", ".join(name for name, found in splits.items() if found is not None)
                raise UserError(f"there is no split {split!r}; the splits are {names}")
            self._evaluations[split] = Evaluation(
                self.programs.predicting,
                splits[split],
                data.num_classes,
                normalize=self.setup.normalize,
                batch_size=self.setup.sampler.batch_size,
                devices=self.setup.devices,
            )
        return self._evaluations[split]

    def _part_of(self, step):
        """Returns the number of the phase that contains the step after the first `step` steps."""
        parts = self.programs.parts
        return next((number for number, part in enumerate(parts) if step < part.end), len(parts) - 1)

    def _learning_rate(self, step):
        """Returns the learning rate of a step, whose number is counted from 1."""
        part = self.programs.parts[self._part_of(step - 1)]
        return learning_rate_of_step(part.schedule, step - 1 - part.optimizer_start)
