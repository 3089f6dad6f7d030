"""The loop: trains one network to the end of its epochs, evaluates, logs, saves, resumes."""

import dataclasses
import pathlib
import time
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from cskd_jax import optim, parallel
from cskd_jax.checkpoint import FOLDER, Checkpoints
from cskd_jax.data import ImageDataset
from cskd_jax.data.augment import augment, make_normalize
from cskd_jax.data.samplers import UniformSampler
from cskd_jax.errors import DivergedError, InterruptedRun, UserError
from cskd_jax.logging import MetricsLog, progress_bar, say
from cskd_jax.models import count_parameters, create_model
from cskd_jax.objective import Objective
from cskd_jax.signals import StopRequest
from cskd_jax.state import TrainState, init_state
from cskd_jax.steps import make_eval_step, make_train_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of the run with the description that its checkpoints carry."""

    module: nn.Module
    name: str
    width: float

    @classmethod
    def create(cls, settings: ml_collections.ConfigDict, num_classes: int, dtype: str):
        """From `config.teacher` or `config.student`."""
        module = create_model(
            settings.name, num_classes=num_classes, width=settings.width, dtype=DTYPES[dtype], axis_name=parallel.AXIS
        )
        return cls(module, settings.name, float(settings.width))

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be this network."""
        return {"name": self.name, "width": self.width, "num_classes": self.module.num_classes}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A trained network and its variables, on every device."""

    network: Network
    variables: Any


@dataclasses.dataclass
class Progress:
    """What a phase has to remember beside its arrays; saved with every checkpoint as JSON.

    Attributes:
      evaluations: {"last": ..., "best": ...}, each {"epoch", "top1", "top5", "loss"}; empty before the first.
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


class Phase:
    """Training of one network.

    Args:
      name: "teacher" or "student".
      config: of the run.
      network: to train.
      losses: as `config.losses`.
      epochs: to train for.
      dataset: in memory.
      workdir: of the run; the phase keeps its checkpoints in WORKDIR/NAME.
      teacher: for the losses that need one.
    """

    def __init__(
        self,
        name: str,
        config: ml_collections.ConfigDict,
        network: Network,
        losses: Any,
        epochs: int,
        dataset: ImageDataset,
        workdir: pathlib.Path,
        teacher: Teacher | None = None,
    ):
        self.name, self.config, self.network, self.epochs = name, config, network, epochs
        self.dataset, self.workdir, self.teacher = dataset, workdir, teacher
        self.sampler = UniformSampler(len(dataset.train.labels), config.batch_size, config.seed, config.drop_last)
        _check_last_batch(self.sampler)
        spe = self.sampler.steps_per_epoch
        self.total_steps = epochs * spe
        self.schedule = optim.step_schedule(
            config.optimizer.learning_rate, config.optimizer.milestones, config.optimizer.decay_factor, spe
        )
        self._optimizer = optim.make_optimizer(**config.optimizer, steps_per_epoch=spe)
        self._objective = Objective.create(losses, num_classes=dataset.num_classes, axis_name=parallel.AXIS)
        self._teacher_module = teacher.network.module if teacher is not None else None
        normalize = make_normalize(config.dataset.mean, config.dataset.std)
        settings = dict(config.augment)
        step = make_train_step(
            network.module,
            self._objective,
            self._optimizer,
            preprocess=lambda images, key, positions: normalize(augment(images, key, positions, **settings)),
            teacher=self._teacher_module,
            axis_name=parallel.AXIS,
        )
        self._train_step = parallel.parallel_train_step(step)
        self._evaluate = Evaluation(network, config, dataset)
        # One key for the weights, one for augmentation; the same for every method of a seed, so that runs pair up.
        key = jax.random.fold_in(jax.random.PRNGKey(config.seed), name == "student")
        self._init_key, self._key = jax.random.split(key)
        self._abstract_state = self._trace()

    def _new_state(self) -> TrainState:
        return init_state(
            self._init_key, self.network.module, self._objective, self._optimizer,
            self.dataset.image_shape, self._teacher_module,
        )  # fmt: skip

    def _trace(self):
        """Shapes of the state; whatever does not fit in networks and losses shows here, before anything compiles."""
        variables = self.teacher.variables if self.teacher is not None else None
        try:
            state = jax.eval_shape(self._new_state)
            jax.eval_shape(self._train_step, state, variables, self._batch(0), self._key)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name}: {str(error).strip().splitlines()[0]}") from error
        return state

    def _batch(self, step):
        index = self.sampler.indices(step)
        split = self.dataset.train
        return parallel.shard({"image": split.images[index], "label": split.labels[index]})

    def run(self, stop: StopRequest) -> tuple[Any, Progress]:
        """Trains to the end from the newest checkpoint; returns the network's variables and what was measured."""
        checkpoints = Checkpoints(self.workdir / self.name / FOLDER, self.config.keep_checkpoints)
        try:
            restored = checkpoints.restore(self._abstract_state)
            if restored is None:
                state, progress = jax.jit(self._new_state)(), Progress()
            else:
                state, progress = restored[0], Progress(**restored[1]["progress"])
            step = int(state.step)
            if step < self.total_steps:
                self._announce(step)
                state = parallel.replicate(state)
                log = MetricsLog(self.workdir, self.name, step)
                try:
                    state = self._train(state, step, progress, checkpoints, log, stop)
                finally:
                    log.close()
            checkpoints.wait()
        finally:
            checkpoints.close()
        return state.student_variables, progress

    def _announce(self, step):
        size = count_parameters(self._abstract_state.params["student"])
        verb = "training" if step == 0 else f"resuming at step {step} of {self.total_steps}:"
        say(f"{self.name}: {verb} {self.network.name}, width {self.network.width:g}, {size:,} parameters, "
            f"{self.epochs} epochs of {self.sampler.steps_per_epoch} steps")  # fmt: skip

    def _train(self, state, step, progress, checkpoints, log, stop):
        """From `step` to the end, epoch by epoch; raises InterruptedRun once `stop` is set and the state is saved."""
        bar = progress_bar(
            self.name, self.total_steps * self.config.batch_size, step * self.config.batch_size, "images"
        )
        record = {"network": self.network.identity, "method": self.config.method}
        with bar:
            while step < self.total_steps:
                state, step = self._train_epoch(state, step, progress, log, bar, stop)
                score = None
                end_of_epoch = step % self.sampler.steps_per_epoch == 0
                if end_of_epoch:
                    score = self._evaluate_epoch(state, step, progress, log)
                checkpoints.save(step, state, record | {"progress": dataclasses.asdict(progress)}, score)
                if stop.requested and step < self.total_steps:
                    checkpoints.wait()
                    raise InterruptedRun(f"stopped by {stop.name} at step {step} of the {self.name}, saved: "
                                         "run the same command again to resume")  # fmt: skip
        return state

    def _train_epoch(self, state, step, progress, log, bar, stop):
        """Up to the end of the epoch, or the step after which a stop was requested."""
        variables = self.teacher.variables if self.teacher is not None else None
        pending = deque()
        meter = StepMeter(self, progress, log, bar)
        end = (step // self.sampler.steps_per_epoch + 1) * self.sampler.steps_per_epoch
        while step < end and not stop.requested:
            batch = self._batch(step)
            state, metrics = self._train_step(state, variables, batch, self._key)
            step += 1
            pending.append((step, batch["label"].size, metrics))
            while pending and (len(pending) >= parallel.max_steps_in_flight() or pending[0][2]["loss"].is_ready()):
                meter.add(*pending.popleft())
        while pending:
            meter.add(*pending.popleft())
        return state, step

    def _evaluate_epoch(self, state, step, progress, log):
        """Evaluates, prints and logs the line of the epoch; returns the top-1 accuracy."""
        epoch = step // self.sampler.steps_per_epoch
        values = self._evaluate(state.student_variables)
        log.write("test", step, epoch, values)
        entry = {"epoch": epoch, **values}
        progress.evaluations["last"] = entry
        best = progress.evaluations.get("best")
        if best is None or values["top1"] > best["top1"]:
            progress.evaluations["best"] = entry
        rate = f", {progress.images / progress.seconds:,.0f} images/s" if progress.seconds else ""
        say(f"{self.name}: epoch {epoch}/{self.epochs}, test loss {values['loss']:.4f}, "
            f"top-1 {values['top1']:.4f}, top-5 {values['top5']:.4f}{rate}")  # fmt: skip
        return values["top1"]


class StepMeter:
    """Takes the metrics of finished steps to the log and the progress bar, and stops training where they are not finite."""

    def __init__(self, phase: Phase, progress: Progress, log: MetricsLog, bar: Any):
        self._phase, self._progress, self._log, self._bar = phase, progress, log, bar
        # The first step of a start compiles: its time says nothing about the speed.
        self._clock = None

    def add(self, step: int, images: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for the step if it is still running."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        wrong = [name for name, value in values.items() if not np.isfinite(value)]
        if wrong:
            # The total is the sum of the rest: what is named first is where it came from.
            culprit = next((name for name in wrong if name != "loss"), "loss")
            raise DivergedError(f"{self._phase.name}: {culprit} is {values[culprit]} at step {step}; "
                                "the last checkpoint is kept; a lower learning rate may help")  # fmt: skip
        now, progress = time.perf_counter(), self._progress
        if self._clock is not None:
            progress.seconds += now - self._clock
            progress.images += images
        self._clock = now
        for name, value in values.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        progress.count += 1
        self._bar.update(images)
        self._bar.set_postfix(loss=f"{values['loss']:.3f}", accuracy=f"{values['accuracy']:.3f}", refresh=False)
        steps_per_epoch = self._phase.sampler.steps_per_epoch
        if step % self._phase.config.log_every == 0 or step % steps_per_epoch == 0:
            row = {name: total / progress.count for name, total in progress.sums.items()}
            row["learning_rate"] = float(self._phase.schedule(step - 1))
            self._log.write("train", step, -(-step // steps_per_epoch), row)
            progress.sums, progress.count = {}, 0


class Evaluation:
    """Evaluates a network on the whole test split: batches of one size, the last one padded and masked."""

    def __init__(self, network: Network, config: ml_collections.ConfigDict, dataset: ImageDataset):
        normalize = make_normalize(config.dataset.mean, config.dataset.std)
        step = make_eval_step(network.module, preprocess=normalize, axis_name=parallel.AXIS)
        self._step, self._split, self._batch_size = parallel.parallel_eval_step(step), dataset.test, config.batch_size

    def __call__(self, variables: Any) -> dict[str, float]:
        """{"top1", "top5": fractions of the split, "loss": mean cross-entropy}."""
        pending, totals = deque(), {}
        for start in range(0, len(self._split.labels), self._batch_size):
            images = self._split.images[start : start + self._batch_size]
            padding = self._batch_size - len(images)
            batch = {
                "image": np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0))),
                "label": np.pad(self._split.labels[start : start + self._batch_size], (0, padding)),
                "mask": np.arange(self._batch_size) < len(images),
            }
            pending.append(self._step(variables, parallel.shard(batch)))
            if len(pending) >= parallel.max_steps_in_flight():
                _add(totals, pending.popleft())
        while pending:
            _add(totals, pending.popleft())
        count = totals.pop("count")
        assert count == len(self._split.labels)
        return {name: float(total) / int(count) for name, total in totals.items()}


def _add(totals, sums):
    for name, value in jax.device_get(sums).items():
        totals[name] = totals.get(name, 0) + value


def _check_last_batch(sampler: UniformSampler) -> None:
    if sampler.steps_per_epoch == 0:
        raise UserError(f"batch_size {sampler.batch_size} is more than the {sampler.num_examples} training examples "
                        "and drop_last is set: an epoch would have no step")  # fmt: skip
    if not sampler.drop_last:
        parallel.check_batch_size("the last batch of an epoch (drop_last=True leaves it out)", sampler.last_batch_size)
