"""The smooth L1 loss against its formula written out."""

import numpy as np

from cskd_jax.losses.smooth_l1 import smooth_l1_loss


def test_value():
    student, teacher = np.float32([[0.0, 0.5], [3.0, 0.0]]), np.zeros((2, 2), np.float32)
    np.testing.assert_allclose(smooth_l1_loss(student, teacher), (0 + 0.125 + 2.5 + 0) / 4)
