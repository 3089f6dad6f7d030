"""Pure metrics of classification."""

import jax
import jax.numpy as jnp
import optax


def classification_sums(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over a batch from which accuracies and the mean loss of a split are made.

    Args:
      logits: float [B, C].
      labels: int [B].
      mask: bool [B]; padding is False and counts nowhere.

    Returns:
      `count`, `top1`, `top5` (int32; a sample counts for top-k if fewer than k categories score higher than its own,
      equal scores in the order of the categories), and `loss`, the summed cross-entropy.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1], dtype=labels.dtype) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=1)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # A comparison with NaN is False: without this a diverged network would seem right about every image.
    rank = jnp.where(jnp.isfinite(loss), rank, jnp.iinfo(rank.dtype).max)
    return {
        "count": jnp.sum(mask, dtype=jnp.int32),
        "top1": jnp.sum(mask & (rank < 1), dtype=jnp.int32),
        "top5": jnp.sum(mask & (rank < 5), dtype=jnp.int32),
        "loss": jnp.sum(jnp.where(mask, loss, 0)),
    }
