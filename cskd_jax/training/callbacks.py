"""What watches a training: log, progress bar and console."""

import dataclasses
import pathlib
import time

import jax
import ml_collections
import numpy as np

from cskd_jax.console import progress_bar, say
from cskd_jax.errors import DivergedError
from cskd_jax.runs.build import Sampler
from cskd_jax.training.metrics import Task
from cskd_jax.training.records import MetricsLog


@dataclasses.dataclass
class Progress:
    """What a phase has to remember beside its arrays; saved with every checkpoint as JSON.

    Attributes:
      evaluations: {"last": ..., "best": ...}, each {"epoch", the metrics of the task, "loss"}; empty before the first.
      sums: of the training metrics since the last row of the log.
      count: steps in `sums`.
      seconds: spent in training steps, over all the starts of the run, without compilation.
      images: trained on in `seconds`.
    """

    evaluations: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    count: int = 0
    seconds: float = 0.0
    images: int = 0

    @property
    def images_per_second(self) -> float | None:
        """Training speed; None before it is known."""
        return self.images / self.seconds if self.seconds else None


class Meter:
    """Takes what steps and evaluations measure to the log, the progress bar and the console; a context manager.

    Args:
      phase: "teacher" or "student".
      config: of the run.
      task: says which metrics are shown, and which epoch is best.
      sampler: of the phase.
      total_steps: of the phase.
      workdir: of the run.
      step: where the phase starts or resumes.
      progress: of the phase, kept up to date.
    """

    def __init__(
        self,
        phase: str,
        config: ml_collections.ConfigDict,
        task: Task,
        sampler: Sampler,
        total_steps: int,
        workdir: pathlib.Path,
        step: int,
        progress: Progress,
    ):
        self.progress = progress
        self._phase, self._log_every, self._steps_per_epoch = phase, config.log_every, sampler.steps_per_epoch
        self._task = task
        self._epochs = total_steps // sampler.steps_per_epoch
        self._optimizer = config.optimizer
        self._log = MetricsLog(workdir, phase, step)
        self._bar = progress_bar(phase, sampler.images_before(total_steps), sampler.images_before(step), "images")
        self._clock = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
        self._log.close()

    def start_clock(self) -> None:
        """Evaluation, saving and compilation before this do not count as training time."""
        self._clock = time.perf_counter()

    def add(self, step: int, images: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step, waiting for it if it still runs.

        Args:
          step: its number, from 1.
          images: that it trained on.
          metrics: scalars on the device.

        Raises:
          DivergedError: a metric is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._check_finite(step, values)
        now, progress = time.perf_counter(), self.progress
        progress.seconds += now - self._clock
        progress.images += images
        self._clock = now
        for name, value in values.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        progress.count += 1
        self._bar.update(images)
        shown = {name: f"{values[name]:.3f}" for name in ("loss", self._task.step_metric)}
        self._bar.set_postfix(shown, refresh=False)
        if step % self._log_every == 0 or step % self._steps_per_epoch == 0:
            row = {name: total / progress.count for name, total in progress.sums.items()}
            row["learning_rate"] = self._learning_rate(step)
            self._log.write("train", step, -(-step // self._steps_per_epoch), row)
            progress.sums, progress.count = {}, 0

    def end_epoch(self, step: int, values: dict[str, float]) -> None:
        """Takes the evaluation after the last step of an epoch."""
        self._check_finite(step, {f"test {name}": value for name, value in values.items()})
        epoch = step // self._steps_per_epoch
        self._log.write("test", step, epoch, values)
        entry, evaluations = {"epoch": epoch, **values}, self.progress.evaluations
        score = self._task.score
        if "best" not in evaluations or values[score] > evaluations["best"][score]:
            evaluations["best"] = entry
        evaluations["last"] = entry
        rate = self.progress.images_per_second
        say(
            f"{self._phase}: epoch {epoch}/{self._epochs}, test loss {values['loss']:.4f}, "
            f"{self._task.describe(values)}" + (f", {rate:,.0f} images/s" if rate else "")
        )

    def _learning_rate(self, step):
        """Of a step, computed on the host: on a device it would queue behind the steps in flight."""
        epoch = (step - 1) // self._steps_per_epoch
        passed = sum(milestone <= epoch for milestone in self._optimizer.milestones)
        return self._optimizer.learning_rate * self._optimizer.decay_factor**passed

    def _check_finite(self, step, values):
        wrong = [name for name, value in values.items() if not np.isfinite(value)]
        if wrong:
            # Terms (METHOD/TERM) say more about where it came from than methods, and these more than the total.
            culprit = max(wrong, key=lambda name: (name.count("/"), name != "loss"))
            raise DivergedError(
                f"{self._phase}: {culprit} is {values[culprit]} at step {step}; the last checkpoint is kept; "
                "a lower optimizer.learning_rate may help"
            )
