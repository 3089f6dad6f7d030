"""Teachers: networks that are not trained, alone or combined into one."""

import dataclasses
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cskd_jax.data.augment import Normalize
from cskd_jax.errors import UserError
from cskd_jax.models import ModelOutput
from cskd_jax.training.adapters import LinenNetwork, as_network
from cskd_jax.training.networks import Network, Variables, check_collections
from cskd_jax.training.normalization import ResizedNetwork, renormalize
from cskd_jax.training.wrapping import WrappingNetwork

Combine = Literal["logits", "probabilities"]


@dataclasses.dataclass
class Teacher:
    """A network that is not trained, in evaluation mode.

    Attributes:
      network: A linen module, an nnx module, a function or a `Network`; see `training.adapters`.
      variables: Variables of the network; None for an nnx module, which has its own. A trainer with one teacher may be
        created before they exist; they must be set before `fit`.
      weight: Weight of the teacher in a combination of several, relative to the weights of the others.
      normalization: Normalization of the images that it was trained on; None if it is the same as for the students.
      image_size: Side of the squares to which its images are resized; None leaves them unchanged.
    """

    network: Any
    variables: Variables | None = None
    weight: float = 1.0
    normalization: Normalize | None = None
    image_size: int | None = None


class ForeignTeacher(WrappingNetwork):
    """A `Network` with classes other than those of the data, so that losses see only its features and its embedding."""

    @property
    def head(self) -> None:
        """Returns None: no loss reads the classifier."""
        return None

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """Returns fresh variables, and the outputs for two black images of shape [H, W, C]."""
        variables, output = self.network.init(key, image_shape)
        return variables, _without_classes(output)

    def apply(
        self, variables: Variables, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[ModelOutput, Variables]:
        """Returns the outputs for images [B, H, W, C] without logits, and the updated collections."""
        output, updates = self.network.apply(variables, images, train=train, key=key)
        return _without_classes(output), updates


def _without_classes(output):
    return output._replace(logits=None, head_logits=())


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Several trained networks as one `Network`, whose variables are {"0": variables of the first, "1": ...}.

    Its only outputs are `logits`, the combined logits, and `members`, the outputs of each network. With "logits", the
    combined logits are the weighted mean of the members' logits, whose softmax at any temperature is a geometric mean
    of the members' softmaxes. With "probabilities", they are the logarithms of the weighted mean of the probabilities
    at temperature 1 or, if an image has several classes, the log-odds of that mean. Networks with different classes
    have no combination.

    Attributes:
      networks: The networks.
      weights: Their weights, which add up to 1.
      combine: What is averaged.
      multilabel: Whether an image has any number of classes, so that probabilities are sigmoids.
    """

    networks: tuple[Network, ...]
    weights: tuple[float, ...]
    combine: Combine = "logits"
    multilabel: bool = False

    # A loss that reads a classifier needs one teacher.
    head = None

    @property
    def synchronized(self) -> bool:
        """Returns True: networks in evaluation mode treat each image by itself."""
        return True

    @property
    def variables(self) -> None:
        """Returns None: the variables are given separately from the network."""
        return None

    def on_axis(self, axis_name: str | None) -> "Ensemble":
        """Returns the networks for a batch that is split over a mapped axis; None means a whole batch."""
        return dataclasses.replace(self, networks=tuple(network.on_axis(axis_name) for network in self.networks))

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """Raises ValueError, because an ensemble is made of trained networks."""
        raise ValueError("an ensemble consists of trained networks and creates no variables of its own")

    def apply(
        self, variables: Variables, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[ModelOutput, Variables]:
        """Returns the outputs for images [B, H, W, C] in evaluation mode, and no updated collections.

        Raises:
          ValueError: Training mode is requested.
        """
        del key
        if train:
            raise ValueError("an ensemble cannot be trained")
        members = tuple(
            network.apply(variables[str(number)], images, train=False)[0]
            for number, network in enumerate(self.networks)
        )
        shapes = {None if member.logits is None else member.logits.shape for member in members}
        if len(shapes) > 1 or None in shapes:  # The classes differ; a loss may name one member.
            none: Any = None
            return ModelOutput(none, members=members), {}
        dtype = jnp.result_type(*(member.logits for member in members))
        logits = jnp.stack([member.logits.astype(dtype) for member in members])
        weights = np.asarray(self.weights, dtype)[:, None, None]
        if self.combine == "logits":
            combined = jnp.sum(weights * logits, axis=0)
        elif self.multilabel:
            yes, no = (_log_mean(jax.nn.log_sigmoid(x), weights) for x in (logits, -logits))
            combined = yes - no
        else:
            combined = _log_mean(jax.nn.log_softmax(logits), weights)
        return ModelOutput(combined, members=members), {}


def _log_mean(log_probabilities, weights):
    return jax.nn.logsumexp(log_probabilities, axis=0, b=weights)


def network_of(
    teachers: Sequence[Teacher], given: Normalize | None, combine: Combine = "logits", multilabel: bool = False
) -> Network | None:
    """Returns the network of any number of teachers, which takes the images of the students; None without a teacher.

    Args:
      teachers: The teachers.
      given: Normalization of the images of the students; None if no `Normalize` normalizes them.
      combine: What is averaged over several teachers; see `Ensemble`.
      multilabel: Whether an image has any number of classes.

    Raises:
      UserError: A setting of a teacher is wrong.
    """
    if combine not in ("logits", "probabilities"):
        raise UserError(f"combine_teachers is {combine!r}; it must be logits or probabilities")
    networks = [_adapt(teacher, given) for teacher in teachers]
    if len(networks) < 2:
        return networks[0] if networks else None
    weights = [teacher.weight for teacher in teachers]
    if any(not isinstance(weight, Real) or not 0 <= weight < np.inf for weight in weights) or not sum(weights):
        raise UserError(f"the weights of the teachers are {weights}; they must be at least 0, and not all of them 0")
    shares = tuple(float(weight) / float(sum(weights)) for weight in weights)
    return Ensemble(tuple(networks), shares, combine, multilabel)


def variables_of(teachers: Sequence[Teacher]) -> Variables | None:
    """Returns the variables of the teachers' network; None if they do not exist yet, or without a teacher.

    Raises:
      UserError: One of several teachers has none, or the variables of a linen module are not collections.
    """
    networks = [as_network(one.network) for one in teachers]
    found = [n.variables if one.variables is None else one.variables for n, one in zip(networks, teachers, strict=True)]
    for network, variables in zip(networks, found, strict=True):
        if variables is not None and isinstance(network, LinenNetwork):
            check_collections("teacher_variables", variables)
    if len(found) < 2:
        return found[0] if found else None
    if any(variables is None for variables in found):
        raise UserError("one of several teachers has no variables: each must already be trained")
    return {str(number): variables for number, variables in enumerate(found)}


def _adapt(teacher: Teacher, given: Normalize | None) -> Network:
    """Returns the network of a teacher for the images of the students."""
    network, size = as_network(teacher.network), teacher.image_size
    if size is not None:
        if type(size) is not int or size < 1:
            raise UserError(f"the image_size of a teacher is {size!r}; it must be a positive integer, or None")
        network = ResizedNetwork(network, size)
    if teacher.normalization is None:
        return network
    if given is None:
        raise UserError(
            "a teacher with its own normalization needs uint8 images and, in a Trainer, a cskd_jax.Normalize as "
            "normalize"
        )
    return renormalize(network, given, teacher.normalization)
