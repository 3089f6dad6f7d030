"""The outputs of networks as losses see them, with a clear error for any output that a network does not have."""

from collections.abc import Callable
from typing import Any

import jax

from cskd_jax.losses import LossInputs, View
from cskd_jax.models import ModelOutput
from cskd_jax.training.layers import guard_layers, without_teacher_layers

# What to do about an output that student or teacher lacks; only the first two can be taken from within a linen module.
_HOW_TO_GIVE = {name: f"have it return a ModelOutput with {name}" for name in ModelOutput._fields} | {
    "features": (
        "name submodules of a linen module with student_features=['PATH', ...] and, unless the teacher returns them, "
        "teacher_features=['PATH', ...], or have the network return {'logits': ..., 'features': (...)}"
    ),
    "embedding": (
        "name a submodule of a linen module with student_embedding='PATH' and, unless the teacher returns it, "
        "teacher_embedding='PATH', or have the network return {'logits': ..., 'embedding': ...}"
    ),
}


@jax.tree_util.register_pytree_node_class
class Outputs:
    """The outputs of a network for losses; reading an output that the network lacks raises a clear error.

    Losses read maps. For a network of tokens, they get the map that the patch tokens form, without class, distillation
    and register tokens. As with any maps, the larger of a pair is then pooled to the size of the smaller.

    Args:
      output: Outputs of the network.
      role: "student" or "teacher".
      prepare: Function that is applied to every array that is read.
    """

    def __init__(self, output: ModelOutput, role: str, prepare: Callable[[jax.Array], jax.Array] = lambda x: x):
        self.output, self._role, self._prepare = output, role, prepare

    @property
    def stages(self):
        """Returns the map that each stage passes on, or the features if the network does not report it."""
        return self.maps[1:] if self.output.maps else self.features

    @property
    def tokens(self):
        """Returns the tokens of each stage and their grid; () and None for a network of maps."""
        grid = self.output.grid
        return ((), None) if grid is None else (jax.tree.map(self._prepare, self.output.features), grid)

    @property
    def stem(self):
        """Returns the map of the stem, or None if the network does not report it."""
        return self.maps[0] if self.output.maps else None

    def __getattr__(self, name):
        if name.startswith("_") or name not in ModelOutput._fields:
            raise AttributeError(name)
        value, grid = getattr(self.output, name), self.output.grid
        if name == "preactivations" and grid is not None:
            raise ValueError(
                "it reads the maps before the last ReLU of each stage, but no ReLU follows the tokens of the "
                f"{self._role}: this loss needs networks with feature maps"
            )
        if name == "members":
            return tuple(Outputs(member, self._role, self._prepare) for member in value)
        # A network with one head has no `head_logits`, and a loss may check whether there are any.
        if value is None or (isinstance(value, tuple) and not value and name != "head_logits"):
            raise ValueError(self._missing(name))
        if grid is not None and name in ("features", "maps"):
            value = tuple(grid.to_map(tokens) for tokens in value)
        return jax.tree.map(self._prepare, value)

    def _missing(self, name):
        if self.output.members and self._role == "teacher":
            last = len(self.output.members) - 1
            return (
                f"it reads the {name} of the teacher, but there are several: choose one with the teacher setting "
                f"of the loss, a number from 0 to {last}"
            )
        if name == "logits":
            return (
                f"it reads the logits of the {self._role}, which has other classes than the data: only losses that "
                "read its features or its embedding work"
            )
        return f"it reads the {name} of the {self._role}, which that network does not return: {_HOW_TO_GIVE[name]}"

    def tree_flatten(self) -> tuple[Any, Any]:
        """Returns the outputs of the network, and the rest, which is static."""
        return (self.output,), (self._role, self._prepare)

    @classmethod
    def tree_unflatten(cls, extra: Any, children: Any) -> "Outputs":
        """Rebuilds the outputs from what `tree_flatten` returned."""
        return cls(*children, *extra)


def guard(inputs: LossInputs) -> LossInputs:
    """Returns the inputs with a clear error in place of every output that a network does not have."""

    def as_outputs(student, teacher, average) -> tuple[Any, ...]:
        roles = {"student": student, "teacher": teacher, "moving average": average}
        return tuple(None if output is None else Outputs(output, role) for role, output in roles.items())

    student, teacher, average = as_outputs(inputs.student, inputs.teacher, inputs.average)
    views = tuple(View(*as_outputs(*view)) for view in inputs.views)
    return guard_layers(inputs)._replace(student=student, teacher=teacher, average=average, views=views)


def with_teacher(inputs: LossInputs, teacher: int | str | None) -> LossInputs:
    """Returns the inputs of a loss that names its teacher.

    Args:
      inputs: Inputs from `guard`.
      teacher: Number of one of several teachers, from 0; "average" for the moving average of the student; None for all
        teachers combined.

    Raises:
      ValueError: There is no such teacher.
    """
    if teacher is None:
        return inputs

    def choose(view):
        if isinstance(teacher, str):
            return view.average
        if view.teacher is None:
            raise ValueError(f"it has teacher={teacher}, but there is no teacher")
        members = view.teacher.members or (view.teacher,)
        if teacher >= len(members):
            raise ValueError(f"it has teacher={teacher}; the teachers are numbered from 0 to {len(members) - 1}")
        return members[teacher]

    views = tuple(view._replace(teacher=choose(view)) for view in inputs.views)
    chosen = inputs._replace(teacher=choose(inputs), views=views)
    return chosen if chosen.teacher is inputs.teacher else without_teacher_layers(chosen)
