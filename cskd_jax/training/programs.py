"""The compiled programs of training: the pass that prepares batches for all students, and the steps of one student."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from cskd_jax.data.arrays import how_counted
from cskd_jax.data.batches import EpochBatches
from cskd_jax.distributed import processes
from cskd_jax.distributed.devices import AXIS, is_compiled, is_requested, lower
from cskd_jax.errors import UserError
from cskd_jax.losses import LossInputs
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.layers import NO_LAYERS, Layers, layers_of
from cskd_jax.training.metrics import training_task_of
from cskd_jax.training.networks import Network, Variables
from cskd_jax.training.peers import Cohort
from cskd_jax.training.phases import Part
from cskd_jax.training.prediction import predicting, variables_of
from cskd_jax.training.setup import Setup
from cskd_jax.training.state import (
    TrainState,
    check_unchanged,
    example_inputs,
    init_network,
    init_optimizer,
    init_state,
    output_of,
)
from cskd_jax.training.step import make_teacher_pass, make_train_step, select_outputs


class Reads(NamedTuple):
    """The outputs of the teacher pass that one student, or several students together, read.

    Attributes:
      teacher: Outputs of the teacher, a `ModelOutput` of booleans; None if no loss reads any.
      views: Number of further views of the images.
    """

    teacher: Any
    views: int

    @classmethod
    def union(cls, reads: Sequence["Reads"]) -> "Reads":
        """Returns what any of several students reads; one that reads further views gets the same outputs for them."""
        teachers = [read.teacher for read in reads if read.teacher is not None]
        teacher = jax.tree.map(lambda *found: any(found), *teachers) if teachers else None
        return cls(teacher, max(read.views for read in reads))

    def select(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the batch, as returned by the pass plus any other entries, without the outputs that are not read."""
        views = tuple(self._replace(views=0).select(view) for view in batch.get("views", ())[: self.views])
        teacher = None if self.teacher is None else select_outputs(batch["teacher"], self.teacher)
        rest = {name: value for name, value in batch.items() if name != "views"}
        return {**rest, "teacher": teacher} | ({"views": views} if views else {})


class TeacherPass:
    """The compiled programs of the teacher pass, one for each batch size; see `make_teacher_pass`.

    Args:
      setup: Setup that the students share.
      teacher: Network of the teacher, or None.
      variables: Variables of the teacher, or their shapes; None if they do not exist yet.

    Attributes:
      outputs: Shapes of the outputs of the teacher for two images; None without a teacher.
      layers: Shapes of the layers of the teacher that losses may read.

    Raises:
      UserError: The teacher cannot be applied to the images.
    """

    def __init__(self, setup: Setup, teacher: Network | None, variables: Any):
        self._setup = setup
        self._teacher = None if teacher is None else teacher.on_axis(AXIS)
        self._key = jax.random.split(setup.key)[1]
        self._compiled: dict[int, Future] = {}
        self._variables, self.outputs, self.layers = None, None, NO_LAYERS
        with _one_line("teacher"):
            if self._teacher is not None:
                self._trace(self._teacher, variables)
        key = jax.eval_shape(lambda: self._key)
        positions = jax.ShapeDtypeStruct((2,), jnp.int32)
        images = jax.ShapeDtypeStruct((2, *setup.data.image_shape), setup.data.image_dtype)
        with _one_line("augment" if setup.augment else "normalize"):
            self._image = jax.eval_shape(setup.preprocess, images, key, positions)

    def _trace(self, teacher, variables):
        """Stores the shapes of the variables of the teacher and of its outputs."""
        shape = self._setup.data.image_shape
        if variables is None:
            init = functools.partial(init_network, teacher, self._key, shape)
            self._variables, self.outputs = jax.eval_shape(lambda: init())
        else:
            self._variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
            self.outputs = jax.eval_shape(functools.partial(output_of, teacher, shape), variables)
        self.layers = jax.eval_shape(self.layers_of, self._variables)
        for x in jax.tree.leaves(self.outputs):
            if x.shape[:1] != (2,):
                raise ValueError(
                    f"an output of the teacher has shape {x.shape} for two images; the first axis must be the image"
                )

    def layers_of(self, variables: Variables) -> Layers:
        """Returns the layers of the teacher that losses may read."""
        return NO_LAYERS if self._teacher is None else layers_of(self._teacher, variables)

    def example(self, rows: int, reads: Reads) -> dict[str, Any]:
        """Returns zeros in place of what the pass returns to a student for that many rows."""
        image, outputs = jax.tree.map(lambda x: np.zeros((rows, *x.shape[1:]), x.dtype), (self._image, self.outputs))
        one = {"image": image, "teacher": outputs}
        share = {} if self._setup.mix is None else {"share": np.zeros(rows, np.float32)}
        return reads.select({**one, "views": (one,) * reads.views, **share})

    def compile(self, size: int, reads: Reads, pool: Executor) -> None:
        """Traces the pass for a global batch of `size` and compiles it in the background, unless already requested.

        Tracing stays in the thread of the caller, because it depends on the JAX settings of that thread.
        """
        if not is_requested(self._compiled.get(size)):
            self._compiled[size] = pool.submit(self._lower(size, reads).compile)

    def _lower(self, size, reads):
        data, devices = self._setup.data, self._setup.devices
        teacher_pass = make_teacher_pass(
            None if reads.teacher is None else self._teacher,
            preprocess=self._setup.preprocess,
            axis_name=AXIS,
            micro_batch_size=self._setup.micro_batch_size,
            reads=reads.teacher,
            views=reads.views,
            preprocess_view=self._setup.preprocess_view,
            mix=self._setup.mix,
        )
        rows = len(range(size)[devices.local_rows(size)])
        images = devices.shard({"image": np.zeros((rows, *data.image_shape), data.image_dtype)})["image"]
        variables = None if reads.teacher is None else self._variables
        return lower(devices.map_teacher_pass(teacher_pass), variables, images, self._key, np.int32(0))

    def compiled(self, size: int) -> Callable[..., Any]:
        """Returns the compiled pass for a global batch of `size`, waiting for it."""
        return self._compiled[size].result()

    def memory(self, size: int) -> int:
        """Returns the bytes that the pass takes on a device."""
        found = self.compiled(size).memory_analysis()
        parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        return 0 if found is None else sum(getattr(found, part) for part in parts)

    def __call__(self, size: int, step: int, teacher_variables: Any, images: jax.Array) -> dict[str, Any]:
        """Returns what the students read of the batch of a step."""
        return self.compiled(size)(teacher_variables, images, self._key, np.int32(step))

    def is_compiled(self, size: int) -> bool:
        """Returns whether the pass is compiled for a global batch of `size`."""
        return is_compiled(self._compiled.get(size))


class Programs:
    """The compiled programs that make a new state and carry out the steps of each phase, for each batch size.

    Everything is traced at once, which reveals mismatches, and compiled when it is needed.

    Args:
      name: Name of the student, for errors.
      network: Network that is trained.
      parts: Phases of the training with everything filled in.
      setup: Setup that the students share.
      variables: Variables to start from; None for fresh ones.
      teacher_pass: Teacher pass, which prepares the batches.
      ema: Decay of the moving average of the variables; None keeps none.

    Attributes:
      network: The network for a batch that is split over the devices.
      predicting: The network as it is evaluated, with the prediction of a loss if one replaces its own.
      parts: The phases.
      states: Shapes and dtypes of the state in each phase.
      lowered: The traced step of each phase for whole batches.
      lowered_init: The traced program that makes a new state.
      reads: Part of what the pass returns that the losses read.
      layer_reads: Layers of the teacher that a loss reads, `Layers` of booleans.

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
        teacher_pass: TeacherPass,
        ema: float | None,
    ):
        self.network, self.parts, self._setup, self._variables = network.on_axis(AXIS), parts, setup, variables
        self._teacher_pass = teacher_pass
        self.predicting = predicting(self.network, parts[-1].objective)
        if ema is not None and self.predicting is not self.network:
            raise UserError(
                f"{name}: losses.{parts[-1].objective.predictor} predicts with its own parameters, and no moving "
                "average of them is kept: leave out the ema"
            )
        # One key for the weights, one for the rest.
        self._init_key, self._key = jax.random.split(setup.key)
        self._compiled: dict[tuple[int, int], Future] = {}
        self._init: Future | None = None
        # A teacher that no loss reads would cost a forward pass for nothing.
        reads_teacher = any(part.objective.may_read_teacher for part in parts)
        teacher_output = teacher_pass.outputs if reads_teacher else None
        with _one_line(name):
            student_output = self._trace_student()
            self._lower_state(teacher_output, ema is not None)
            self.reads, self.layer_reads = Reads(None, parts[0].all_losses.views), NO_LAYERS
            if teacher_output is not None:
                outputs, self.layer_reads = self._find_reads(student_output, teacher_output)
                self.reads = self.reads._replace(teacher=outputs)
            self._teacher_layers: Any = None
            self._steps = [self._make_step(part, ema) for part in parts]
            size = setup.sampler.batch_size
            self.lowered = [self._lower_step(number, size) for number in range(len(parts))]
            check_unchanged(self.states[0], self.lowered[0].out_info[0])

    @property
    def reads_teacher(self) -> bool:
        """Returns whether a loss of any phase reads something of the teacher."""
        return any(jax.tree.leaves((self.reads.teacher, self.layer_reads)))

    @property
    def _label(self):
        labels = self._setup.data.train.labels
        return jax.ShapeDtypeStruct(labels.shape[1:], labels.dtype)

    def _lower_state(self, teacher_output, ema):
        """Traces the program that makes a new state."""
        first, shape = self.parts[0], self._setup.data.image_shape

        def new_state(key, variables):
            return init_state(
                key,
                self.network,
                first.all_losses,
                first.optimizer,
                shape,
                teacher_output,
                self._label,
                variables,
                ema,
                self._teacher_pass.layers,
            )

        self.lowered_init = jax.jit(new_state).lower(self._init_key, self._variables)
        state: TrainState = self.lowered_init.out_info
        self.states = [state]
        for part in self.parts[1:]:
            opt_state = jax.eval_shape(functools.partial(init_optimizer, part.optimizer), state.params)
            self.states.append(dataclasses.replace(state, opt_state=opt_state))

    def _trace_student(self):
        """Returns the shapes of the outputs of the network; raises ValueError if a class lacks its logit."""
        shape, classes = self._setup.data.image_shape, self._setup.data.num_classes
        if self._variables is None:  # `new_state` then traces the same function, which is traced once for both.
            output = jax.eval_shape(lambda: init_network(self.network, self._init_key, shape)[1])
        else:
            output = jax.eval_shape(functools.partial(output_of, self.network, shape), self._variables)
        if output.logits.shape != (2, classes):
            raise ValueError(
                f"the logits of two images have shape {output.logits.shape}; the data have {classes} classes, so it "
                f"must be {(2, classes)}{how_counted(self._setup.data)}"
            )
        return output

    def _find_reads(self, student_output, teacher_output):
        """Returns which outputs and layers of the teacher a loss of any phase reads."""
        state = self.states[0]
        inputs: LossInputs = example_inputs(
            student_output,
            teacher_output,
            self._label,
            self._init_key,
            self.parts[0].all_losses.views,
            student_head=layers_of(self.network, state.variables).head,
            layers=self._teacher_pass.layers,
        )
        params, memory = state.params["losses"], state.memory
        reads = [part.objective.find_reads(params, memory, inputs) for part in self.parts]
        return jax.tree.map(lambda *found: any(found), *reads)

    def _make_step(self, part, ema):
        network = self.network
        if part.evaluated is not None:
            network = _evaluate_frozen(network, part.evaluated)
        step = make_train_step(
            network,
            part.objective,
            part.optimizer,
            axis_name=AXIS,
            task=training_task_of(self._setup.data),
            micro_batch_size=self._setup.micro_batch_size,
            ema=ema,
        )
        return self._setup.devices.map_train_step(step)

    def _lower_step(self, number, size):
        """Traces the step of a phase for a global batch of `size`."""
        labels, devices = self._setup.data.train.labels, self._setup.devices
        rows = len(range(size)[devices.local_rows(size)])
        batch = self._teacher_pass.example(rows, self.reads)
        batch["label"] = np.zeros((rows, *labels.shape[1:]), labels.dtype)
        if not isinstance(self._setup.sampler, EpochBatches):
            batch["index"] = np.zeros(rows, np.int32)
        layers = self._select_layers(self._teacher_pass.layers)
        return lower(self._steps[number], self.states[number], devices.shard(batch), self._key, layers)

    def _select_layers(self, layers):
        """Returns the layers of the teacher that a loss reads; None if it reads none."""
        return select_outputs(layers, self.layer_reads) if any(jax.tree.leaves(self.layer_reads)) else None

    def compile(self, number: int, size: int, pool: Executor) -> None:
        """Compiles the step of a phase for a global batch of `size` in the background, unless already requested."""
        if not is_requested(self._compiled.get((number, size))):
            whole = size == self._setup.sampler.batch_size
            lowered = self.lowered[number] if whole else self._lower_step(number, size)
            self._compiled[number, size] = pool.submit(lowered.compile)

    def compile_init(self, pool: Executor) -> None:
        """Compiles the program that makes a new state in the background, unless already requested."""
        if not is_requested(self._init):
            self._init = pool.submit(self.lowered_init.compile, compiler_options=_options_of_init())

    def init(self) -> TrainState:
        """Returns a new state, after `compile_init`."""
        assert self._init is not None
        init = self._init.result()
        # All processes take the state of the first one, because another kind of machine might round differently.
        return processes.on_first(lambda: jax.device_get(init(self._init_key, self._variables)))

    def memory(self, number: int, size: int) -> tuple[int, int]:
        """Returns the bytes that the arguments of a step take on a device, and the additional bytes it takes to run."""
        found = self.compiled(number, size).memory_analysis()
        return (0, 0) if found is None else (found.argument_size_in_bytes, found.temp_size_in_bytes)

    def is_compiled(self, number: int, size: int) -> bool:
        """Returns whether the step of a phase is compiled for a global batch of `size`."""
        return is_compiled(self._compiled.get((number, size)))

    def compiled(self, number: int, size: int) -> Callable[..., Any]:
        """Returns the compiled step of a phase for a global batch of `size`, waiting for it."""
        return self._compiled[number, size].result()

    def variables_of(self, state: TrainState) -> dict[str, Any]:
        """Returns the student's variables for inference, including those of the loss with which it predicts, if any."""
        return variables_of(state, self.parts[-1].objective)

    def take_teacher(self, variables: Variables) -> None:
        """Keeps the layers of a teacher that a loss reads, for use in the steps."""
        layers = self._select_layers(self._teacher_pass.layers_of(variables))
        self._teacher_layers = None if layers is None else self._setup.devices.replicate(layers)

    def step(self, number: int, size: int, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Any]:
        """Runs the compiled step of a phase on the output of the teacher pass, plus the rest of the batch."""
        return self.compiled(number, size)(state, self.reads.select(batch), self._key, self._teacher_layers)

    def with_fresh_optimizer(self, number: int, state: TrainState) -> TrainState:
        """Returns the state with a fresh optimizer state for a phase."""
        params = jax.device_get(state.params)
        init = jax.jit(functools.partial(init_optimizer, self.parts[number].optimizer))
        opt_state = processes.on_first(lambda: jax.device_get(init(params)))
        return dataclasses.replace(state, opt_state=self._setup.devices.replicate(opt_state))


def _options_of_init() -> dict[str, Any]:
    """Returns XLA's options for the program that makes a new state, unless XLA_FLAGS contains the only one of them.

    It runs once. With full optimization, a CPU compiles it for as long as a training step; with less, a fifth of that
    time is enough, and the weights are the same.
    """
    option = "xla_backend_optimization_level"
    return {} if option in os.environ.get("XLA_FLAGS", "") else {option: 1}


def _evaluate_frozen(network, trainable):
    """Returns a network whose modules run in evaluation mode if their parameters are all frozen."""
    if isinstance(network, Cohort):
        return dataclasses.replace(network, network=_evaluate_frozen(network.network, trainable))
    if not isinstance(network, LinenNetwork):
        raise ValueError("evaluate_frozen in a phase needs a network that is a flax.linen module")
    return dataclasses.replace(network, trainable=trainable)


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Returns a context in which an error raised during tracing becomes a one-line `UserError`."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError, FlaxError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: {lines[0]}") from error
