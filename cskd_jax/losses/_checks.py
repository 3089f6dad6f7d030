"""Argument checks that the losses share; they run while tracing, so they cost nothing in a compiled step."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def check_float(name: str, array: jax.Array, ndim: int | None = None, min_ndim: int = 0) -> None:
    """Raises TypeError unless `array` is floating point, ValueError unless it has `ndim` (at least `min_ndim`) axes."""
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise TypeError(f"{name} must have a floating-point dtype, got {jnp.result_type(array)}")
    shape = jnp.shape(array)
    if ndim is not None and len(shape) != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {shape}")
    if len(shape) < min_ndim:
        raise ValueError(f"{name} must have at least {min_ndim} dimensions, got shape {shape}")


def check_labels(labels: jax.Array, batch_size: int) -> None:
    """Raises TypeError unless `labels` are integers, ValueError unless their shape is [batch_size]."""
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels must have an integer dtype, got {jnp.result_type(labels)}")
    if jnp.shape(labels) != (batch_size,):
        raise ValueError(f"labels must have shape ({batch_size},) to match the batch, got {jnp.shape(labels)}")


def check_multilabels(labels: jax.Array, batch_size: int, num_classes: int | None = None) -> None:
    """Raises TypeError unless `labels` are float or bool, ValueError unless of shape [batch_size, num_classes]."""
    dtype, shape = jnp.result_type(labels), jnp.shape(labels)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"multi-label labels must have a floating-point dtype or be bool, got {dtype}")
    if len(shape) != 2 or shape[0] != batch_size or num_classes not in (None, shape[1]):
        wanted = f"({batch_size}, {'classes' if num_classes is None else num_classes})"
        raise ValueError(f"multi-label labels must have shape {wanted} to match the batch, got {shape}")


def check_same_shape(**arrays: jax.Array) -> None:
    """Raises ValueError unless all the arrays, given by name, have the same shape."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes must be equal, got " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def check_logits(student_logits: jax.Array, teacher_logits: jax.Array) -> None:
    """Raises TypeError unless both are floating point, ValueError unless both have the same shape [B, C]."""
    check_float("student_logits", student_logits, ndim=2)
    check_float("teacher_logits", teacher_logits, ndim=2)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)


def check_temperature(temperature: float | jax.Array) -> None:
    """Raises ValueError unless `temperature` is greater than 0 and finite; one that is traced is not checked."""
    if isinstance(temperature, Tracer):
        return
    if not np.all(np.asarray(temperature) > 0):
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    if not np.all(np.isfinite(temperature)):
        raise ValueError(f"temperature must be finite, got {temperature}")


def check_same_batch(**arrays: jax.Array) -> None:
    """Raises ValueError unless all the arrays, given by name, have the same leading dimension."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len({shape[0] for shape in shapes.values()}) > 1:
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"the batch sizes (first dimension) must be equal, got {text}")


def check_several_samples(loss: str, global_batch: int) -> None:
    """Raises ValueError unless the global batch has at least two samples to relate."""
    if global_batch < 2:
        raise ValueError(
            f"{loss} relates samples of a batch: it needs at least 2 in the global batch, got {global_batch}"
        )


def pair_stages(
    student: Sequence[jax.Array], teacher: Sequence[jax.Array], at_least: int = 1
) -> list[tuple[jax.Array, jax.Array]]:
    """Pairs stage l of the student with stage l of the teacher.

    Args:
      student: Stages of the student.
      teacher: Stages of the teacher.
      at_least: Smallest number of stages allowed.

    Returns:
      A list of pairs (student, teacher).

    Raises:
      ValueError: If student and teacher have different numbers of stages, or too few.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"student has {len(student)} stages and teacher {len(teacher)}: stages are paired one to one, "
            "so the numbers must be equal"
        )
    if len(student) < at_least:
        raise ValueError(f"at least {at_least} stages are needed, got {len(student)}")
    return list(zip(student, teacher, strict=True))


def check_averages_maps(**outputs: Any) -> None:
    """Raises ValueError unless the outputs, given by role, are of networks of maps, which classify their mean."""
    for role, output in outputs.items():
        if output.tokens[1] is not None:
            raise ValueError(
                f"it needs networks whose classifier reads the mean over the positions of the last map, but the {role} "
                "is a network of tokens"
            )


def at_least_float32(array: jax.Array) -> jax.Array:
    """Casts types narrower than float32 to it: losses are computed in float32 even if networks compute in bfloat16."""
    return array.astype(np.promote_types(array.dtype, np.float32))
