"""The objective: a weighted sum of the methods that a configuration names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from cskd_jax.losses import LOSSES, LossInputs, Method

_SET_BY_OBJECTIVE = {"num_classes", "axis_name", "num_examples", "parent", "name"}


def hyperparameters(name: str) -> dict[str, dataclasses.Field]:
    """The fields of method `name` of `LOSSES` that `config.losses.NAME` may set, besides `weight`."""
    return {f.name: f for f in dataclasses.fields(LOSSES[name]) if f.name not in _SET_BY_OBJECTIVE}


@dataclasses.dataclass(frozen=True)
class Objective:
    """total = sum over the methods of weight * method.

    Attributes:
      methods: {name: (weight, module)}.
    """

    methods: Mapping[str, tuple[float, Method]]

    @classmethod
    def create(
        cls,
        losses: Mapping[str, Mapping[str, Any]],
        *,
        num_classes: int,
        axis_name: str | None = None,
        num_examples: int = 0,
    ):
        """From `config.losses`: {NAME: {"weight": w, hyper-parameters of NAME}}, with the names of `LOSSES`."""
        common = {"num_classes": num_classes, "axis_name": axis_name, "num_examples": num_examples}
        methods = {}
        for name, settings in losses.items():
            settings = dict(settings)
            weight = settings.pop("weight")
            methods[name] = (weight, LOSSES[name](**common, **settings))
        return cls(methods)

    @property
    def needs_teacher(self) -> bool:
        """Whether any method reads the teacher's outputs."""
        return any(method.needs_teacher for _, method in self.methods.values())

    def init(self, key: jax.Array, inputs: LossInputs) -> tuple[dict[str, Any], dict[str, Any]]:
        """(parameters, memory) of each method that has any, by name; of `inputs` only shapes and dtypes are read."""
        params, memory = {}, {}
        for position, (name, (_, method)) in enumerate(self.methods.items()):
            # The parameters do not depend on how the batch is split; here no axis is mapped.
            variables = method.clone(axis_name=None).lazy_init(jax.random.fold_in(key, position), inputs)
            if "params" in variables:
                params[name] = variables["params"]
            if "memory" in variables:
                memory[name] = variables["memory"]
        return params, memory

    def __call__(
        self, params: Mapping[str, Any], memory: Mapping[str, Any], inputs: LossInputs
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """The weighted total, {NAME: unweighted value, NAME/TERM: value of a term} for every method, the new memory."""
        total, terms, new_memory = 0.0, {}, {}
        for name, (weight, method) in self.methods.items():
            variables = {"params": params.get(name, {}), "memory": memory.get(name, {})}
            (value, parts), updated = method.apply(variables, inputs, mutable=["memory"])
            total += weight * value
            terms[name] = value
            terms |= {f"{name}/{term}": part for term, part in parts.items()}
            if name in memory:
                new_memory[name] = updated["memory"]
        return total, terms, new_memory
