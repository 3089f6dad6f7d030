"""The objective: a weighted sum of the methods that a configuration names."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cskd_jax.losses import LOSSES, LossInputs, Method

_SET_BY_OBJECTIVE = {"num_classes", "axis_name", "num_examples", "parent", "name"}


def hyperparameters(name: str) -> dict[str, dataclasses.Field]:
    """The fields of method `name` of `LOSSES` that `config.losses.NAME` may set, besides those of `Weight`."""
    return {f.name: f for f in dataclasses.fields(LOSSES[name]) if f.name not in _SET_BY_OBJECTIVE}


def needs_teacher(losses: Iterable[str]) -> bool:
    """Whether any of these methods of `LOSSES` reads the outputs of a teacher."""
    return any(LOSSES[name].needs_teacher for name in losses)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Weight of a method over the epochs of a run; epochs are counted from 0.

    Attributes:
      weight: where the method is fully on.
      start_epoch: the first epoch with the method.
      end_epoch: the first epoch without it; None: on to the end.
      warmup_epochs: the weight grows linearly over so many epochs: 1/n of it in the first, all of it in the n-th.
    """

    weight: float
    start_epoch: int = 0
    end_epoch: int | None = None
    warmup_epochs: int = 0

    def at(self, epoch: jax.Array) -> jax.Array | float:
        """The weight in `epoch`, an integer scalar."""
        weight = self.weight
        if self.warmup_epochs:
            weight = weight * jnp.minimum((epoch - self.start_epoch + 1) / self.warmup_epochs, 1)
        if self.start_epoch or self.end_epoch is not None:
            before_end = True if self.end_epoch is None else epoch < self.end_epoch
            weight = jnp.where((epoch >= self.start_epoch) & before_end, weight, 0)
        return weight


@dataclasses.dataclass(frozen=True)
class Objective:
    """total = sum over the methods of weight * method.

    Attributes:
      methods: {name: (weight, module)}.
      steps_per_epoch: for weights that change.
    """

    methods: Mapping[str, tuple[Weight, Method]]
    steps_per_epoch: int = 1

    @classmethod
    def create(
        cls,
        losses: Mapping[str, Mapping[str, Any]],
        *,
        num_classes: int,
        axis_name: str | None = None,
        num_examples: int = 0,
        steps_per_epoch: int = 1,
    ):
        """From `config.losses`: {NAME: {fields of `Weight`, hyper-parameters of NAME}}, with the names of `LOSSES`."""
        common = {"num_classes": num_classes, "axis_name": axis_name, "num_examples": num_examples}
        fields = {field.name for field in dataclasses.fields(Weight)}
        methods = {}
        for name, settings in losses.items():
            weight = Weight(**{key: value for key, value in settings.items() if key in fields})
            hyper = {key: value for key, value in settings.items() if key not in fields}
            methods[name] = (weight, LOSSES[name](**common, **hyper))
        return cls(methods, steps_per_epoch)

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
        self, params: Mapping[str, Any], memory: Mapping[str, Any], inputs: LossInputs, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """Evaluates the methods on one batch.

        Args:
          params: {name: what the method trains}, from `init`.
          memory: {name: what it remembers}, from `init` or the step before.
          inputs: the batch.
          step: int32, optimization steps done.

        Returns:
          The weighted total; {NAME: unweighted value, NAME/TERM: value of a term} for every method; the new memory.
        """
        total, terms, new_memory = 0.0, {}, {}
        for name, (weight, method) in self.methods.items():
            variables = {"params": params.get(name, {}), "memory": memory.get(name, {})}
            (value, parts), updated = method.apply(variables, inputs, mutable=["memory"])
            total += weight.at(step // self.steps_per_epoch) * value
            terms[name] = value
            terms |= {f"{name}/{term}": part for term, part in parts.items()}
            if name in memory:
                new_memory[name] = updated["memory"]
        return total, terms, new_memory
