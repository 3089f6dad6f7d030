"""The adapter for modules of flax.nnx.

- Training starts from the weights of the instance, which is not modified; `seed` does not affect them.
- Training mode is switched by the methods `train` and `eval` of the module.
- The state of its random number generators is reset at every step from the key of the step, and is not saved.
- It returns a `ModelOutput`, a dictionary with the same keys, or logits alone; features cannot be selected by path.
"""

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from cskd_jax.models import ModelOutput
from cskd_jax.training.layers import CLASSIFIER
from cskd_jax.training.networks import Variables, as_output


class NnxNetwork:
    """An nnx module as a `Network`.

    Args:
      module: Module that is called with images [B, H, W, C] and is not modified.
      head: Path, within the parameters, of the classifier, a linear layer on the pooled last map, for losses that read
        it.

    Attributes:
      module: The module.
      head: Path of the classifier.
      synchronized: False, since batch normalization uses the statistics of each device's part of the batch.
      variables: The variables of the instance, {"params": ..., "batch_stats": ..., ...}.
    """

    synchronized = False

    def __init__(self, module: nnx.Module, head: str = CLASSIFIER):
        self.module, self.head, self._graphs = module, head, {}
        for train in (False, True):
            copy = nnx.clone(module)
            copy.train() if train else copy.eval()
            self._graphs[train], state = nnx.split(copy)
        self._flat = list(nnx.to_flat_state(state))
        flat = {
            (_collection(variable), *map(str, path)): variable.get_value()
            for path, variable in self._flat
            if _collection(variable) is not None
        }
        self.variables = {"params": {}, **traverse_util.unflatten_dict(flat)}

    def on_axis(self, axis_name: str | None) -> "NnxNetwork":
        """Returns the network itself, which knows nothing about axes."""
        del axis_name
        return self

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """Returns the variables of the instance, and the outputs for two black images of shape [H, W, C]."""
        del key
        images = jnp.zeros((2, *image_shape), jnp.float32)
        return self.variables, self.apply(self.variables, images, train=False)[0]

    def apply(
        self, variables: Variables, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[ModelOutput, Variables]:
        """Returns the outputs for images [B, H, W, C], and the updated collections (empty outside of training)."""
        module = self._merge(variables, train, key)
        outputs = module(images)
        if not train:
            return as_output(outputs), {}
        known, updated = {path for path, _ in self._flat}, {}
        for path, variable in nnx.to_flat_state(nnx.state(module)):
            collection = _collection(variable)
            if collection not in (None, "params") and path in known:
                updated[(collection, *map(str, path))] = variable.get_value()
        return as_output(outputs), traverse_util.unflatten_dict(updated)

    def with_variables(self, variables: Variables) -> nnx.Module:
        """Returns a copy of the module with these variables, such as those of a result, in evaluation mode."""
        return self._merge(variables, False, None)

    def _merge(self, variables, train, key):
        flat = traverse_util.flatten_dict(dict(variables))
        state = []
        for number, (path, variable) in enumerate(self._flat):
            collection = _collection(variable)
            if collection is not None:
                value = flat[(collection, *map(str, path))]
            else:
                value = _reseeded(variable, None if key is None or not train else jax.random.fold_in(key, number))
            state.append((path, variable.replace(value)))
        return nnx.merge(self._graphs[train], nnx.from_flat_state(state))


def _collection(variable: nnx.Variable) -> str | None:
    """Returns the collection of a variable of an nnx module; None for the state of a random number generator."""
    if isinstance(variable, nnx.RngState):
        return None
    return "params" if isinstance(variable, nnx.Param) else nnx.variable_name_from_type(type(variable))


def _reseeded(variable: nnx.Variable, key: jax.Array | None) -> jax.Array:
    """Returns the initial state of a random number generator for a key; without a key, the state in the instance."""
    value = variable.get_value()
    if key is None:
        return value
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jnp.zeros_like(value)  # The number of draws.
    keys = jax.random.split(jax.random.wrap_key_data(key, impl=jax.random.key_impl(value)), max(1, value.size))
    return keys.reshape(value.shape)
