"""The table of docs/networks.md is that of the code."""

import pytest

from cskd_jax.models import MODELS, Stage
from cskd_jax.runs.network_table import HEADER, row
from tests.conftest import ROOT
from tests.tiers import chosen

LINES = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8").splitlines(keepends=True)


def test_every_network_has_a_line():
    start = LINES.index(HEADER.splitlines(keepends=True)[0])
    names = [line.split("`")[1] for line in LINES[start + 2 :]]
    assert names == list(MODELS)


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen([*MODELS], ("resnet8", "vgg8", "wrn_16_1", "shufflenet_v1", "deit_tiny")))
def test_line_is_up_to_date(name):
    message = "docs/networks.md is out of date; python -m cskd_jax.runs.network_table prints its table"
    assert row(name) in LINES, message


def test_description():
    found = MODELS["deit_tiny"].describe(width=0.5, settings={"patch_size": 32, "depth": 2})
    assert found.stages == (Stage("tokens", 96, 32),) * 2
    assert MODELS["vgg8"].describe(width=0.125).stages[0] == Stage("map", 16, 2)
