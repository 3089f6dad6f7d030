"""Tiny runs end with the very arrays that they ended with before: on a machine that is known, or else twice."""

import pytest

from tests import drift
from tests.tiers import chosen


@pytest.mark.slow
@pytest.mark.parametrize("methods", chosen(["cskd", "cskd crd"], 1))
def test_nothing_has_drifted(methods):
    case, methods = "1 x float32", methods.split()
    found = drift.digests_of(case, methods)
    expected = drift.recorded().get(case) or drift.digests_of(case, methods)
    assert found == {method: expected[method] for method in methods}
