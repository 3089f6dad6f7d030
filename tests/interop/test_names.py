"""Names and layouts of PyTorch for every model of the table, in both directions."""

import json
import pathlib

import numpy as np
import pytest

from cskd_jax.errors import UserError
from cskd_jax.interop.names import from_torch, to_torch
from cskd_jax.models import MODELS, create_model
from tests.tiers import chosen
from tests.torch_files import assert_same_variables, random_variables

# {model: {name: shape}} of torchvision's networks (resnet*_224, inception_v3; 1000 categories) and of those that the
# field's comparison tables use (100 categories).
REFERENCE = json.loads((pathlib.Path(__file__).parent / "torch_names.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen([*MODELS], [*MODELS][::4]))
def test_out_and_in_is_the_identity(name):
    module = create_model(name, num_classes=7, width=0.25)
    variables = random_variables(module)
    state_dict = to_torch(module, variables, batches=5)
    back, used, unused = from_torch(module, 3, state_dict)
    assert_same_variables(back, variables)
    # Nothing is lost on the way out, and what is not needed on the way in is only the count of the batches.
    assert used.keys() | set(unused) == state_dict.keys()
    counts = {("num_batches_tracked", 5)} if "batch_stats" in variables else set()
    assert {(name.rsplit(".")[-1], int(state_dict[name])) for name in unused} == counts
    assert all(array.flags.c_contiguous for array in state_dict.values())


@pytest.mark.parametrize("name", REFERENCE)
def test_names_and_shapes_are_those_of_pytorch(name):
    expected = {key: tuple(shape) for key, shape in REFERENCE[name].items()}
    classes = 1000 if name == "inception_v3" or name.endswith("_224") else 100
    module = create_model(name, num_classes=classes)
    state_dict = to_torch(module, random_variables(module), batches=1)
    assert {key: array.shape for key, array in state_dict.items()} == expected


def test_kernels_are_transposed():
    # Not only the shapes, which are the same where a layer has as many inputs as outputs.
    module = create_model("vgg8", num_classes=5, width=0.0625)
    variables = random_variables(module)
    state_dict = to_torch(module, variables, batches=1)
    kernel = variables["params"]["stage4_conv1"]["kernel"]
    assert kernel.shape == (3, 3, 32, 32)
    np.testing.assert_array_equal(state_dict["block4.0.weight"][7, 3, 2, 1], kernel[2, 1, 3, 7])
    np.testing.assert_array_equal(
        state_dict["classifier.weight"][4, 9], variables["params"]["classifier"]["kernel"][9, 4]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("bn1.bias"), r"missing: bn1.bias \(4,\)$"),
        (lambda tensors: tensors.update(extra=np.ones((2, 3))), r"unknown: extra \(2, 3\)$"),
        (
            lambda tensors: tensors.update({"fc.bias": np.ones(5)}),
            r"of the wrong shape: fc.bias \(5,\) instead of \(7,\)$",
        ),
        (
            lambda tensors: tensors.update({"fc.bias": np.ones(7, np.int64)}),
            r"not floating-point: fc.bias int64$",
        ),
        (lambda tensors: tensors.update({"fc.bias": np.full(7, 1e300)}), r"not finite: fc.bias$"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "conv" in name],
            r"missing: .*conv.* and \d+ more$",
        ),
    ],
)
def test_mismatch_names_the_tensors(change, message):
    module = create_model("resnet8", num_classes=7, width=0.25)
    tensors = to_torch(module, random_variables(module), batches=1)
    change(tensors)
    with pytest.raises(UserError, match=message):
        from_torch(module, 3, tensors)
