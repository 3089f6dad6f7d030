"""Networks that learn together: a student and peers like it, which all learn from each other."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from cskd_jax.models import ModelOutput
from cskd_jax.training.networks import Network, Variables
from cskd_jax.training.wrapping import WrappingNetwork

# The entry of every collection that holds the variables of the peers; no module has this name.
_PEERS = "+peers"


@dataclasses.dataclass(frozen=True)
class Cohort(WrappingNetwork):
    """A student and its peers as one `Network` in training; outside of training, the student alone.

    Every collection of its variables is the collection of the student plus an entry "+peers", {"1": collection of the
    first peer, ...}. The outputs in training are those of the student, plus the outputs of all networks, the student
    first, as `members`.

    Attributes:
      network: Network of the student and of each peer.
      peers: Number of peers.
    """

    peers: int

    @property
    def variables(self) -> None:
        """Returns None: `init` makes fresh variables."""
        return None

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """Returns fresh variables, the student's as without peers, and the student's outputs for two black images."""
        variables, output = self.network.init(key, image_shape)
        others = {str(n): self.network.init(jax.random.fold_in(key, n), image_shape)[0] for n in self._numbers}
        return _join(variables, others), output._replace(members=(output,) * (1 + self.peers))

    def apply(
        self, variables: Variables, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[ModelOutput, Variables]:
        """Returns the outputs for images [B, H, W, C], and the updated collections (empty outside of training)."""
        output, updated = self.network.apply(without_peers(variables), images, train=train, key=key)
        if not train:
            return output, updated
        members, others = [output], {}
        for number in self._numbers:
            own = {name: collection[_PEERS][str(number)] for name, collection in variables.items()}
            own_key = None if key is None else jax.random.fold_in(key, number)
            member, others[str(number)] = self.network.apply(own, images, train=True, key=own_key)
            members.append(member)
        return output._replace(members=tuple(members)), _join(updated, others)

    @property
    def _numbers(self) -> range:
        return range(1, 1 + self.peers)


def with_peers(network: Network, peers: int) -> Network:
    """Returns a network that learns with a number of peers; the same network if the number is 0."""
    return Cohort(network, peers) if peers else network


def without_peers(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables of a student alone, without those of its peers if it has any."""
    return {
        name: {part: x for part, x in collection.items() if part != _PEERS} if _has_peers(collection) else collection
        for name, collection in variables.items()
    }


def own_path(path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the path of a parameter within its own network, without the prefix that leads to a peer."""
    return path[2:] if path[:1] == (_PEERS,) else path


def _has_peers(collection):
    return isinstance(collection, Mapping) and _PEERS in collection


def _join(variables, others):
    """Returns the variables of a student with those of its peers, {number: variables}."""
    return {
        name: {**collection, _PEERS: {number: other[name] for number, other in others.items()}}
        for name, collection in variables.items()
    }
