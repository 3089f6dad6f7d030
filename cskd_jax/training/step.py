"""The pure functions at the core of training: the teacher pass, the training step and the evaluation step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cskd_jax.losses import LossInputs, Mixed, View, batch_positions
from cskd_jax.training.layers import NO_LAYERS, layers_of
from cskd_jax.training.metrics import SINGLE_LABEL, Task
from cskd_jax.training.mixing import Mix, partners
from cskd_jax.training.networks import Network
from cskd_jax.training.objective import Objective
from cskd_jax.training.optimizers import SeparateGradients, SeparateOptimizer
from cskd_jax.training.peers import without_peers
from cskd_jax.training.state import TrainState

Batch = dict[str, Any]
Preprocess = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Folded into the key of a step for the random draws of the losses and of the student. For images, their positions are
# folded in, which are smaller numbers. Each micro-batch has its own key for both, and so do further views.
_LOSSES, _STUDENT, _MICRO_BATCH, _VIEWS, _MIX = 2**31 - 1, 2**31 - 2, 2**31 - 3, 2**31 - 4, 2**31 - 5


def make_teacher_pass(
    teacher: Network | None,
    *,
    preprocess: Preprocess,
    axis_name: str | None = None,
    micro_batch_size: int | None = None,
    reads: Any = None,
    views: int = 0,
    preprocess_view: Preprocess | None = None,
    mix: Mix | None = None,
) -> Callable[[Any, jax.Array, jax.Array, jax.Array], dict[str, Any]]:
    """Returns `teacher_pass(teacher_variables, images, key, step) -> {"image", "teacher"}`, which every student reads.

    Args:
      teacher: Network in evaluation mode; None if no student reads one.
      preprocess: `(images, key, positions) -> inputs of the networks`; positions are in the global batch.
      axis_name: Mapped axis over which the batch is split.
      micro_batch_size: As in `make_train_step`. The pass also processes the parts of the batch one after another, so
        that it needs no more memory than the steps do.
      reads: Outputs of the teacher that a student reads, a `ModelOutput` of booleans; None for all of them.
      views: Number of further views of the images that a student reads.
      preprocess_view: Like `preprocess`, but for these views; needed if there are any.
      mix: Function that mixes inputs of the networks with each other, within a micro-batch; None leaves them unchanged.

    Returns:
      A pure function. `key` is the key of the run and `step` an int32 scalar, the number of steps done. "image" holds
      the inputs of the networks [B, H, W, C], "teacher" the outputs of the teacher with None in place of those that are
      not read; None without a teacher. If there are further views, "views" is a tuple with the same entries for each of
      them. If images are mixed, "share" is the share of its original image that each retains, [B].
    """

    def prepare(teacher_variables, images, positions, step_key, number=0):
        inputs, share = preprocess(images, step_key, positions), {}
        if mix is not None:
            mix_key = jax.random.fold_in(jax.random.fold_in(step_key, _MIX), number)
            inputs, share["share"] = mix(inputs, mix_key, axis_name)
        prepared = prepare_one(teacher_variables, inputs) | share
        if views:
            assert preprocess_view is not None
            # The barrier ensures that the images of the main view are computed just as they are without other views.
            images = lax.optimization_barrier(images)
            keys = (jax.random.fold_in(jax.random.fold_in(step_key, _VIEWS), number) for number in range(views))
            others = (preprocess_view(images, view_key, positions) for view_key in keys)
            prepared["views"] = tuple(prepare_one(teacher_variables, other) for other in others)
        return prepared

    def prepare_one(teacher_variables, images):
        if teacher is None:
            return {"image": images, "teacher": None}
        # The barriers keep the compiler from computing one output differently depending on what else is returned, so
        # that a student gets the same bits whichever other students train with it.
        images = lax.optimization_barrier(images)
        outputs = lax.optimization_barrier(teacher.apply(teacher_variables, images, train=False)[0])
        return {"image": images, "teacher": outputs if reads is None else select_outputs(outputs, reads)}

    def teacher_pass(teacher_variables, images, key, step):
        step_key = jax.random.fold_in(key, step)
        if micro_batch_size is None:
            return prepare(teacher_variables, images, batch_positions(len(images), axis_name), step_key)

        def prepare_part(_, part, start, number):
            positions = batch_positions(len(part), axis_name) + start
            return None, prepare(teacher_variables, part, positions, step_key, number)

        _, parts = _over_micro_batches(prepare_part, None, images, micro_batch_size, axis_name)
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)

    return teacher_pass


def select_outputs(outputs: Any, reads: Any) -> Any:
    """Returns outputs of a network with None in place of those that are not read.

    Args:
      outputs: A `ModelOutput` or `Layers` of arrays, or of anything else; None stays None.
      reads: The same structure with booleans.
    """
    return jax.tree.map(lambda read, x: x if read else None, reads, outputs, is_leaf=lambda x: x is None)


def make_train_step(
    student: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    task: Task = SINGLE_LABEL,
    micro_batch_size: int | None = None,
    ema: float | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Returns `train_step(state, batch, key, teacher_layers) -> (state, metrics)`.

    Args:
      student: Network that is trained, in training mode.
      objective: Weighted losses.
      optimizer: Optimizer of the parameters of the student and of the losses. A `SeparateOptimizer` gets the gradients
        of supervision and of distillation separately.
      axis_name: Mapped axis over which the batch is split; the step is then equivalent to a step on the global batch.
      task: Task that defines the metric of the batch, if it has labels.
      micro_batch_size: Number of images, over all devices, in each micro-batch that the batch is divided into. The
        network and the losses see the micro-batches one after another, and the update uses the mean of their gradients
        over all images. The last micro-batch is smaller if the number does not divide the batch size. None keeps the
        batch whole.
      ema: Decay of the moving average of the variables of the student; None keeps none.

    Returns:
      A pure function. `batch` is what the teacher pass returns, {"image", "teacher"}, plus "label", int32 [B] or
      float32 [B, K], and, for losses that keep a memory of the samples, "index", int32 [B], their positions in the
      training split. "share" indicates that images were mixed; see `mixing.partners`. `key` is the key of the run (the
      step is folded in here). `teacher_layers` are the `Layers` of the teacher that losses read, which are not part of
      the batch; None by default. `metrics` are scalars: `loss`, the terms of the objective, `task.score` of the student
      on the batch, `gradient_norm`. The network sees the further views of the pass one after another in training mode,
      so that each view updates its collections.
    """
    separate = isinstance(optimizer, SeparateOptimizer)
    differentiate = _make_differentiate(student, objective, separate, axis_name, task)

    def train_step(state, batch, key, teacher_layers=None):
        teacher_layers = NO_LAYERS if teacher_layers is None else teacher_layers
        step_key = jax.random.fold_in(key, state.step)
        if micro_batch_size is None:
            gradients, collections, memory, metrics = differentiate(state, batch, step_key, teacher_layers)
        else:

            def differentiate_part(state, part, number):
                part_key = jax.random.fold_in(jax.random.fold_in(step_key, _MICRO_BATCH), number)
                return differentiate(state, part, part_key, teacher_layers)

            gradients, collections, memory, metrics = _accumulate(
                differentiate_part, state, batch, micro_batch_size, axis_name
            )
        metrics["gradient_norm"] = optax.tree.norm(jax.tree.map(jnp.add, *gradients) if separate else gradients)
        # Parts of optax fail under strict dtype promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, collections, opt_state, memory, state.ema)
        if ema is not None:
            new = dataclasses.replace(new, ema=_move(state.ema, without_peers(new.variables), ema))
        return new, metrics

    return train_step


def _make_differentiate(student, objective, separate, axis_name, task):
    """Returns `(state, batch, key, teacher_layers) -> (gradients, collections, memory, metrics)` of a (micro-)batch.

    Args:
      student: As in `make_train_step`, like the arguments below.
      objective: Weighted losses.
      separate: Whether the gradients are `SeparateGradients`.
      axis_name: Mapped axis over which the batch is split.
      task: Task that defines the metric of the batch.
    """

    def differentiate(state, batch, draw_key, teacher_layers):
        labels = batch["label"]
        student_key = _student_key(student, draw_key, axis_name)

        def average_of(images):
            return None if objective.average_reader is None else student.apply(state.ema, images, train=False)[0]

        def loss(params):
            variables = {"params": params["network"], **state.collections}
            output, collections = student.apply(variables, batch["image"], train=True, key=student_key)
            loss_key = jax.random.fold_in(draw_key, _LOSSES)
            inputs = LossInputs(
                output,
                batch.get("teacher"),
                labels,
                batch.get("index"),
                loss_key,
                # Taken from the parameters that are differentiated, so that gradients flow into it.
                student_head=layers_of(student, variables).head,
                teacher_head=teacher_layers.head,
                teacher_norms=teacher_layers.norms,
                mixed=Mixed(partners(labels, axis_name), batch["share"]) if "share" in batch else None,
                average=average_of(batch["image"]),
            )
            for number, view in enumerate(batch.get("views", ())):
                view_key = jax.random.fold_in(jax.random.fold_in(draw_key, _VIEWS), number)
                key = _student_key(student, view_key, axis_name)
                seen, moved = student.apply({**variables, **collections}, view["image"], train=True, key=key)
                collections = {**collections, **moved}
                seen_view = View(seen, view["teacher"], average_of(view["image"]))
                inputs = inputs._replace(views=(*inputs.views, seen_view))
            total, terms, memory = objective(params["losses"], state.memory, inputs, state.step)
            predicted = objective.predict(params["losses"], memory, output)
            measured = task.measure_step(predicted, labels, axis_name)
            kept = collections, memory, {"loss": total, **terms, **measured}
            return (SeparateGradients(*objective.split(terms, state.step)) if separate else total), kept

        gradient = _separate_gradients(loss) if separate else jax.grad(loss, has_aux=True)
        gradients, (collections, memory, metrics) = gradient(state.params)
        if axis_name is not None:
            gradients, metrics = lax.pmean((gradients, metrics), axis_name)
            if not student.synchronized:
                collections = _average(collections, axis_name)
        # A later phase may use parameters that this one does not.
        return gradients, {**state.collections, **collections}, {**state.memory, **memory}, metrics

    return differentiate


def _separate_gradients(loss):
    """Returns `params -> (SeparateGradients, aux)` of a function that returns (SeparateGradients of scalars, aux)."""

    def gradients(params):
        values, pull_back, aux = jax.vjp(loss, params, has_aux=True)
        zero, one = (jax.tree.map(lambda x, fill=fill: jnp.full_like(x, fill), values) for fill in (0, 1))
        supervision = zero._replace(supervision=one.supervision)
        distillation = zero._replace(distillation=one.distillation)
        return SeparateGradients(pull_back(supervision)[0], pull_back(distillation)[0]), aux

    return gradients


def _accumulate(differentiate, state, batch, size, axis_name):
    """Returns mean gradients and metrics over the micro-batches, and the last collections and memory.

    Args:
      differentiate: `(state, part of the batch, its number) -> (gradients, collections, memory, metrics)`.
      state: State before the step.
      batch: This device's part of the batch: its parts of all micro-batches, one after the other.
      size: Number of images of a micro-batch, over all devices.
      axis_name: Mapped axis over which the batch is split.
    """
    rows = len(batch["label"])

    def add(carry, part, start, number):
        del start
        collections, memory, sums = carry
        seen = dataclasses.replace(state, collections=collections, memory=memory)
        gradients, collections, memory, metrics = differentiate(seen, part, number)
        share = len(part["label"]) / rows
        weighted = jax.tree.map(lambda x: x * share, (gradients, metrics))
        return (collections, memory, weighted if sums is None else jax.tree.map(jnp.add, sums, weighted)), None

    carry, _ = _over_micro_batches(add, (state.collections, state.memory, None), batch, size, axis_name)
    collections, memory, (gradients, metrics) = carry
    return gradients, collections, memory, metrics


def _over_micro_batches(function, carry, batch, size, axis_name):
    """Applies a function to the micro-batches one after another.

    Args:
      function: `(carry, part of the batch, number of images before it, its number) -> (carry, result)`.
      carry: Carry before the first micro-batch, which may change its structure.
      batch: This device's part of the batch: its parts of all micro-batches, one after the other.
      size: Number of images of a micro-batch, over all devices.
      axis_name: Mapped axis over which the batch is split.

    Returns:
      The last carry, and a list of results, each of one or several micro-batches along its first axis.
    """
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    rows, local = len(jax.tree.leaves(batch)[0]), size // devices
    number, rest = divmod(rows, local)

    def part_of(start, end):
        return jax.tree.map(lambda x: x[start:end], batch)

    carry, result = function(carry, part_of(0, min(local, rows)), 0, 0)
    results = [result]
    if number > 1:
        # A loop is compiled once, however many micro-batches there are.
        parts = jax.tree.map(lambda x: x.reshape(number - 1, local, *x.shape[1:]), part_of(local, number * local))
        indices = jnp.arange(1, number, dtype=jnp.int32)

        def of_index(carry, part_and_index):
            part, index = part_and_index
            return function(carry, part, index * size, index)

        carry, stacked = lax.scan(of_index, carry, (parts, indices))
        results.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked))
    if number and rest:
        carry, result = function(carry, part_of(number * local, rows), number * size, number)
        results.append(result)
    return carry, results


def make_eval_step(
    network: Network,
    *,
    preprocess: Callable[[jax.Array], jax.Array],
    axis_name: str | None = None,
    task: Task = SINGLE_LABEL,
) -> Callable[[Any, Batch], Any]:
    """Returns `eval_step(variables, batch) -> measured` (see `Task.measure_batch`) over the global batch.

    `batch` is {"image", "label", "mask"}.
    """

    def eval_step(variables, batch):
        output, _ = network.apply(variables, preprocess(batch["image"]), train=False)
        return task.measure_batch(output.logits, batch["label"], batch["mask"], axis_name)

    return eval_step


def _student_key(student, step_key, axis_name):
    """Returns the key of the student's random draws for one view of the images."""
    key = jax.random.fold_in(step_key, _STUDENT)
    if axis_name is None or getattr(student, "draws_by_position", False):
        return key
    # These draws have the shape of the device's part of the batch, so every device must draw its own.
    return jax.random.fold_in(key, lax.axis_index(axis_name))


def _average(collections, axis_name):
    """Returns the collections with floats averaged over devices, which saw different parts of the batch."""

    def average(x):
        return lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(average, collections)


def _move(average, variables, decay):
    """Returns the moving average after an update; integers such as counters are copied."""

    def move(old, new):
        return decay * old + (1 - decay) * new if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(move, average, variables)
