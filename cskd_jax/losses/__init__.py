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
from cskd_jax.losses.logits import KD, CrossEntropy, MSELogits, cross_entropy_loss, kd_loss, mse_logits_loss

__all__ = [
    "LOSSES",
    "CategoryIndex",
    "LossInputs",
    "Method",
    "category_centers",
    "category_index",
    "category_structure_loss",
    "cross_entropy_loss",
    "inter_category_structure",
    "intra_category_structure",
    "kd_loss",
    "mse_logits_loss",
]

LOSSES: dict[str, type[Method]] = {
    "category_structure": CategoryStructure,
    "cross_entropy": CrossEntropy,
    "kd": KD,
    "mse_logits": MSELogits,
}
