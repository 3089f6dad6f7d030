"""The objective: a weighted sum of the methods that a configuration names."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from cskd_jax.losses import LOSSES, LossInputs, Method

_SET_BY_OBJECTIVE = {"num_classes", "axis_name", "parent", "name"}


def hyperparameters(name: str) -> dict[str, dataclasses.Field]:
    """The fields of method `name` of `LOSSES` that `config.losses.NAME` may set, besides `weight`."""
    return {f.name: f for f in dataclasses.fields(LOSSES[name]) if f.name not in _SET_BY_OBJECTIVE}


def needs_teacher(losses: Iterable[str]) -> bool:
    """Whether any of these methods of `LOSSES` reads the outputs of a teacher."""
    return any(LOSSES[name].needs_teacher for name in losses)


@dataclasses.dataclass(frozen=True)
class Objective:
    """total = sum over the methods of weight * method.

    Attributes:
      methods: {name: (weight, module)}.
    """

    methods: Mapping[str, tuple[float, Method]]

    @classmethod
    def create(cls, losses: Mapping[str, Mapping[str, Any]], *, num_classes: int, axis_name: str | None = None):
        """From `config.losses`: {NAME: {"weight": w, hyper-parameters of NAME}}, with the names of `LOSSES`."""
        methods = {}
        for name, settings in losses.items():
            settings = dict(settings)
            weight = settings.pop("weight")
            methods[name] = (weight, LOSSES[name](num_classes=num_classes, axis_name=axis_name, **settings))
        return cls(methods)

    def init(self, key: jax.Array, inputs: LossInputs) -> dict[str, Any]:
        """Parameters of each method that has any, by name; of `inputs` only shapes and dtypes are read."""
        params = {}
        for position, (name, (_, method)) in enumerate(self.methods.items()):
            # The parameters do not depend on how the batch is split; here no axis is mapped.
            variables = method.clone(axis_name=None).lazy_init(jax.random.fold_in(key, position), inputs)
            if "params" in variables:
                params[name] = variables["params"]
        return params

    def __call__(self, params: Mapping[str, Any], inputs: LossInputs) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The weighted total, and {NAME: unweighted value, NAME/TERM: value of a term} for every method."""
        total, terms = 0.0, {}
        for name, (weight, method) in self.methods.items():
            value, parts = method.apply({"params": params.get(name, {})}, inputs)
            total += weight * value
            terms[name] = value
            terms |= {f"{name}/{term}": part for term, part in parts.items()}
        return total, terms
