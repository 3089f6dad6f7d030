"""The meter that measures training, and callbacks that show or record what it measures."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cskd_jax import console
from cskd_jax.errors import DivergedError, printable
from cskd_jax.training.metrics import Task

# Fields of every history row other than the metrics.
ROW_KEYS = {"phase", "split", "step", "epoch"}
Row = dict[str, Any]


@dataclasses.dataclass
class Progress:
    """The training state other than its arrays, which is saved as JSON with every checkpoint.

    Attributes:
      evaluations: {"last": ..., "best": ...}, each {"epoch", the metrics of the task, "loss"}, on the split that
        chooses the best epoch; empty before the first evaluation.
      test: The same on the test split after training, if another split chose the best epoch; otherwise empty.
      sums: Sums of the training metrics since the last row of the history.
      count: Number of steps in `sums`.
      seconds: Seconds spent in training steps, over all starts of the run, excluding compilation.
      images: Number of images trained on in `seconds`.
    """

    evaluations: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    test: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    count: int = 0
    seconds: float = 0.0
    images: int = 0

    def __post_init__(self):
        if "accuracy" in self.sums:  # Earlier versions used this name.
            self.sums["top1"] = self.sums.pop("accuracy")

    @property
    def images_per_second(self) -> float | None:
        """Returns the training speed; None before it is known."""
        return self.images / self.seconds if self.seconds else None


class Start(NamedTuple):
    """The information that a callback gets when training starts or resumes.

    Attributes:
      student: Name of the student.
      step: Number of steps already done.
      steps: Total number of steps.
      steps_per_epoch: Number of steps in an epoch.
      images_done: Number of images trained on in the steps already done.
      images: Total number of images to train on.
      task: Task that defines the metrics of the student.
      progress: Measurements so far, which are kept up to date.
      learning_rate: Function from a step number, counted from 1, to its learning rate, or to None if it is unknown. It
        may wait for a device, so it should not be called at every step.
      together: Number of students that are trained together.
    """

    student: str
    step: int
    steps: int
    steps_per_epoch: int
    images_done: int
    images: int
    task: Task
    progress: Progress
    learning_rate: Callable[[int], float | None]
    together: int = 1


class Callback:
    """A base class for callbacks. Subclasses override the methods that they need; the others do nothing.

    All values are Python numbers, so reading them never waits for a device.
    """

    def on_message(self, message: str) -> None:
        """Receives a line of text about what is about to happen or about the results."""

    def pause(self, what: str) -> contextlib.AbstractContextManager:
        """Returns a context for something other than training that may take a while.

        Args:
          what: Description of what happens, such as "student: evaluating".
        """
        del what
        return contextlib.nullcontext()

    def on_start(self, start: Start) -> None:
        """Handles the start or resumption of the training of a student."""

    def on_step(self, step: int, images: int, metrics: Mapping[str, float]) -> None:
        """Handles a finished step, once its metrics are available.

        Args:
          step: Step number, counted from 1.
          images: Number of images that it trained on.
          metrics: "loss", every term of the loss by name, "gradient_norm" and, if there are labels, a metric of the
            student. Terms that are not finite, which only losses that are switched off may have, are left out.
        """

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Handles a row of the history: means over training steps, or an evaluation.

        Args:
          row: "phase" (name of the student), "split", "step", "epoch" and the metrics.
        """

    def on_end(self) -> None:
        """Handles the end of the training of the student, however it ends."""


class Console(Callback):
    """A callback that prints messages, epochs, and progress: a bar on a terminal, otherwise a line every minute.

    Args:
      clock: Function that returns the time in seconds.
      say: Function that shows a line of text. None prints it; if a function is given, neither a progress bar nor pauses
        are shown.
    """

    _BAR_SECONDS, _LINE_SECONDS = 0.5, 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] | None = None):
        self._clock, self._prints = clock, say is None
        self._say = console.say if say is None else say

    def on_message(self, message: str) -> None:
        """Shows the message."""
        self._say(message)

    def pause(self, what: str) -> contextlib.AbstractContextManager:
        """Announces the pause and, on a terminal, counts its seconds."""
        return console.pause(what) if self._prints else contextlib.nullcontext()

    def on_start(self, start: Start) -> None:
        """Opens the progress bar."""
        self._start, self._images = start, start.images_done
        self._epochs = start.steps // start.steps_per_epoch
        # Only the speed of this start is shown, because an earlier one may have used another device.
        self._before = start.progress.images, start.progress.seconds
        self._evaluations, self._first_pauses, self._pause_seconds = 0, 0.0, 0.0
        self._train_row: Mapping[str, Any] = {}
        self._bar = console.progress_bar(start.images, start.images_done, shown=self._prints)
        self._bar.set_description_str(printable(start.student))
        self._begin = self._last_line = self._clock()
        self._last_shown = -self._BAR_SECONDS

    def on_step(self, step: int, images: int, metrics: Mapping[str, float]) -> None:
        """Shows progress: in the bar on a terminal, as a line every minute elsewhere."""
        now = self._clock()
        self._images += images
        epoch = f"epoch {-(-step // self._start.steps_per_epoch)}/{self._epochs}"
        if not self._bar.disable and now - self._last_shown >= self._BAR_SECONDS:
            self._last_shown, self._bar.n = now, self._images
            self._bar.set_description_str(printable(f"{self._start.student}: {epoch}, {self._describe(step)}"))
        if now - self._last_line >= self._LINE_SECONDS and not (self._prints and console.is_live()):
            self._last_line = now
            self._say(f"{self._start.student}: {epoch}, step {step:,}/{self._start.steps:,}, {self._describe(step)}")

    def _describe(self, step):
        """Returns the means since the last row of the history, the learning rate, the speed, and the time left."""
        sums, count = self._start.progress.sums, self._start.progress.count
        means = {name: total / count for name, total in sums.items()}
        measured = self._start.task.describe(means)  # Nothing, without labels.
        parts = [f"loss {means['loss']:.4f}", measured and f"train {measured}"]
        learning_rate = self._start.learning_rate(step)
        if learning_rate is not None:
            parts.append(f"learning rate {learning_rate:.4g}")
        return ", ".join(part for part in [*parts, *self._describe_speed(step)] if part)

    def _describe_speed(self, step):
        images, seconds = self._start.progress.images - self._before[0], self._start.progress.seconds - self._before[1]
        if not images or not seconds:
            return []
        images_left, speed = self._start.images - self._images, f"{images / seconds:,.0f} images/s"
        if not images_left:
            return [speed]
        epochs_left = self._epochs - step // self._start.steps_per_epoch
        left = images_left * seconds / images + epochs_left * self._pause_seconds
        return [speed, f"{console.duration(left)} left"]

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Prints a line for every evaluation."""
        if row["split"] == "train":
            self._train_row = row
            return
        # Mean time of evaluating and saving; the first epoch does not count, since it also compiles.
        pauses = self._clock() - self._begin - (self._start.progress.seconds - self._before[1])
        if self._evaluations:
            self._pause_seconds = (pauses - self._first_pauses) / self._evaluations
        else:
            self._first_pauses = pauses
        self._evaluations += 1
        split, parts = row["split"], []
        if self._train_row.get("step") == row["step"]:
            parts.append(f"train loss {self._train_row['loss']:.4f}")
        parts += [f"{split} loss {row['loss']:.4f}", f"{split} {self._start.task.describe(row)}"]
        parts += self._describe_speed(row["step"])
        self._say(f"{row['phase']}: epoch {row['epoch']}/{self._epochs}, {', '.join(parts)}")

    def on_end(self) -> None:
        """Closes the progress bar."""
        self._bar.close()


class Meter:
    """A context manager that measures the training of a student and informs the callbacks.

    Args:
      start: Information that the callbacks get first.
      callbacks: Callbacks.
      log_every: Number of steps between two rows of the history.

    Attributes:
      progress: Progress from `start`.
      history: Rows since the start or resumption.
    """

    def __init__(
        self,
        start: Start,
        callbacks: Sequence[Callback],
        log_every: int,
    ):
        self.progress, self.history = start.progress, []
        self._start, self._callbacks = start, callbacks
        self._log_every = log_every
        self._clock = 0.0

    def __enter__(self):
        with contextlib.ExitStack() as started:
            for callback in self._callbacks:
                callback.on_start(self._start)
                started.callback(callback.on_end)
            self._started = started.pop_all()
        return self

    def __exit__(self, *_):
        self._started.close()

    def start_clock(self) -> None:
        """Restarts the clock, so that earlier evaluation, saving and compilation do not count as training time."""
        self._clock = time.perf_counter()

    def add(self, step: int, images: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step, waiting for it if it is still running.

        Args:
          step: Step number, counted from 1.
          images: Number of images that it trained on.
          metrics: Scalars on the device.

        Raises:
          DivergedError: The total loss or the norm of its gradient is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not np.isfinite([values["loss"], values.get("gradient_norm", 0.0)]).all():
            self._check_finite(step, values)
        # Any other values that are not finite belong to losses that are switched off: they are left out of the rows.
        values = {name: value for name, value in values.items() if np.isfinite(value)}
        now, progress = time.perf_counter(), self.progress
        progress.seconds += now - self._clock
        progress.images += images
        self._clock = now
        known = progress.sums if progress.count else values
        progress.sums = {name: progress.sums.get(name, 0.0) + x for name, x in values.items() if name in known}
        progress.count += 1
        for callback in self._callbacks:
            callback.on_step(step, images, values)
        if step % self._log_every == 0 or step % self._start.steps_per_epoch == 0:
            row = {name: total / progress.count for name, total in progress.sums.items()}
            learning_rate = self._start.learning_rate(step)
            if learning_rate is not None:
                row["learning_rate"] = learning_rate
            self._add_row("train", step, -(-step // self._start.steps_per_epoch), row)
            progress.sums, progress.count = {}, 0

    def end_epoch(self, step: int, split: str, values: dict[str, float]) -> bool:
        """Adds the evaluation after the last step of an epoch and returns whether it is the best so far."""
        self._check_finite(step, {f"{split} {name}": value for name, value in values.items()})
        epoch = step // self._start.steps_per_epoch
        entry, evaluations = {"epoch": epoch, **values}, self.progress.evaluations
        score = self._start.task.score
        is_best = "best" not in evaluations or values[score] > evaluations["best"][score]
        if is_best:
            evaluations["best"] = entry
        evaluations["last"] = entry
        self._add_row(split, step, epoch, values)
        return is_best

    def end_test(self, entries: Mapping[str, tuple[int, dict[str, float]]]) -> None:
        """Adds the evaluations on the test split at the end.

        Args:
          entries: {"best": (its step, metrics), "last": (its step, metrics)}.
        """
        epochs = {name: step // self._start.steps_per_epoch for name, (step, _) in entries.items()}
        self.progress.test = {name: {"epoch": epochs[name], **values} for name, (_, values) in entries.items()}
        for step, values in dict(entries.values()).items():
            self._add_row("test", step, step // self._start.steps_per_epoch, values)

    def _add_row(self, split, step, epoch, values):
        row = {"phase": self._start.student, "split": split, "step": step, "epoch": epoch, **values}
        self.history.append(row)
        for callback in self._callbacks:
            callback.on_row(row)

    def _check_finite(self, step, values):
        wrong = [name for name, value in values.items() if not np.isfinite(value)]
        if wrong:
            # Terms (LOSS/TERM) locate the cause better than losses do, and losses better than the total.
            culprit = max(wrong, key=lambda name: (name.count("/"), name != "loss"))
            raise DivergedError(
                f"{self._start.student}: {culprit} is {values[culprit]} at step {step}; earlier checkpoints, if any, "
                "are kept; a lower learning rate may help"
            )
