"""The loop: trains one network to the end of its epochs, evaluates, logs, saves, resumes."""

import dataclasses
import math
import pathlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from cskd_jax import optim, parallel
from cskd_jax.checkpoint import FOLDER, Checkpoints
from cskd_jax.data import ImageDataset, read_batches
from cskd_jax.data.augment import augment, make_normalize
from cskd_jax.data.samplers import BalancedSampler, UniformSampler
from cskd_jax.errors import DivergedError, InterruptedRun, UserError
from cskd_jax.logging import MetricsLog, progress_bar, say
from cskd_jax.losses import LOSSES
from cskd_jax.metrics import Task, task_of
from cskd_jax.models import count_parameters, create_model
from cskd_jax.objective import Objective
from cskd_jax.signals import StopRequest
from cskd_jax.state import TrainState, init_network, init_state
from cskd_jax.steps import make_eval_step, make_train_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


Sampler = UniformSampler | BalancedSampler


def make_sampler(config: ml_collections.ConfigDict, dataset: ImageDataset) -> Sampler:
    """The sampler that `config.sampler` describes; UserError where the labels do not allow it."""
    labels = dataset.train.labels
    if config.sampler.name == "uniform":
        return UniformSampler(len(labels), config.batch_size, config.seed, config.drop_last)
    if dataset.multilabel:
        raise UserError(f"sampler.name is balanced, which does not fit the multi-label data set '{dataset.name}'")
    return BalancedSampler(labels, config.batch_size, config.sampler.samples_per_category, config.seed)


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
        return {"name": self.name, "width": self.width}


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


class Phase:
    """Training of one network.

    Args:
      name: "teacher" or "student".
      config: of the run.
      network: to train.
      losses: as `config.losses`.
      epochs: to train for.
      dataset: loaded.
      workdir: of the run; the phase keeps its checkpoints in WORKDIR/NAME.
      teacher: network for the losses that need one.

    Raises:
      UserError: networks, losses and data do not fit together; nothing has been compiled by then.
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
        teacher: Network | None = None,
    ):
        self._name, self._config, self._network, self._epochs = name, config, network, epochs
        self._dataset, self._workdir, self._teacher = dataset, workdir, teacher
        self._task = task_of(dataset.multilabel)
        _check_methods(losses, dataset)
        self._sampler = make_sampler(config, dataset)
        _check_batches(self._sampler)
        self._total_steps = epochs * self._sampler.steps_per_epoch
        self._objective = Objective.create(
            losses,
            num_classes=dataset.num_classes,
            axis_name=parallel.AXIS,
            num_examples=len(dataset.train.labels),
            steps_per_epoch=self._sampler.steps_per_epoch,
        )
        self._optimizer = optim.make_optimizer(**config.optimizer, steps_per_epoch=self._sampler.steps_per_epoch)
        self._train_step = self._make_train_step()
        self._evaluate = Evaluation(network, config, dataset)
        # One key for the weights, one for augmentation; the same for every method of a seed, so that runs pair up.
        key = jax.random.fold_in(jax.random.PRNGKey(config.seed), name == "student")
        self._init_key, self._key = jax.random.split(key)
        self._lower()
        self._max_in_flight = parallel.max_steps_in_flight()

    def _make_train_step(self):
        normalize = make_normalize(self._config.dataset.mean, self._config.dataset.std)
        settings = dict(self._config.augment)
        step = make_train_step(
            self._network.module,
            self._objective,
            self._optimizer,
            preprocess=lambda images, key, positions: normalize(augment(images, key, positions, **settings)),
            teacher=None if self._teacher is None else self._teacher.module,
            axis_name=parallel.AXIS,
            task=self._task,
        )
        return parallel.parallel_train_step(step)

    def _lower(self):
        """Traces a new state and a step; what does not fit together shows here, before anything compiles."""
        try:
            self._teacher_variables, teacher_output = None, None
            if self._teacher is not None:
                self._teacher_variables, teacher_output = jax.eval_shape(
                    lambda: init_network(self._teacher.module, self._init_key, self._dataset.image_shape)
                )

            def new_state():
                model, shape, labels = self._network.module, self._dataset.image_shape, self._dataset.train.labels
                label = jax.ShapeDtypeStruct(labels.shape[1:], labels.dtype)
                return init_state(self._init_key, model, self._objective, self._optimizer, shape, teacher_output, label)

            self._lowered_state = jax.jit(new_state).lower()
            self._abstract_state: TrainState = self._lowered_state.out_info
            self._lowered_step = self._lower_step(self._config.batch_size)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{self._name}: {str(error).strip().splitlines()[0]}") from error

    def _lower_step(self, size):
        """For a global batch of `size`."""
        split, rows = self._dataset.train, len(range(size)[parallel.local_rows(size)])
        batch = {
            "image": np.zeros((rows, *self._dataset.image_shape), np.uint8),
            "label": np.zeros((rows, *split.labels.shape[1:]), split.labels.dtype),
            "index": np.zeros(rows, np.int32),
        }
        arguments = self._abstract_state, self._teacher_variables, parallel.shard(batch), self._key
        return parallel.lower(self._train_step, *arguments)

    def _batches(self, step):
        """(size of the global batch, this process's rows of it) of each step from `step` on."""
        split, steps = self._dataset.train, range(step, self._total_steps)
        for step, images in zip(steps, read_batches(split.images, map(self._local_indices, steps)), strict=True):
            index = self._local_indices(step)
            batch = {"image": images, "label": split.labels[index], "index": index.astype(np.int32)}
            yield len(self._sampler.indices(step)), parallel.shard(batch)

    def _local_indices(self, step):
        index = self._sampler.indices(step)
        return index[parallel.local_rows(len(index))]

    def run(self, stop: StopRequest, teacher_variables: Any = None) -> tuple[Any, Progress]:
        """Trains to the end from the newest checkpoint.

        Args:
          stop: looked at after every step.
          teacher_variables: of the teacher, `parallel.replicate`d.

        Returns:
          The variables of the trained network, and what was measured on the way.

        Raises:
          InterruptedRun: `stop` was requested; the state is saved.
          DivergedError: a loss or gradient is not finite.
        """
        with Checkpoints(self._workdir / self._name / FOLDER, self._config.keep_checkpoints) as checkpoints:
            state, record = checkpoints.restore(self._abstract_state) or (None, {"progress": {}})
            progress = Progress(**record["progress"])
            step = 0 if state is None else int(state.step)
            if step < self._total_steps:
                self._announce(step)
                state = parallel.replicate(self._compile(state))
                with Meter(
                    self._name,
                    self._config,
                    self._task,
                    self._sampler,
                    self._total_steps,
                    self._workdir,
                    step,
                    progress,
                ) as meter:
                    batches = self._batches(step)
                    while step < self._total_steps:
                        begin = step
                        state, step = self._train_epoch(state, teacher_variables, step, batches, meter, stop)
                        if step > begin:
                            self._save(state, step, meter, checkpoints)
                        if stop.requested and step < self._total_steps:
                            raise InterruptedRun(
                                f"stopped by {stop.name}, saved at step {step} of the {self._name}: "
                                "the same command resumes"
                            )
        return state.student_variables, progress

    def by_category(self, variables: Any) -> tuple[dict[str, float], np.ndarray | None]:
        """{category: score} and confusions of the network on the test split, see `Task.by_category`."""
        scores, confusions = self._evaluate.by_category(parallel.replicate(variables))
        return dict(zip(self._dataset.categories, scores.tolist(), strict=True)), confusions

    def _announce(self, step):
        size = count_parameters(self._abstract_state.params["student"])
        verb = "training" if step == 0 else f"resuming at step {step} of {self._total_steps}:"
        say(
            f"{self._name}: {verb} {self._network.name}, width {self._network.width:g}, {size:,} parameters, "
            f"{self._epochs} epochs of {self._sampler.steps_per_epoch} steps"
        )

    def _compile(self, state):
        """Compiles the step and, where `state` is None, makes a new one meanwhile; returns the state."""
        start = time.perf_counter()
        with ThreadPoolExecutor() as pool:
            step = pool.submit(self._lowered_step.compile)
            if state is None:
                # Of one process: another kind of machine might round otherwise.
                state = parallel.on_first(lambda: jax.device_get(self._lowered_state.compile()()))
            # By batch size: the last batch of an epoch may be smaller.
            self._compiled = {self._config.batch_size: step.result()}
        say(f"{self._name}: compiled in {time.perf_counter() - start:.1f} s")
        return state

    def _train_epoch(self, state, teacher_variables, step, batches, meter, stop):
        """From `step` to the end of its epoch, or to the step after which a stop was requested."""
        pending = deque()
        meter.start_clock()
        end = (step // self._sampler.steps_per_epoch + 1) * self._sampler.steps_per_epoch
        while step < end and not stop.reached():
            size, batch = next(batches)
            if size not in self._compiled:
                # Compiling holds up the host: it should not count as time of the steps in flight, or of the next.
                _drain(pending, meter)
                self._compiled[size] = self._lower_step(size).compile()
                meter.start_clock()
            state, metrics = self._compiled[size](state, teacher_variables, batch, self._key)
            step += 1
            pending.append((step, size, metrics))
            # Metrics of finished steps are read without waiting; only a step too far ahead of the devices waits.
            while pending and (len(pending) >= self._max_in_flight or pending[0][2]["loss"].is_ready()):
                meter.add(*pending.popleft())
        _drain(pending, meter)
        return state, step

    def _save(self, state, step, meter, checkpoints):
        """Evaluates if an epoch has ended, and saves."""
        score = -math.inf  # what is saved in the middle of an epoch is never the best
        if step % self._sampler.steps_per_epoch == 0:
            values = self._evaluate(state.student_variables)
            meter.end_epoch(step, values)
            score = values[self._task.score]
        record = {
            "network": self._network.identity,
            "channels": self._dataset.image_shape[-1],
            "images": {
                "size": self._dataset.image_shape[:2],
                "mean": self._config.dataset.mean,
                "std": self._config.dataset.std,
            },
            "categories": self._dataset.categories,
            "multilabel": self._dataset.multilabel,
            "method": self._config.method,
            "finished": step == self._total_steps,
            "progress": dataclasses.asdict(meter.progress),
        }
        checkpoints.save(step, state, record, score)


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


class Evaluation:
    """Evaluates a network on the whole test split: batches of one size, the last one padded and masked."""

    def __init__(self, network: Network, config: ml_collections.ConfigDict, dataset: ImageDataset):
        normalize = make_normalize(config.dataset.mean, config.dataset.std)
        self._task = task_of(dataset.multilabel)
        step = make_eval_step(network.module, preprocess=normalize, axis_name=parallel.AXIS, task=self._task)
        self._step, self._split = parallel.parallel_eval_step(step), dataset.test
        self._num_classes = dataset.num_classes
        # No larger than the split needs: what is padded is computed too.
        self._batch_size = min(config.batch_size, parallel.round_up_to_devices(len(self._split.labels)))

    def __call__(self, variables: Any) -> dict[str, float]:
        """The metrics of the task over the whole split, each image counted once, and the mean "loss"."""
        return self._task.summarize(self.measure(variables), self._split.labels)

    def by_category(self, variables: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Task.by_category`."""
        return self._task.by_category(self.measure(variables), self._split.labels, self._num_classes)

    def measure(self, variables: Any) -> list[Any]:
        """What the task measures of each batch of the split, in order, on the host."""
        pending, measured = deque(), []
        for batch in self._batches():
            pending.append(self._step(variables, batch))
            if len(pending) >= parallel.max_steps_in_flight():
                measured.append(jax.device_get(pending.popleft()))
        return measured + jax.device_get(list(pending))

    def _batches(self):
        count, size = len(self._split.labels), self._batch_size
        # A process computes its rows of every batch; those behind the last image are padding.
        rows = [np.arange(start, start + size)[parallel.local_rows(size)] for start in range(0, count, size)]
        indices = [index[index < count] for index in rows]
        for index, images in zip(indices, read_batches(self._split.images, indices), strict=True):
            padding = len(rows[0]) - len(index)
            batch = {
                "image": _pad(images, padding),
                "label": _pad(self._split.labels[index], padding),
                "mask": np.arange(len(rows[0])) < len(index),
            }
            yield parallel.shard(batch)


def _drain(pending, meter):
    while pending:
        meter.add(*pending.popleft())


def _pad(x, rows):
    return np.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1))


def _check_methods(losses, dataset: ImageDataset) -> None:
    """Raises UserError for a method that reads another kind of labels than the data set has."""
    wrong = [name for name in losses if LOSSES[name].multilabel not in (None, dataset.multilabel)]
    if wrong:
        fitting = [name for name, method in LOSSES.items() if method.multilabel == dataset.multilabel]
        kind = "any number of categories (multi-label)" if dataset.multilabel else "one category"
        raise UserError(
            f"losses.{wrong[0]} does not fit data set '{dataset.name}', whose images have {kind} each: of the methods "
            f"that read labels, those for it are {', '.join(sorted(fitting))}"
        )


def _check_batches(sampler: Sampler) -> None:
    if sampler.batch_size > sampler.num_examples:
        raise UserError(
            f"batch_size is {sampler.batch_size}; it must not be more than the {sampler.num_examples} training examples"
        )
    if sampler.last_batch_size == 1:
        raise UserError(
            "the last batch of an epoch holds one image, which has nothing to relate to: set drop_last=True"
        )
    parallel.check_batch_size("the last batch of an epoch (drop_last=True leaves it out)", sampler.last_batch_size)
