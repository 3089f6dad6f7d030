"""The base of networks that use another network."""

import dataclasses
from typing import Self

from cskd_jax.training.layers import CLASSIFIER
from cskd_jax.training.networks import Network, Variables


@dataclasses.dataclass(frozen=True)
class WrappingNetwork:
    """Base of a `Network` that uses another one; what a subclass does not define is that of the other.

    Attributes:
      network: The other network.
    """

    network: Network

    @property
    def synchronized(self) -> bool:
        """Returns whether the network computes batch statistics from the global batch."""
        return self.network.synchronized

    @property
    def variables(self) -> Variables | None:
        """Returns the variables that come with the network; None if `init` makes fresh ones."""
        return self.network.variables

    @property
    def head(self) -> str | None:
        """Returns the path of the classifier of the network; None if it has none."""
        return getattr(self.network, "head", CLASSIFIER)

    @property
    def norms(self) -> tuple[str, ...]:
        """Returns the paths of the batch normalizations before the last ReLU of each stage; empty if not known."""
        return getattr(self.network, "norms", ())

    @property
    def draws_by_position(self) -> bool:
        """Returns whether the network draws random numbers by the positions of samples in the global batch."""
        return getattr(self.network, "draws_by_position", False)

    @property
    def has_training_mode(self) -> bool:
        """Returns whether the network has a training mode."""
        return getattr(self.network, "has_training_mode", True)

    def on_axis(self, axis_name: str | None) -> Self:
        """Returns the network for a batch that is split over a mapped axis; None means a whole batch."""
        return dataclasses.replace(self, network=self.network.on_axis(axis_name))
