"""The functions that losses are built of compute half-precision arrays in float32, as the losses do."""

import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import (
    ContrastMemory,
    attention_map,
    category_centers,
    category_index,
    contrastive_loss,
    fsp_matrix,
    inter_category_structure,
    intra_category_structure,
    sinkhorn_distance,
)

LABELS = np.array([0, 1, 1, 2, 2, 2], np.int32)


def _centers(features):
    return category_centers(features, category_index(LABELS, num_classes=3))[0]


def _deviations(features):
    index = category_index(LABELS, num_classes=3)
    return intra_category_structure(features, *category_centers(features, index), index.slots)


def _contrast(embeddings):
    memory = ContrastMemory(embeddings, embeddings[::-1], LABELS, jnp.full(2, -jnp.inf, embeddings.dtype))
    indices, negatives = np.arange(6, dtype=np.int32), np.arange(24, dtype=np.int32).reshape(6, 4) % 6
    value, terms, log_normalizers = contrastive_loss(embeddings, embeddings, memory, LABELS, indices, negatives)
    return jnp.stack([value, *terms.values(), *log_normalizers])


def _transport(x):
    probabilities = x / 1024  # exactly half-precision numbers, not distributions
    return sinkhorn_distance(probabilities, probabilities[::-1], 1 - jnp.eye(5, dtype=x.dtype))


# The squares of 300 overflow float16, and those of 1e-4 vanish in it.
CASES = {
    "attention_map": (lambda x: attention_map(x[:, None, :, None]), 300),
    "category_centers": (_centers, 3e4),
    "contrastive_loss": (_contrast, 0.1),
    "fsp_matrix": (lambda x: fsp_matrix(x[:, None, :, None], x[:, None, :, None]), 300),
    "inter_category_structure": (inter_category_structure, 1e-4),
    "intra_category_structure": (_deviations, 3e4),
    "sinkhorn_distance": (lambda x: _transport(jnp.abs(x)), 300),
}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_in_float32(name, dtype):
    function, scale = CASES[name]
    half = jnp.asarray(scale * np.random.default_rng(0).normal(size=(6, 5)).clip(-2, 2), dtype)
    found, expected = function(half), function(half.astype(jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
