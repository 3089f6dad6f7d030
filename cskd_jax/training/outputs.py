"""The outputs of networks as losses see them, with a clear error in the place of what a network does not give."""

from collections.abc import Callable
from typing import Any

import jax

from cskd_jax.losses import LossInputs, View
from cskd_jax.models import ModelOutput
from cskd_jax.training.layers import guard_layers


@jax.tree_util.register_pytree_node_class
class Outputs:
    """The outputs of a network for losses; reading an output that the network lacks raises a clear error.

    Losses read maps. Of a network of tokens, they get the tokens of the patches as the map that they form, without
    class, distillation and register tokens. As of any maps, the larger of a pair is then pooled to the smaller.

    Args:
      output: Outputs of the network.
      role: "student" or "teacher".
      prepare: Function that is applied to every array that is read.
    """

    def __init__(self, output: ModelOutput, role: str, prepare: Callable[[jax.Array], jax.Array] = lambda x: x):
        self.output, self._role, self._prepare = output, role, prepare

    @property
    def stages(self):
        """Returns the map that each stage hands on, or the features where a network does not tell."""
        return self.maps[1:] if self.output.maps else self.features

    @property
    def stem(self):
        """Returns the map of the stem, or None if the network does not tell."""
        return self.maps[0] if self.output.maps else None

    def __getattr__(self, name):
        if name.startswith("_") or name not in ModelOutput._fields:
            raise AttributeError(name)
        value, grid = getattr(self.output, name), self.output.grid
        if name == "preactivations" and grid is not None:
            raise ValueError(
                "a loss reads the maps before the last ReLU of each stage, and no ReLU follows the tokens that the "
                f"{self._role} gives: this loss needs networks of maps"
            )
        # A network of one head has no `head_logits`, and a loss may ask whether there are.
        if value is None or (isinstance(value, tuple) and not value and name != "head_logits"):
            raise ValueError(
                f"a loss reads the {name} of the {self._role}, which that network does not return; "
                f"name the path of a submodule, or return a ModelOutput with {name}"
            )
        if grid is not None and name in ("features", "maps"):
            value = tuple(grid.to_map(tokens) for tokens in value)
        return jax.tree.map(self._prepare, value)

    def tree_flatten(self) -> tuple[Any, Any]:
        """Returns the outputs of the network, and the rest, which is static."""
        return (self.output,), (self._role, self._prepare)

    @classmethod
    def tree_unflatten(cls, extra: Any, children: Any) -> "Outputs":
        """Returns these outputs again from what `tree_flatten` has returned."""
        return cls(*children, *extra)


def guard(inputs: LossInputs) -> LossInputs:
    """Returns the inputs with a clear error in the place of everything that a network does not give."""

    def both(student, teacher) -> tuple[Any, Any]:
        return Outputs(student, "student"), None if teacher is None else Outputs(teacher, "teacher")

    student, teacher = both(inputs.student, inputs.teacher)
    views = tuple(View(*both(*view)) for view in inputs.views)
    return guard_layers(inputs)._replace(student=student, teacher=teacher, views=views)
