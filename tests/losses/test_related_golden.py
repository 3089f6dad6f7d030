"""The related methods against values and gradients of public PyTorch implementations, in 64 bits.

Which function a case belongs to is read from its name, hyper-parameters from the name's numbers: more cases of the same
kinds are tested without a change here.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import (
    activation_boundary_loss,
    attention_transfer_loss,
    correlation_delta_loss,
    dkd_loss,
    factor_transfer_loss,
    fsp_loss,
    hierarchical_context_loss,
    hint_loss,
    kd_loss,
    nst_loss,
    pkt_loss,
    rkd_loss,
    similarity_preserving_loss,
    vid_loss,
)
from cskd_jax.losses._arrays import pool_to_common_size
from cskd_jax.losses.vid import MeanNetwork
from tests.conftest import golden_path

FILE = golden_path() / "related" / "related_losses.npz"


def stages(case, network):
    """The maps of `network`: NETWORK1, NETWORK2, ... or the single NETWORK."""
    names = [name for name in case if re.fullmatch(rf"{network}\d*", name)]
    return [case[name] for name in sorted(names, key=lambda name: int(name.removeprefix(network) or 0))]


def of_each_stage(loss):
    """Adapter: sum of the loss over the stages."""

    def adapter(case):
        pairs = zip(stages(case, "student"), stages(case, "teacher"), strict=True)
        return sum(loss(student, teacher) for student, teacher in pairs)

    return adapter


def of_all_stages(loss):
    return lambda case: loss(stages(case, "student"), stages(case, "teacher"))


def vid(case):
    student, teacher = pool_to_common_size(case["student"], case["teacher"])
    layers = {f"layer{layer + 1}": {"kernel": case[f"w{layer}"]} for layer in range(3)}
    network = MeanNetwork(case["w2"].shape[1], hidden=case["w0"].shape[1])
    return vid_loss(network.apply({"params": layers}, student), teacher, case["log_scale"])


def kd(case, temperature):
    return kd_loss(case["student"], case["teacher"], temperature=temperature)


def dkd(case, alpha, beta, temperature):
    arrays = case["student"], case["teacher"], case["labels"]
    return dkd_loss(*arrays, alpha=alpha, beta=beta, temperature=temperature)[0]


def rkd(case, distance_weight, angle_weight):
    arrays = case["student"], case["teacher"]
    return rkd_loss(*arrays, distance_weight=distance_weight, angle_weight=angle_weight)[0]


NUMBER = r"(\d+(?:\.\d+)?)"
# pattern of a name -> adapter of (case, the numbers in the name)
ADAPTERS = {
    rf"kd(?:_kl)?_T{NUMBER}": kd,
    rf"dkd_a{NUMBER}_b{NUMBER}_T{NUMBER}": dkd,
    rf"rkd_d{NUMBER}_a{NUMBER}": rkd,
    r"hint": of_each_stage(hint_loss),
    r"attention(?:_same|_pool)?": of_each_stage(attention_transfer_loss),
    r"similarity_preserving": of_each_stage(similarity_preserving_loss),
    r"nst_poly": of_each_stage(nst_loss),
    r"correlation_delta": of_each_stage(correlation_delta_loss),
    r"pkt": of_each_stage(pkt_loss),
    r"activation_boundary": of_all_stages(activation_boundary_loss),
    r"fsp": of_all_stages(fsp_loss),
    r"factor_transfer": of_each_stage(factor_transfer_loss),
    r"vid": vid,
    r"review_hcl": of_each_stage(hierarchical_context_loss),
}


def find_adapter(name):
    """Function from the inputs of case `name` to its loss; what follows a known name tells cases of a kind apart."""
    for suffix in ("", r"(?:_\w+)?"):
        for pattern, adapter in ADAPTERS.items():
            if match := re.fullmatch(pattern + suffix, name):
                return _with_numbers(adapter, match)
    raise LookupError(f"no adapter for golden case {name!r}")


def _with_numbers(adapter, match):
    return lambda case: adapter(case, *map(float, match.groups()))


@functools.cache
def cases():
    """{NAME: {"value": array, "in/ARRAY": array, "grad/ARRAY": array}}."""
    found = {}
    with np.load(FILE) as file:
        for key in file:
            name, _, rest = key.partition("/")
            found.setdefault(name, {})[rest] = file[key]
    return found


def part(case, kind):
    return {key.removeprefix(f"{kind}/"): value for key, value in case.items() if key.startswith(f"{kind}/")}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.usefixtures("x64")
def test_value_and_gradients(name):
    case = cases()[name]
    inputs, expected = part(case, "in"), part(case, "grad")
    assert expected
    adapter = find_adapter(name)

    @jax.jit
    def value_and_gradients(differentiated, others):
        return jax.value_and_grad(lambda arrays: adapter(others | arrays))(differentiated)

    inputs = jax.tree.map(jnp.asarray, inputs)
    differentiated = {key: inputs[key] for key in expected}
    value, gradients = value_and_gradients(differentiated, inputs)
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, case["value"], rtol=1e-10)
    for key, gradient in expected.items():
        # Relative to the largest element: those near 0 hold fewer digits.
        atol = 1e-10 * np.abs(gradient).max()
        np.testing.assert_allclose(gradients[key], gradient, rtol=1e-10, atol=atol, err_msg=key)


@pytest.mark.parametrize("name", ["hints", "crd", "rkd", "rkd_d25", "", "xkd_kl_T4"])
def test_unknown_case_fails(name):
    with pytest.raises(LookupError, match=f"^no adapter for golden case {name!r}$"):
        find_adapter(name)


@pytest.mark.parametrize("name", ["kd_kl_T2.5", "attention_odd", "vid_pool", "rkd_d0_a2", "dkd_a1_b8_T4_confident"])
def test_more_cases_of_a_kind_are_known(name):
    assert find_adapter(name)
