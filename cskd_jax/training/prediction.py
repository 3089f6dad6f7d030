"""Students that predict with a loss: `Method.predict` replaces the logits of the network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.errors import FlaxError

from cskd_jax.errors import UserError, one_line
from cskd_jax.inputs import is_map, is_optional, is_text, unsound
from cskd_jax.losses import LOSSES, Method
from cskd_jax.models import ModelOutput
from cskd_jax.training.networks import Network, Variables
from cskd_jax.training.objective import Objective, hyperparameters
from cskd_jax.training.peers import without_peers
from cskd_jax.training.state import TrainState, output_of
from cskd_jax.training.wrapping import WrappingNetwork

# The collection of a network's variables that holds the variables of the loss with which it predicts.
PREDICTION = "prediction"


@dataclasses.dataclass(frozen=True)
class PredictingNetwork(WrappingNetwork):
    """A `Network` for evaluation whose logits are predicted by a loss from its outputs.

    Attributes:
      network: Network.
      loss: Loss, whose variables are the collection "prediction" of the variables.
    """

    loss: Method

    @property
    def head(self) -> None:
        """Returns None: the classifier of the network takes no part in its prediction."""
        return None

    @property
    def variables(self) -> None:
        """Returns None: the variables come from training."""
        return None

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """Raises ValueError, because the loss learns during training what it predicts with."""
        raise ValueError("a network that predicts with a loss gets its variables only from training")

    def apply(
        self, variables: Variables, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[ModelOutput, Variables]:
        """Returns the outputs for images [B, H, W, C] in evaluation mode, and no updated collections.

        Raises:
          ValueError: Training mode is requested.
        """
        del key
        if train:
            raise ValueError("a network that predicts with a loss is for evaluation only")
        output, _ = self.network.apply(without_prediction(variables), images, train=False)
        logits = self.loss.apply(variables[PREDICTION], output, method="predict")
        return output._replace(logits=logits), {}


class PredictingModule(nn.Module):
    """A `PredictingNetwork` as a linen module, whose variables are those of the network.

    Attributes:
      network: The network.
    """

    network: PredictingNetwork

    def __call__(self, images: jax.Array, *, train: bool) -> ModelOutput:
        """Returns the outputs for images [B, H, W, C]; raises ValueError in training mode."""
        return self.network.apply(self.variables, images, train=train)[0]


def without_prediction(variables: Variables) -> Variables:
    """Returns the variables of the network itself."""
    return {name: collection for name, collection in variables.items() if name != PREDICTION}


def predicting(network: Network, objective: Objective) -> Network:
    """Returns a network that predicts like a student of an objective; the same network if no loss changes that."""
    name = objective.predictor
    return network if name is None else PredictingNetwork(network, objective.losses[name][1].clone(axis_name=None))


def variables_of(state: TrainState, objective: Objective) -> dict[str, Any]:
    """Returns the variables of a student for inference, including those of the loss with which it predicts, if any."""
    return {**without_peers(state.averaged), **prediction_of(state.params, state.memory, objective.predictor)}


def prediction_of(params: Mapping[str, Any], memory: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Returns the collection of loss `name`, with which a student predicts, from its state; empty if `name` is None."""
    if name is None:
        return {}
    return {PREDICTION: {"params": params.get("losses", {}).get(name, {}), "memory": memory.get(name, {})}}


def parameters_of(variables: Variables) -> Any:
    """Returns all trained parameters with which a student predicts: its own, and those of a loss."""
    return variables["params"], variables.get(PREDICTION, {}).get("params", {})


def describe_prediction(objective: Objective) -> dict[str, Any]:
    """Returns {"loss", "settings"} of the loss with which a student predicts, for its record; {} if there is none."""
    name = objective.predictor
    if name is None:
        return {}
    loss = objective.losses[name][1]
    if type(loss) is not LOSSES.get(name):
        return {"loss": name, "settings": None}
    return {"loss": name, "settings": {field: getattr(loss, field) for field in hyperparameters(type(loss))}}


def is_prediction(value: Any) -> bool:
    """Returns whether a JSON value is a result of `describe_prediction`."""
    settings = is_optional(is_map(lambda setting: isinstance(setting, str | int | float | bool | None)))
    return value == {} or not unsound(value, {"loss": is_text, "settings": settings})


def restore_prediction(network: Network, variables: Variables, record: Any, source: str) -> Network:
    """Returns the network of a checkpoint that predicts as its record says.

    Args:
      network: Network, whose own variables are known to fit.
      variables: Variables of the checkpoint.
      record: Record of the checkpoint.
      source: Name of the checkpoint, for errors.

    Raises:
      UserError: The loss is not one of this package, or its variables do not fit.
    """
    if not record.prediction:
        return network
    name, settings = record.prediction["loss"], record.prediction["settings"]
    loss = LOSSES.get(name)
    if loss is None or not loss.predicts or settings is None or settings.keys() - hyperparameters(loss).keys():
        raise UserError(f"{source} holds a student that predicts with a loss, {name!r}, unknown to this version")
    # Losses that predict read the number of classes from their variables.
    predicting = PredictingNetwork(network, loss(num_classes=0, **settings))
    try:
        shape = (*record.images["size"], record.channels)
        jax.eval_shape(lambda variables: output_of(predicting, shape, variables), variables)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, FlaxError) as error:
        raise UserError(f"{source} holds no valid prediction with {name}: {one_line(error)}") from None
    return predicting
