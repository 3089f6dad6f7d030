"""The loop: trains one network to the end of its epochs, evaluates, logs, saves, resumes."""

import dataclasses
import math
import pathlib
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_collections
import numpy as np

from cskd_jax.console import say
from cskd_jax.data import ImageDataset, read_batches
from cskd_jax.data.augment import augment, make_normalize
from cskd_jax.distributed import devices, processes
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import InterruptedRun, UserError
from cskd_jax.models import count_parameters
from cskd_jax.runs.build import _check_batches, _check_methods, make_sampler
from cskd_jax.training import optimizers
from cskd_jax.training.callbacks import Meter, Progress
from cskd_jax.training.checkpoint import FOLDER, Checkpoints
from cskd_jax.training.evaluation import Evaluation
from cskd_jax.training.metrics import task_of
from cskd_jax.training.networks import Network
from cskd_jax.training.objective import Objective
from cskd_jax.training.state import TrainState, init_network, init_state
from cskd_jax.training.step import make_train_step


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
            axis_name=devices.AXIS,
            num_examples=len(dataset.train.labels),
            steps_per_epoch=self._sampler.steps_per_epoch,
        )
        self._optimizer = optimizers.make_optimizer(**config.optimizer, steps_per_epoch=self._sampler.steps_per_epoch)
        self._train_step = self._make_train_step()
        self._evaluate = Evaluation(network, config, dataset)
        # One key for the weights, one for augmentation; the same for every method of a seed, so that runs pair up.
        key = jax.random.fold_in(jax.random.PRNGKey(config.seed), name == "student")
        self._init_key, self._key = jax.random.split(key)
        self._lower()
        self._max_in_flight = devices.max_steps_in_flight()

    def _make_train_step(self):
        normalize = make_normalize(self._config.dataset.mean, self._config.dataset.std)
        settings = dict(self._config.augment)
        step = make_train_step(
            self._network.module,
            self._objective,
            self._optimizer,
            preprocess=lambda images, key, positions: normalize(augment(images, key, positions, **settings)),
            teacher=None if self._teacher is None else self._teacher.module,
            axis_name=devices.AXIS,
            task=self._task,
        )
        return devices.parallel_train_step(step)

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
        split, rows = self._dataset.train, len(range(size)[devices.local_rows(size)])
        batch = {
            "image": np.zeros((rows, *self._dataset.image_shape), np.uint8),
            "label": np.zeros((rows, *split.labels.shape[1:]), split.labels.dtype),
            "index": np.zeros(rows, np.int32),
        }
        arguments = self._abstract_state, self._teacher_variables, devices.shard(batch), self._key
        return devices.lower(self._train_step, *arguments)

    def _batches(self, step):
        """(size of the global batch, this process's rows of it) of each step from `step` on."""
        split, steps = self._dataset.train, range(step, self._total_steps)
        for step, images in zip(steps, read_batches(split.images, map(self._local_indices, steps)), strict=True):
            index = self._local_indices(step)
            batch = {"image": images, "label": split.labels[index], "index": index.astype(np.int32)}
            yield len(self._sampler.indices(step)), devices.shard(batch)

    def _local_indices(self, step):
        index = self._sampler.indices(step)
        return index[devices.local_rows(len(index))]

    def run(self, stop: StopRequest, teacher_variables: Any = None) -> tuple[Any, Progress]:
        """Trains to the end from the newest checkpoint.

        Args:
          stop: looked at after every step.
          teacher_variables: of the teacher, `devices.replicate`d.

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
                state = devices.replicate(self._compile(state))
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
        scores, confusions = self._evaluate.by_category(devices.replicate(variables))
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
                state = processes.on_first(lambda: jax.device_get(self._lowered_state.compile()()))
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


def _drain(pending, meter):
    while pending:
        meter.add(*pending.popleft())


