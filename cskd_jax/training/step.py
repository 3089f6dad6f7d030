"""The two pure functions that everything else feeds: a training step and an evaluation step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from cskd_jax.losses import LossInputs, batch_positions
from cskd_jax.training.metrics import SINGLE_LABEL, Task
from cskd_jax.training.networks import Network
from cskd_jax.training.objective import Objective
from cskd_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Preprocess = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Folded into the key of a step for the draws of the losses and of the student. What is folded in for the images are
# their positions, which are smaller.
_LOSSES, _STUDENT = 2**31 - 1, 2**31 - 2


def make_train_step(
    student: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    preprocess: Preprocess,
    teacher: Network | None = None,
    axis_name: str | None = None,
    task: Task = SINGLE_LABEL,
) -> Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns `train_step(state, teacher_variables, batch, key) -> (state, metrics)`.

    Args:
      student: Network that is trained, in training mode.
      objective: Weighted losses.
      optimizer: Optimizer of the parameters of the student and of the losses.
      preprocess: `(images, key, positions) -> images` as the networks take them; positions are in the global batch.
      teacher: Network in evaluation mode, not differentiated; None where the objective reads none.
      axis_name: Mapped axis over which the batch is split: the step then equals that of the global batch.
      task: What is measured on the batch.

    Returns:
      A pure function. `batch` is {"image": [B, H, W, C], "label": int32 [B] or float32 [B, K]} and, for the losses
      that keep a memory of the samples, "index": int32 [B], their positions in the training split. `key` is the key of
      the run (the step is folded in here). metrics are scalars: `loss`, the terms of the objective, `task.score`
      of the student on the batch, `gradient_norm`.
    """

    def train_step(state, teacher_variables, batch, key):
        labels = batch["label"]
        positions = batch_positions(len(labels), axis_name)
        step_key = jax.random.fold_in(key, state.step)
        images = preprocess(batch["image"], step_key, positions)
        teacher_output = None
        if teacher is not None:
            teacher_output = lax.stop_gradient(teacher.apply(teacher_variables, images, train=False)[0])
        student_key = _student_key(step_key, axis_name)

        def loss(params):
            variables = {"params": params["network"], **state.collections}
            output, collections = student.apply(variables, images, train=True, key=student_key)
            inputs = LossInputs(
                output, teacher_output, labels, batch.get("index"), jax.random.fold_in(step_key, _LOSSES)
            )
            total, terms, memory = objective(params["losses"], state.memory, inputs, state.step)
            measured = task.measure_step(output.logits, labels, axis_name)
            return total, (collections, memory, {"loss": total, **terms, **measured})

        gradients, (collections, memory, metrics) = jax.grad(loss, has_aux=True)(state.params)
        if axis_name is not None:
            gradients, metrics = lax.pmean((gradients, metrics), axis_name)
            if not student.synchronized:
                collections = _average(collections, axis_name)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        # Parts of optax fail under strict dtype promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        # What this phase does not use, a later one may.
        collections, memory = {**state.collections, **collections}, {**state.memory, **memory}
        return TrainState(state.step + 1, params, collections, opt_state, memory), metrics

    return train_step


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


def _student_key(step_key, axis_name):
    """Returns the key of the student's random draws."""
    key = jax.random.fold_in(step_key, _STUDENT)
    # Its draws have the shape of the device's part of the batch: every device must draw its own.
    return key if axis_name is None else jax.random.fold_in(key, lax.axis_index(axis_name))


def _average(collections, axis_name):
    """Returns the collections with floats averaged over devices, which have seen different parts of the batch."""

    def average(x):
        return lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(average, collections)
