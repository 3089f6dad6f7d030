"""The variables of a small network, here and under PyTorch's names."""

import pytest

from cskd_jax.interop.names import to_torch
from tests.torch_files import MODULE, random_variables


@pytest.fixture(scope="module")
def variables():
    return random_variables(MODULE)


@pytest.fixture(scope="module")
def arrays(variables):
    return to_torch(MODULE, variables, batches=3)
