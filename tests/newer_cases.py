"""The golden cases of the newer losses: reading them, finding those of a method, and comparing with them.

Every file of `newer/` in the golden folder holds cases that were made by running public PyTorch implementations in 64
bits. A key is CASE/hyper (JSON), CASE/value, or CASE/KIND/NAME with the kinds `in`, `params` (PyTorch's names and
layouts), `term`, `grad` (of inputs; of parameters as `grad/params/NAME`), `state_after` (batch statistics after one
pass) and `steps` (a recorded optimization). A case belongs to the method whose name it begins with, and its shapes and
hyper-parameters are read from the file: other files of this form are tested without a change here.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import golden_path

# The beginnings of the names of all cases; a test fails if a case begins otherwise.
FAMILIES = (
    *("nkd", "ttm", "wttm", "rld", "mlkd", "ls_kd", "ls_dkd", "ls_mlkd", "ctkd", "ls_ctkd", "luminet", "abkd", "dot"),
    *("wkd_cost", "wkd_l", "wkd_f", "wkd_train"),
    *("simkd", "semckd", "srrl", "ofd", "dist", "sdd", "itrd", "vkd", "srd", "ofa"),
)
# Gradients that are zero but for rounding, {beginning of the case: names of parameters}.
_ROUNDING = {
    "wkd_f": ("conv.bias", "conv2.bias", "conv3.bias"),
    "wkd_train": ("conv.bias", "conv2.bias", "conv3.bias"),
    "itrd_same_width": ("embed.linear.bias",),
    "srd": ("embed.bias",),
}
_ABSOLUTE = 1e-12

Results = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A golden case.

    Attributes:
      name: Name of the case.
      hyper: Hyper-parameters by name.
      values: Arrays by what follows the name of the case in their keys, such as "in/student".
    """

    name: str
    hyper: Mapping[str, Any]
    values: Mapping[str, np.ndarray]

    def part(self, kind: str) -> dict[str, np.ndarray]:
        """Returns the arrays whose keys begin with `kind` and a slash, by the rest of the key."""
        return {k.removeprefix(f"{kind}/"): v for k, v in self.values.items() if k.startswith(f"{kind}/")}

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Returns the inputs by name; integers are int32."""
        return {k: v.astype(np.int32) if v.dtype.kind == "i" else v for k, v in self.part("in").items()}

    @property
    def tolerance(self) -> float:
        """Returns the error relative to the largest entry that is allowed."""
        return 1e-9 if "ctkd" in self.name else 1e-10  # Gradients of a large temperature cancel.

    def assert_close(self, key: str, actual: Any) -> None:
        """Compares an array with the one of the file at `key`, such as "value", "term/ce" or "grad/params/fc.bias"."""
        expected, actual = self.values[key], np.asarray(actual)
        assert actual.shape == expected.shape, (self.name, key, actual.shape, expected.shape)
        prefix = longest_prefix(self.name, _ROUNDING)
        is_rounding = prefix is not None and key in {f"grad/params/{name}" for name in _ROUNDING[prefix]}
        bound = _ABSOLUTE if is_rounding else self.tolerance * np.max(np.abs(expected), initial=0)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=bound, err_msg=f"{self.name}/{key}")


@functools.cache
def read_cases() -> Mapping[str, Case]:
    """Returns all cases of all files by name."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted((golden_path() / "newer").glob("*.npz")):
        with np.load(path) as file:
            for key in file.files:
                name, _, rest = key.partition("/")
                assert rest not in found.setdefault(name, {}), f"{path} repeats the case {name}"
                found[name][rest] = file[key]
    return {name: Case(name, json.loads(str(values.pop("hyper"))), values) for name, values in found.items()}


def longest_prefix(name: str, prefixes: Any) -> str | None:
    """Returns the longest of the prefixes that a name begins with, or None."""
    return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)


def names_of(*families: str) -> list[str]:
    """Returns the names of the cases of some of `FAMILIES`."""
    assert set(families) <= set(FAMILIES)
    return [name for name in read_cases() if longest_prefix(name, FAMILIES) in families]


def check_case(case: Case, loss: Callable[[dict, dict], tuple[jax.Array, Results]]) -> None:
    """Compares value, intermediate results and gradients of a loss with a case.

    Args:
      case: The case.
      loss: `(inputs, parameters) -> (value, results)`, with parameters by PyTorch's names in PyTorch's layouts, which
        the function brings into ours, and results by the keys of the file, such as "term/ce" and
        "state_after/bn.running_var". All results of the file must be among them.
    """
    inputs, params = (jax.tree.map(jnp.asarray, tree) for tree in (case.inputs, case.part("params")))
    of_params = case.part("grad/params")
    of_inputs = {name for name in case.part("grad") if not name.startswith("params/")}

    @jax.jit
    def run(inputs, params):
        def value(moved, moved_params):
            return loss(inputs | moved, params | moved_params)

        moved = {name: inputs[name] for name in of_inputs}, {name: params[name] for name in of_params}
        return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(*moved)

    (value, results), (input_gradients, param_gradients) = run(inputs, params)
    assert value.dtype == jnp.float64
    found = {"value": value, **results}
    found |= {f"grad/{name}": gradient for name, gradient in input_gradients.items()}
    found |= {f"grad/params/{name}": gradient for name, gradient in param_gradients.items()}
    expected = {key for key in case.values if key.split("/")[0] in ("value", "term", "grad", "state_after")}
    assert expected <= found.keys(), f"{case.name} is not compared with {sorted(expected - found.keys())}"
    assert of_inputs
    for key in sorted(expected):
        case.assert_close(key, found[key])
