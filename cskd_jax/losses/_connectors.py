"""Layers that methods train along with the student, to map its features to the teacher's channels.

Most are used only in training: they normalize by the statistics of the batch and keep no running averages.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.scipy.linalg import solve_triangular

from cskd_jax.convolution import convolve
from cskd_jax.losses._arrays import pool_to_common_size
from cskd_jax.losses._batch import batch_statistics, count_batch

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the distribution from which torch.nn.Linear and torch.nn.Conv2d draw weights.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Pointwise(nn.Module):
    """A linear map of the last axis (a 1x1 convolution where the input is a map), in at least float32.

    Attributes:
      features: Number of output channels.
      use_bias: Whether to add a bias, which starts at 0.
      kernel_init: Initializer of the kernel.
    """

    features: int
    use_bias: bool = False
    kernel_init: Callable = torch_uniform

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., D] to [..., features]."""
        dtype = np.promote_types(x.dtype, np.float32)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), dtype)
        x = x.astype(dtype) @ kernel
        if self.use_bias:
            x += self.param("bias", nn.initializers.zeros, (self.features,), dtype)
        return x


class Convolution(nn.Module):
    """A convolution with stride 1 that keeps the size of the map, in at least float32.

    Attributes:
      features: Number of output channels.
      kernel_size: Side of the square kernel, an odd number.
      kernel_init: Initializer of the kernel.
      use_bias: Whether to add a bias, which starts at 0.
    """

    features: int
    kernel_size: int
    kernel_init: Callable = torch_uniform
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, D] to [B, H, W, features]."""
        dtype = np.promote_types(x.dtype, np.float32)
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, dtype)
        x = convolve(x.astype(dtype), kernel, 1, self.kernel_size // 2)
        if self.use_bias:
            x += self.param("bias", nn.initializers.zeros, (self.features,), dtype)
        return x


class Normalization(nn.Module):
    """Batch normalization by the statistics of the global batch.

    Attributes:
      axis_name: Name of the mapped axis over which the batch is split, or None.
      epsilon: Number added to the variance.
      running: Whether the collection "memory" holds running averages of mean and variance, by which a call without
        `train` normalizes. As in PyTorch, their momentum is 0.1 and the averaged variance is the unbiased one.
    """

    axis_name: str | None = None
    epsilon: float = 1e-5
    running: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        """Normalizes x [B, H, W, D]."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), x.dtype)
        if not train:
            mean, variance = (self.get_variable("memory", name) for name in ("mean", "variance"))
        else:
            mean, variance = batch_statistics(x, self.axis_name)
            if self.running:
                self._remember(mean, variance, count_batch(x, self.axis_name) * x.shape[1] * x.shape[2])
        return (x - mean) * (scale * lax.rsqrt(variance + self.epsilon)) + bias

    def _remember(self, mean, variance, count):
        """Moves the running averages toward the statistics of a global batch with `count` positions."""
        averages = self.variable("memory", "mean", jnp.zeros_like, mean)
        variances = self.variable("memory", "variance", jnp.ones_like, variance)
        if not self.is_initializing():
            averages.value = 0.9 * averages.value + 0.1 * lax.stop_gradient(mean)
            unbiased = lax.stop_gradient(variance) * (count / max(count - 1, 1))
            variances.value = 0.9 * variances.value + 0.1 * unbiased


class Connector(nn.Module):
    """A `Convolution`, followed by a `Normalization`.

    Attributes:
      features: Number of output channels.
      kernel_size: Side of the square kernel.
      axis_name: Name of the mapped axis over which the batch is split, or None.
      kernel_init: Initializer of the kernel.
      running: Whether running averages are kept (see `Normalization`).
    """

    features: int
    kernel_size: int = 1
    axis_name: str | None = None
    kernel_init: Callable = torch_uniform
    running: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        """Maps x [B, H, W, D] to [B, H, W, features]."""
        x = Convolution(self.features, self.kernel_size, self.kernel_init, name="convolution")(x)
        return Normalization(self.axis_name, running=self.running, name="normalization")(x, train=train)


class Projector(nn.Module):
    """A 1x1 `Connector` to fewer channels, then a 3x3 and a 1x1 `Connector`, each followed by a ReLU.

    Attributes:
      hidden: Number of channels between the connectors.
      features: Number of output channels.
      axis_name: Name of the mapped axis over which the batch is split, or None.
      running: Whether running averages are kept (see `Normalization`).
    """

    hidden: int
    features: int
    axis_name: str | None = None
    running: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        """Maps x [B, H, W, D] to [B, H, W, features]."""
        for layer, (width, size) in enumerate(((self.hidden, 1), (self.hidden, 3), (self.features, 1)), start=1):
            connector = Connector(width, size, self.axis_name, running=self.running, name=f"layer{layer}")
            x = nn.relu(connector(x, train=train))
        return x


class Regressor(nn.Module):
    """A convolution with bias to the size and the channels of another map, followed by a `Normalization`.

    The convolution is the one in the reference code of CRD (Tian et al. 2020,
    https://github.com/HobbitLong/RepDistiller): 3x3 with stride 2 to halve the size, transposed 4x4 with stride 2 to
    double it, and otherwise unpadded with the kernel size that gives the desired output size, which is 1x1 where the
    sizes are equal.

    Attributes:
      features: Number of output channels.
      size: Height and width of the output: half or twice the input's, or at most the input's.
      axis_name: Name of the mapped axis over which the batch is split, or None.
    """

    features: int
    size: tuple[int, int]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, D] to [B, *size, features]."""
        dtype = np.promote_types(x.dtype, np.float32)
        x, given = x.astype(dtype), x.shape[1:3]
        kernel_size, stride, padding = (given[0] - self.size[0] + 1, given[1] - self.size[1] + 1), 1, 0
        if given == _twice(self.size):
            kernel_size, stride, padding = (3, 3), 2, 1
        elif self.size == _twice(given):
            # A transposed convolution is a convolution of the map with zeros in between.
            kernel_size, padding = (4, 4), 2
            x = lax.pad(x, np.zeros((), dtype), ((0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 0)))
        kernel = self.param("kernel", torch_uniform, (*kernel_size, x.shape[-1], self.features), dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
        x = convolve(x, kernel, stride, padding)
        return Normalization(self.axis_name, name="normalization")(x + bias)


class Orthogonal(nn.Module):
    """A linear map of the last axis by an orthogonal matrix, which keeps lengths and angles, in at least float32.

    The matrix has orthonormal columns, or rows where the output is wider than the input. It is a product of reflections
    (see `orthogonal_matrix`), so it stays orthogonal whatever an optimizer does to its parameters. Its initial value is
    uniformly distributed over all such matrices.

    Attributes:
      features: Number of output channels.
    """

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., D] to [..., features]."""
        dtype = np.promote_types(x.dtype, np.float32)
        shape = max(x.shape[-1], self.features), min(x.shape[-1], self.features)
        matrix = orthogonal_matrix(self.param("reflections", _uniform_reflections, shape, dtype))
        kernel = matrix if x.shape[-1] == shape[0] else matrix.T
        return jnp.dot(x.astype(dtype), kernel, precision=lax.Precision.HIGHEST)


def orthogonal_matrix(reflections: jax.Array) -> jax.Array:
    """Returns a matrix with orthonormal columns, minus the first k columns of a product of k Householder reflections.

    Reflection i is I - 2 v v^T / |v|^2, where v is zero above position i, 1 at position i, and equal to column i of the
    argument below it; nothing else of the argument is read. The product is I - V T V^T, where T^-1 is the strictly
    upper part of V^T V plus half its diagonal. The result is orthogonal for every argument. Time is O(n k^2).

    Args:
      reflections: Real numbers [n, k], with n >= k.

    Returns:
      An array [n, k]; the first k columns of the identity where the argument is zero.
    """
    identity = jnp.eye(*reflections.shape, dtype=reflections.dtype)
    vectors = jnp.tril(reflections, -1) + identity
    products = _dot(vectors.T, vectors)
    inverse = jnp.triu(products, 1) + jnp.diag(jnp.diagonal(products) / 2)
    size = reflections.shape[1]
    matrix = _dot(vectors, solve_triangular(inverse, vectors[:size].T)) - identity
    # In float32 the columns are then orthonormal to 6e-6; one step of Newton's method reduces that to 6e-7. The error
    # of Q^T Q treats the diagonal of Q separately, so that small numbers are not added to numbers of size 1.
    diagonal = jnp.diagonal(matrix)
    rest = matrix - identity * diagonal
    mixed = diagonal[:, None] * rest[:size]
    error = jnp.diag((diagonal - 1) * (diagonal + 1)) + mixed + mixed.T + _dot(rest.T, rest)
    return matrix - 0.5 * _dot(matrix, error)


def _uniform_reflections(key, shape, dtype):
    """Draws the reflections that map random vectors to the axes; their product is uniformly distributed."""
    x = jnp.tril(jax.random.normal(key, shape, dtype))
    diagonal, norms = jnp.diagonal(x), jnp.linalg.norm(x, axis=0)
    return jnp.tril(x / (diagonal + jnp.copysign(norms, diagonal)), -1)


def _dot(a, b):
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def pool_to_reachable_size(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both maps [B, H, W, D], pooled to a common size if no `Regressor` maps one size to the other."""
    given, wanted = student.shape[1:3], teacher.shape[1:3]
    if wanted == _twice(given) or (given[0] >= wanted[0] and given[1] >= wanted[1]):
        return student, teacher
    return pool_to_common_size(student, teacher)


def _twice(size):
    return 2 * size[0], 2 * size[1]
