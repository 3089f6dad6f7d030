"""Losses that are switched off add nothing to the total or to its gradient, whatever their values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cskd_jax.losses import LossInputs, Method
from cskd_jax.training.objective import Objective
from tests.method_checks import NUM_CLASSES, make_inputs

EPOCH = 5
# Settings of a loss that is off in that epoch, and on.
OFF = ({"weight": 0.0}, {"end_epoch": 5}, {"start_epoch": 6}, {"start_epoch": 6, "end_epoch": 8, "decay_epoch": 7})
ON = ({}, {"end_epoch": 6}, {"start_epoch": 5, "warmup_epochs": 2})


class Infinite(Method):
    """A loss of logits and parameters whose value and derivatives are infinite, or of an ordinary size."""

    infinite: bool = True

    @nn.compact
    def __call__(self, inputs: LossInputs):
        scale = self.param("scale", nn.initializers.ones, ())
        size = jnp.sum(jnp.square(scale * inputs.student.logits))
        return jnp.log(0.0 * size if self.infinite else size), {}


def evaluate(settings, infinite=True):
    """The total, its gradients with respect to parameters and logits, the terms, and what DOT makes of the terms."""
    inputs = make_inputs(dtype=np.float32)
    losses = {"cross_entropy": 1.0, "own": {"loss": Infinite, "infinite": infinite, **settings}}
    objective = Objective.create(losses, num_classes=NUM_CLASSES)
    params, memory = objective.init(jax.random.key(0), inputs)

    def total(params, logits):
        value, terms, _ = objective(
            params, memory, inputs._replace(student=inputs.student._replace(logits=logits)), jnp.int32(EPOCH)
        )
        return value, (terms, objective.split(terms, jnp.int32(EPOCH)))

    (value, rest), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, inputs.student.logits)
    return value, gradients, *rest


@pytest.mark.parametrize("settings", OFF, ids=str)
def test_a_loss_that_is_off_does_not_count(settings):
    value, (of_params, of_logits), terms, split = evaluate(settings)
    assert np.isneginf(terms["own"])
    np.testing.assert_array_equal(value, terms["cross_entropy"])
    np.testing.assert_array_equal(split, (terms["cross_entropy"], 0))
    np.testing.assert_array_equal(of_params["own"]["scale"], 0)
    expected = evaluate({"weight": 0.0}, infinite=False)[1][1]
    assert expected.any()
    np.testing.assert_array_equal(of_logits, expected)


@pytest.mark.parametrize("settings", ON, ids=str)
def test_a_loss_that_is_on_counts(settings):
    assert np.isneginf(evaluate(settings)[0])
    weight = 0.5 if "warmup_epochs" in settings else 1.0
    value, gradients, terms, _ = evaluate(settings, infinite=False)
    np.testing.assert_allclose(value, terms["cross_entropy"] + weight * terms["own"], rtol=1e-6)
    np.testing.assert_allclose(gradients[0]["own"]["scale"], 2 * weight, rtol=1e-6)
    plain = evaluate({"weight": weight}, infinite=False)[1]
    jax.tree.map(np.testing.assert_array_equal, gradients, plain)
