"""Descriptions of the networks of the table: stages, parameters and operations, derived from the networks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


class Stage(NamedTuple):
    """The output of a network after a stage.

    Attributes:
      kind: "map" [B, H, W, D] or "tokens" [B, T, D].
      channels: Number of channels D.
      reduction: Side of the image divided by the side of the map or of the patch grid.
    """

    kind: Literal["map", "tokens"]
    channels: int
    reduction: int


class Description(NamedTuple):
    """The size, the operations and the stages of a network.

    Attributes:
      image_size: Side of the images for which it is described.
      num_classes: Number of classes for which it is described.
      parameters: Number of its parameters.
      flops: Floating-point operations for one image in evaluation mode, as the compiler counts them; a multiplication
        and an addition count as two.
      stages: Its features, first stage first.
    """

    image_size: int
    num_classes: int
    parameters: int
    flops: int
    stages: tuple[Stage, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network in the table.

    Attributes:
      constructor: Constructor of the module, which takes num_classes, width, dtype, axis_name and, if it has any, its
        settings.
      image_size: Side of the images for which the network was designed.
      num_classes: Number of classes of the data set for which it is usually described.
    """

    constructor: Callable[..., nn.Module]
    image_size: int = 32
    num_classes: int = 100

    def __call__(self, **fields: Any) -> nn.Module:
        """Returns the module."""
        return self.constructor(**fields)

    def describe(self, width: float = 1.0, settings: Mapping[str, Any] | None = None) -> Description:
        """Returns a description of the outputs of the network, which are traced, not computed.

        Args:
          width: Factor on the number of channels.
          settings: Further settings (see `models.settings_of`).
        """
        module: Any = self.constructor(num_classes=self.num_classes, width=width, **(settings or {}))
        images = jnp.zeros((1, self.image_size, self.image_size, 3))
        apply = functools.partial(module.apply, train=False)
        variables = jax.eval_shape(lambda key: module.init(key, images, train=False), jax.random.PRNGKey(0))
        output = jax.eval_shape(apply, variables, images)
        analysis: Any = jax.jit(lambda *args: apply(*args).logits).lower(variables, images).cost_analysis()
        return Description(
            self.image_size,
            self.num_classes,
            sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
            round(analysis["flops"]),
            tuple(self._stage(x, output.grid) for x in output.features),
        )

    def _stage(self, x, grid):
        if grid is None:
            return Stage("map", x.shape[-1], self.image_size // x.shape[1])
        return Stage("tokens", x.shape[-1], self.image_size // grid.rows)
