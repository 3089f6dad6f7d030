"""Deep mutual learning: networks that start from different weights teach each other while they learn."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from cskd_jax.losses.base import Count, LossInputs, Method, Positive
from cskd_jax.losses.logits import kd_loss, supervise


def dml_loss(logits: tuple[jax.Array, ...], *, temperature: float = 1.0) -> jax.Array:
    """Computes the sum over networks i of the mean over the others j of T^2 KL(softmax(z_j / T) || softmax(z_i / T)).

    The target of each term is not differentiated, so each network is trained only by its own K - 1 terms. Time and
    memory are O(K^2 B C).

    Args:
      logits: Logits of K >= 2 networks for the same images, float [B, C] each.
      temperature: Temperature T, greater than 0; the authors use 1.

    Returns:
      A scalar of at least float32: the mean over the batch.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If there are fewer than two networks, if shapes differ, or if the temperature is not positive.

    References:
      Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018, Eq. 8 and 9, https://arxiv.org/abs/1706.00384.
      There the networks are updated one after the other; here, all in one step.
    """
    if len(logits) < 2:
        raise ValueError(f"dml_loss needs the logits of at least two networks, got {len(logits)}")
    pairs = [(own, other) for i, own in enumerate(logits) for j, other in enumerate(logits) if i != j]
    terms = [kd_loss(own, other, temperature=temperature) for own, other in pairs]
    return jnp.sum(jnp.stack(terms)) / (len(logits) - 1)


class MutualLearning(Method):
    """Applies `dml_loss` to the student and its peers, which also learn from the labels by cross-entropy.

    Peers are networks like the student that start from different weights; they exist only in training. The value is
    `dml_loss` plus the sum of the cross-entropies of the peers. The student's own cross-entropy is the loss
    `cross_entropy`, which has its own weight.

    Attributes:
      peers: Number of peers.
      temperature: Temperature of the softmax, greater than 0.
    """

    peers: Count = 1
    temperature: Positive = 1.0
    needs_teacher: ClassVar[bool] = False
    multilabel: ClassVar[bool | None] = False
    mixes: ClassVar[bool] = True

    @property
    def num_peers(self) -> int:
        return self.peers

    def __call__(self, inputs: LossInputs):
        members = inputs.student.members
        if len(members) < 2:
            raise ValueError(
                "dml needs a student with peers, which a trainer makes; there are none outside of training"
            )
        mutual = dml_loss(tuple(member.logits for member in members), temperature=self.temperature)
        labels = jnp.sum(jnp.stack([supervise(member.logits, inputs) for member in members[1:]]))
        return mutual + labels, {"mutual": mutual, "peers": labels}
