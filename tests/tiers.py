"""Which cases of a test run in CI. All run with `pytest`; `-m "not exhaustive"` leaves those out that only repeat."""

import pytest


def chosen(cases, kept):
    """Cases of `parametrize`, tuples for several names, of which those that are not in `kept` are exhaustive, and slow.

    What is kept is as many of the first cases, or a collection of cases.
    """
    kept = cases[:kept] if isinstance(kept, int) else kept

    def exhaustive(case):
        marks = [pytest.mark.slow, pytest.mark.exhaustive]
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)

    return [case if case in kept else exhaustive(case) for case in cases]
