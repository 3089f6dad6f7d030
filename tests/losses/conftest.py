"""Fixtures of the tests of the losses."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Nothing here runs long enough to be worth optimizing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
