"""Distillation losses: pure array functions, and the methods that configurations name.

The functions take arrays and stand alone. `LOSSES` is the table of the methods: linen modules that apply a function to
the outputs of student and teacher, whose fields are the hyper-parameters that `config.losses.NAME` may set.
"""

from cskd_jax.losses.base import LossInputs, Method
from cskd_jax.losses.category import (
    CategoryIndex,
    CategoryStructure,
    category_centers,
    category_index,
    category_structure_loss,
    inter_category_structure,
    intra_category_structure,
)
from cskd_jax.losses.cckd import CorrelationCongruence, correlation_congruence_loss
from cskd_jax.losses.crd import CRD, ContrastMemory, contrastive_loss
from cskd_jax.losses.dist import DIST, dist_loss
from cskd_jax.losses.irg import IRG, irg_loss
from cskd_jax.losses.kdgan import KDGAN, kdgan_loss
from cskd_jax.losses.logits import KD, CrossEntropy, MSELogits, cross_entropy_loss, kd_loss, mse_logits_loss

__all__ = [
    "LOSSES",
    "CategoryIndex",
    "ContrastMemory",
    "LossInputs",
    "Method",
    "category_centers",
    "category_index",
    "category_structure_loss",
    "contrastive_loss",
    "correlation_congruence_loss",
    "cross_entropy_loss",
    "dist_loss",
    "inter_category_structure",
    "intra_category_structure",
    "irg_loss",
    "kd_loss",
    "kdgan_loss",
    "mse_logits_loss",
]

LOSSES: dict[str, type[Method]] = {
    "category_structure": CategoryStructure,
    "cckd": CorrelationCongruence,
    "crd": CRD,
    "cross_entropy": CrossEntropy,
    "dist": DIST,
    "irg": IRG,
    "kd": KD,
    "kdgan": KDGAN,
    "mse_logits": MSELogits,
}
