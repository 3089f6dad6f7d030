"""The two pure functions that everything else feeds: a training step and an evaluation step."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import linen as nn
from jax import lax

from cskd_jax.losses import LossInputs, batch_positions
from cskd_jax.training.metrics import SINGLE_LABEL, Task
from cskd_jax.training.objective import Objective
from cskd_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Preprocess = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Folded into the key of a step for the draws of the methods; what is folded in for the images are their positions.
_METHODS = 2**31 - 1


def make_train_step(
    student: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    preprocess: Preprocess,
    teacher: nn.Module | None = None,
    axis_name: str | None = None,
    task: Task = SINGLE_LABEL,
) -> Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds `train_step(state, teacher_variables, batch, key) -> (state, metrics)`.

    Args:
      student: network trained, in training mode.
      objective: the weighted methods.
      optimizer: over the parameters of the student and of the methods.
      preprocess: `(images, key, positions) -> images` as the networks take them; positions are in the global batch.
      teacher: network in evaluation mode, not differentiated; None where the objective reads none.
      axis_name: mapped axis over which the batch is split: the step then equals that of the global batch.
      task: says what is measured on the batch.

    Returns:
      A pure function. `batch` is {"image": [B, H, W, C], "label": int32 [B] or float32 [B, K]} and, for the methods
      that keep a memory of the samples, "index": int32 [B], their positions in the training split. `key` is the key of
      the run (the step is folded in here). metrics are scalars: `loss`, the terms of the objective, `task.step_metric`
      of the student on the batch, `gradient_norm`.
    """

    def train_step(state, teacher_variables, batch, key):
        labels = batch["label"]
        positions = batch_positions(len(labels), axis_name)
        step_key = jax.random.fold_in(key, state.step)
        images = preprocess(batch["image"], step_key, positions)
        methods_key = jax.random.fold_in(step_key, _METHODS)
        teacher_output = None
        if teacher is not None:
            teacher_output = lax.stop_gradient(teacher.apply(teacher_variables, images, train=False))

        def loss(params):
            variables = {"params": params["student"], "batch_stats": state.batch_stats}
            output, updated = student.apply(variables, images, train=True, mutable=["batch_stats"])
            inputs = LossInputs(output, teacher_output, labels, batch.get("index"), methods_key)
            total, terms, memory = objective(params["methods"], state.memory, inputs, state.step)
            measured = task.measure_step(output.logits, labels, axis_name)
            return total, (updated["batch_stats"], memory, {"loss": total, **terms, **measured})

        gradients, (batch_stats, memory, metrics) = jax.grad(loss, has_aux=True)(state.params)
        if axis_name is not None:
            gradients, metrics = lax.pmean((gradients, metrics), axis_name)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state, memory), metrics

    return train_step


def make_eval_step(
    model: nn.Module,
    *,
    preprocess: Callable[[jax.Array], jax.Array],
    axis_name: str | None = None,
    task: Task = SINGLE_LABEL,
) -> Callable[[Any, Batch], Any]:
    """Builds `eval_step(variables, batch) -> measured` (see `Task.measure_batch`) over the global batch.

    `batch` is {"image", "label", "mask"}.
    """

    def eval_step(variables, batch):
        output = model.apply(variables, preprocess(batch["image"]), train=False)
        return task.measure_batch(output.logits, batch["label"], batch["mask"], axis_name)

    return eval_step
