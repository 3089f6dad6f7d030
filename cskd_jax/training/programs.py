"""The compiled programs of the training of one student."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError

from cskd_jax.distributed import processes
from cskd_jax.distributed.devices import AXIS, lower
from cskd_jax.errors import UserError
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.metrics import task_of
from cskd_jax.training.networks import Network, Variables
from cskd_jax.training.phases import Part
from cskd_jax.training.setup import Setup
from cskd_jax.training.state import TrainState, check_unchanged, init_network, init_optimizer, init_state, output_of
from cskd_jax.training.step import make_train_step


class Programs:
    """The compiled programs that make a new state and carry out the steps of each phase, for each batch size.

    Everything is traced at once, which reveals mismatches, and compiled when it is needed.

    Args:
      name: Name of the student, for errors.
      network: Network that is trained.
      parts: Phases of the training with everything filled in.
      setup: Setup that the students share.
      variables: Variables to start from; None for fresh ones.
      teacher: Network of the teacher, or None.
      teacher_variables: Variables of the teacher, or their shapes; None if they do not exist yet.
      ema: Decay of the moving average of the variables; None keeps none.

    Attributes:
      network: The network for a batch that is split over the devices.
      parts: The phases.
      states: Shapes and dtypes of the state in each phase.
      lowered: The traced step of each phase for whole batches.

    Raises:
      UserError: Networks, losses and data do not fit together; nothing has been compiled by then.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        parts: Sequence[Part],
        setup: Setup,
        *,
        variables: Variables | None,
        teacher: Network | None,
        teacher_variables: Variables | None,
        ema: float | None,
    ):
        self.network, self.parts, self._setup, self._variables = network.on_axis(AXIS), parts, setup, variables
        self._teacher = None if teacher is None else teacher.on_axis(AXIS)
        # One key for the weights, one for the rest.
        self._init_key, self._key = jax.random.split(setup.key)
        self._compiled: dict[tuple[int, int], Callable] = {}
        try:
            teacher_output = self._trace_teacher(teacher_variables)
            self._lower_state(teacher_output, ema is not None)
            self._steps = [self._make_step(part, ema) for part in parts]
            size = setup.sampler.batch_size
            self.lowered = [self._lower_step(number, size) for number in range(len(parts))]
            check_unchanged(self.states[0], self.lowered[0].out_info[0])
        except (TypeError, ValueError, ArithmeticError, FlaxError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{name}: {lines[0]}") from error

    def _trace_teacher(self, variables):
        """Returns the shapes of the teacher's outputs, and stores those of its variables."""
        self._teacher_variables = None
        if self._teacher is None:
            return None
        shape = self._setup.data.image_shape
        if variables is None:
            self._teacher_variables, outputs = jax.eval_shape(
                lambda: init_network(self._teacher, self._init_key, shape)
            )
            return outputs
        self._teacher_variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
        return jax.eval_shape(functools.partial(output_of, self._teacher, shape), variables)

    def _lower_state(self, teacher_output, ema):
        """Traces the program that makes a new state."""
        first, data, key = self.parts[0], self._setup.data, self._init_key
        label = jax.ShapeDtypeStruct(data.train.labels.shape[1:], data.train.labels.dtype)
        self._check_logits()

        def new_state(variables):
            return init_state(
                key,
                self.network,
                first.all_losses,
                first.optimizer,
                data.image_shape,
                teacher_output,
                label,
                variables,
                ema,
            )

        self._lowered_state = jax.jit(new_state).lower(self._variables)
        state: TrainState = self._lowered_state.out_info
        self.states = [state]
        for part in self.parts[1:]:
            opt_state = jax.eval_shape(functools.partial(init_optimizer, part.optimizer), state.params)
            self.states.append(dataclasses.replace(state, opt_state=opt_state))

    def _check_logits(self):
        """Raises ValueError unless the network gives one logit for each class."""
        shape, classes = self._setup.data.image_shape, self._setup.data.num_classes
        if self._variables is None:  # `new_state` then traces the same function, which is traced once for both.
            output = jax.eval_shape(lambda: init_network(self.network, self._init_key, shape)[1])
        else:
            output = jax.eval_shape(functools.partial(output_of, self.network, shape), self._variables)
        if output.logits.shape != (2, classes):
            raise ValueError(
                f"the logits of two images have shape {output.logits.shape}; the data have {classes} classes, which "
                f"asks for {(2, classes)}"
            )

    def _make_step(self, part, ema):
        network = self.network
        if part.evaluated is not None:
            if not isinstance(network, LinenNetwork):
                raise ValueError("evaluate_frozen of a phase needs a network that is a flax.linen module")
            network = dataclasses.replace(network, trainable=part.evaluated)
        step = make_train_step(
            network,
            part.objective,
            part.optimizer,
            preprocess=self._setup.preprocess,
            teacher=self._teacher,
            axis_name=AXIS,
            task=task_of(self._setup.data.multilabel),
            micro_batch_size=self._setup.micro_batch_size,
            ema=ema,
        )
        return self._setup.devices.map_train_step(step)

    def _lower_step(self, number, size):
        """Traces the step of a phase for a global batch of `size`."""
        data, devices = self._setup.data, self._setup.devices
        rows = len(range(size)[devices.local_rows(size)])
        batch = {
            "image": np.zeros((rows, *data.image_shape), data.image_dtype),
            "label": np.zeros((rows, *data.train.labels.shape[1:]), data.train.labels.dtype),
            "index": np.zeros(rows, np.int32),
        }
        arguments = self.states[number], self._teacher_variables, devices.shard(batch), self._key
        return lower(self._steps[number], *arguments)

    def compile(self, number: int, size: int) -> None:
        """Compiles the step of a phase for a global batch of `size`."""
        lowered = self.lowered[number] if size == self._setup.sampler.batch_size else self._lower_step(number, size)
        self._compiled[number, size] = lowered.compile()

    def compile_and_init(self, number: int) -> TrainState:
        """Compiles the step of a phase for whole batches and returns a new state, which is made meanwhile."""
        with ThreadPoolExecutor() as pool:
            compiled = pool.submit(self.compile, number, self._setup.sampler.batch_size)
            # All take the state of one process, as another kind of machine might round differently.
            state = processes.on_first(lambda: jax.device_get(self._lowered_state.compile()(self._variables)))
            compiled.result()
        return state

    def is_compiled(self, number: int, size: int) -> bool:
        """Returns whether the step of a phase is compiled for a global batch of `size`."""
        return (number, size) in self._compiled

    def step(
        self, number: int, size: int, state: TrainState, teacher_variables: Any, batch: Any
    ) -> tuple[TrainState, Any]:
        """Runs the compiled step of a phase for a global batch of `size`; see `make_train_step`."""
        # The programs were made without a teacher where no loss reads one.
        teacher_variables = None if self._teacher is None else teacher_variables
        return self._compiled[number, size](state, teacher_variables, batch, self._key)

    def with_fresh_optimizer(self, number: int, state: TrainState) -> TrainState:
        """Returns the state with a fresh optimizer state for a phase."""
        params = jax.device_get(state.params)
        init = jax.jit(functools.partial(init_optimizer, self.parts[number].optimizer))
        opt_state = processes.on_first(lambda: jax.device_get(init(params)))
        return dataclasses.replace(state, opt_state=self._setup.devices.replicate(opt_state))
