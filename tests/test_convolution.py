"""Convolution of the networks: its gradients are those of XLA, and only CPUs compute them in another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cskd_jax.convolution import convolve

# (images, side, channels, features, kernel, stride, padding): blocks of several images, of one, and of a number that
# does not divide the batch; maps of more positions than a block; a stem; kernels that are not square.
CASES = [
    (4, 8, 3, 5, (3, 3), 1, (1, 1)),
    (6, 15, 4, 2, (3, 3), 2, (1, 1)),
    (7, 12, 2, 3, (3, 3), 1, (1, 1)),
    (1, 40, 2, 3, (3, 3), 1, (1, 1)),
    (2, 21, 3, 4, (7, 7), 2, (3, 3)),
    (3, 9, 2, 2, (1, 7), 1, (0, 3)),
    (2, 8, 4, 3, (1, 1), 2, (1, 1)),
    (2, 8, 4, 6, (3, 3), 1, (0, 0)),
]


def by_xla(x, kernel, stride, padding, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    pads = [(side, side) for side in padding]
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=layout, feature_group_count=groups
    )


def inputs(images, side, channels, features, size, dtype):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((images, side, side, channels)).astype(dtype)
    return jnp.asarray(x), jnp.asarray(generator.standard_normal((*size, channels, features)).astype(dtype))


def gradients(function, *arrays):
    """Of a loss whose derivative depends on the output."""
    return jax.jit(jax.grad(lambda *arrays: jnp.sum(jnp.sin(function(*arrays).astype(np.float32))), (0, 1)))(*arrays)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients(case):
    images, side, channels, features, size, stride, padding = case
    arrays = inputs(images, side, channels, features, size, np.float32)
    np.testing.assert_array_equal(convolve(*arrays, stride, padding), by_xla(*arrays, stride, padding))
    found = gradients(lambda x, kernel: convolve(x, kernel, stride, padding), *arrays)
    expected = gradients(lambda x, kernel: by_xla(x, kernel, stride, padding), *arrays)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_gradients_of_gradients():
    arrays = inputs(2, 6, 2, 3, (3, 3), np.float32)

    def penalty(convolution):
        def size(x, kernel):
            (of_kernel,) = jax.grad(lambda k: jnp.sum(convolution(x, k, 1, (1, 1)) ** 3), (0,))(kernel)
            return jnp.sum(of_kernel**2)

        return jax.grad(size, (0, 1))(*arrays)

    for ours, theirs in zip(penalty(convolve), penalty(by_xla), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


def test_sums_of_half_precision_are_rounded_once():
    arrays = inputs(64, 16, 2, 3, (3, 3), jnp.bfloat16)
    _, found = gradients(lambda x, kernel: convolve(x, kernel, 1, 1), *arrays)
    exact = (array.astype(np.float32) for array in arrays)
    _, expected = gradients(lambda x, kernel: by_xla(x, kernel, 1, (1, 1)).astype(jnp.bfloat16), *exact)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-7, atol=0.02 * np.abs(expected).max())


def test_other_devices_use_their_convolution():
    arrays = inputs(2, 8, 4, 3, (3, 3), np.float32)
    function = jax.jit(jax.grad(lambda x, kernel: jnp.sum(convolve(x, kernel, 1, 1) ** 2), (0, 1)))
    products = {
        platform: function.trace(*arrays).lower(lowering_platforms=(platform,)).as_text().count("dot_general")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert products == {"cpu": 9, "cuda": 0, "tpu": 0}


def test_groups():
    x, _ = inputs(2, 6, 4, 1, (3, 3), np.float32)
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3, 2, 6)), np.float32)
    found = gradients(lambda x, kernel: convolve(x, kernel, 1, 1, groups=2), x, kernel)
    expected = gradients(lambda x, kernel: by_xla(x, kernel, 1, (1, 1), groups=2), x, kernel)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
