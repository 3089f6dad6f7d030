"""Distillation losses: pure functions of arrays, and the methods that configurations name.

The functions take arrays and can be used on their own. `LOSSES` is the table of the methods: linen modules that apply a
function to the outputs of student and teacher. Their fields are the hyperparameters that `config.losses.NAME` may set.
"""

from cskd_jax.losses._arrays import half_cosine
from cskd_jax.losses._batch import batch_positions, gather_batch, sum_batch
from cskd_jax.losses._logits import standardize_logits
from cskd_jax.losses.abkd import ABKD, abkd_loss, abkd_tokens_loss
from cskd_jax.losses.activation_boundary import ActivationBoundary, activation_boundary_loss
from cskd_jax.losses.attention import AttentionTransfer, attention_map, attention_transfer_loss
from cskd_jax.losses.base import Head, LossInputs, Method, Mixed, Norm, View
from cskd_jax.losses.binary import BinaryCrossEntropy, BinaryKD, binary_cross_entropy_loss, binary_kd_loss
from cskd_jax.losses.category import (
    CategoryIndex,
    CategoryStructure,
    RunningCenters,
    category_centers,
    category_index,
    category_structure_loss,
    inter_category_structure,
    intra_category_structure,
    running_category_structure_loss,
)
from cskd_jax.losses.cckd import CorrelationCongruence, correlation_congruence_loss
from cskd_jax.losses.correlation import CorrelationDelta, correlation_delta_loss
from cskd_jax.losses.crd import CRD, ContrastMemory, contrastive_loss
from cskd_jax.losses.ctkd import CTKD, curriculum_factor, curriculum_temperature
from cskd_jax.losses.deit import DistillationToken, hard_distillation_loss
from cskd_jax.losses.dist import DIST, dense_dist_loss, dist_loss
from cskd_jax.losses.dkd import DKD, dkd_loss
from cskd_jax.losses.dml import MutualLearning, dml_loss
from cskd_jax.losses.embedding import CosineEmbedding, SmoothL1Embedding, cosine_embedding_loss, smooth_l1_loss
from cskd_jax.losses.factor import FactorTransfer, factor_transfer_loss
from cskd_jax.losses.fitnet import FitNet, hint_loss
from cskd_jax.losses.fsp import FSP, fsp_loss, fsp_matrix
from cskd_jax.losses.irg import IRG, irg_loss
from cskd_jax.losses.itrd import ITRD, itrd_correlation_loss, itrd_mutual_loss
from cskd_jax.losses.kdgan import KDGAN, kdgan_loss
from cskd_jax.losses.logits import KD, CrossEntropy, MSELogits, cross_entropy_loss, kd_loss, mse_logits_loss
from cskd_jax.losses.luminet import LumiNet, luminet_loss, perception
from cskd_jax.losses.mlkd import MLKD, class_correlation_loss, mlkd_loss, sample_correlation_loss, uncertain
from cskd_jax.losses.multilabel import MultilabelCategoryStructure, multilabel_category_structure_loss
from cskd_jax.losses.nkd import NKD, WeightedTarget, nkd_loss, weighted_target_loss
from cskd_jax.losses.nst import NeuronSelectivityTransfer, nst_loss
from cskd_jax.losses.ofa import OFA, ofa_loss
from cskd_jax.losses.ofd import OFD, ofd_loss, ofd_margin
from cskd_jax.losses.pkt import PKT, pkt_loss
from cskd_jax.losses.review import ReviewKD, hierarchical_context_loss
from cskd_jax.losses.rkd import RKD, rkd_loss
from cskd_jax.losses.rld import RLD, rld_loss
from cskd_jax.losses.sdd import SDDDKD, SDDKD, SDDNKD, region_logits, region_weights, sdd_loss
from cskd_jax.losses.semckd import SemCKD, semckd_attention, semckd_loss
from cskd_jax.losses.similarity import SimilarityPreserving, similarity_preserving_loss
from cskd_jax.losses.simkd import SimKD
from cskd_jax.losses.srd import SRD, srd_correlation_loss, srd_difference_loss
from cskd_jax.losses.srrl import SRRL, srrl_loss
from cskd_jax.losses.standardization import StandardizedKD, standardized_kd_loss
from cskd_jax.losses.ttm import TTM, WTTM, ttm_loss, wttm_loss
from cskd_jax.losses.vid import VID, vid_loss
from cskd_jax.losses.vkd import VkD, vkd_loss
from cskd_jax.losses.wkd_f import WKDFeature, wkd_feature_loss
from cskd_jax.losses.wkd_logits import (
    WKDLogits,
    cka_cost,
    classifier_cost,
    sinkhorn_distance,
    wkd_logits_loss,
)

__all__ = [
    "LOSSES",
    "CategoryIndex",
    "ContrastMemory",
    "Head",
    "LossInputs",
    "Method",
    "Mixed",
    "Norm",
    "RunningCenters",
    "View",
    "abkd_loss",
    "abkd_tokens_loss",
    "activation_boundary_loss",
    "attention_map",
    "attention_transfer_loss",
    "batch_positions",
    "binary_cross_entropy_loss",
    "binary_kd_loss",
    "category_centers",
    "category_index",
    "category_structure_loss",
    "cka_cost",
    "class_correlation_loss",
    "classifier_cost",
    "contrastive_loss",
    "correlation_congruence_loss",
    "correlation_delta_loss",
    "cosine_embedding_loss",
    "cross_entropy_loss",
    "curriculum_factor",
    "curriculum_temperature",
    "dense_dist_loss",
    "dist_loss",
    "dkd_loss",
    "dml_loss",
    "factor_transfer_loss",
    "fsp_loss",
    "fsp_matrix",
    "gather_batch",
    "half_cosine",
    "hard_distillation_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "inter_category_structure",
    "intra_category_structure",
    "irg_loss",
    "itrd_correlation_loss",
    "itrd_mutual_loss",
    "kd_loss",
    "kdgan_loss",
    "luminet_loss",
    "mlkd_loss",
    "mse_logits_loss",
    "multilabel_category_structure_loss",
    "nkd_loss",
    "nst_loss",
    "ofa_loss",
    "ofd_loss",
    "ofd_margin",
    "perception",
    "pkt_loss",
    "region_logits",
    "region_weights",
    "rkd_loss",
    "rld_loss",
    "running_category_structure_loss",
    "sample_correlation_loss",
    "sdd_loss",
    "semckd_attention",
    "semckd_loss",
    "similarity_preserving_loss",
    "sinkhorn_distance",
    "smooth_l1_loss",
    "srd_correlation_loss",
    "srd_difference_loss",
    "srrl_loss",
    "standardize_logits",
    "standardized_kd_loss",
    "sum_batch",
    "ttm_loss",
    "uncertain",
    "vid_loss",
    "vkd_loss",
    "weighted_target_loss",
    "wkd_feature_loss",
    "wkd_logits_loss",
    "wttm_loss",
]

LOSSES: dict[str, type[Method]] = {
    "ab": ActivationBoundary,
    "abkd": ABKD,
    "at": AttentionTransfer,
    "binary_cross_entropy": BinaryCrossEntropy,
    "binary_kd": BinaryKD,
    "category_structure": CategoryStructure,
    "cckd": CorrelationCongruence,
    "cosine": CosineEmbedding,
    "crd": CRD,
    "cross_entropy": CrossEntropy,
    "ctkd": CTKD,
    "deit": DistillationToken,
    "dist": DIST,
    "irg": IRG,
    "itrd": ITRD,
    "cc": CorrelationDelta,
    "dkd": DKD,
    "dml": MutualLearning,
    "fitnet": FitNet,
    "fsp": FSP,
    "ft": FactorTransfer,
    "kd": KD,
    "kdgan": KDGAN,
    "lskd": StandardizedKD,
    "luminet": LumiNet,
    "mlkd": MLKD,
    "mse_logits": MSELogits,
    "multilabel_category_structure": MultilabelCategoryStructure,
    "nkd": NKD,
    "nst": NeuronSelectivityTransfer,
    "ofa": OFA,
    "ofd": OFD,
    "pkt": PKT,
    "reviewkd": ReviewKD,
    "rkd": RKD,
    "rld": RLD,
    "sdd_dkd": SDDDKD,
    "sdd_kd": SDDKD,
    "sdd_nkd": SDDNKD,
    "semckd": SemCKD,
    "simkd": SimKD,
    "smooth_l1": SmoothL1Embedding,
    "sp": SimilarityPreserving,
    "srd": SRD,
    "srrl": SRRL,
    "ttm": TTM,
    "vid": VID,
    "vkd": VkD,
    "weighted_target": WeightedTarget,
    "wkd_f": WKDFeature,
    "wkd_l": WKDLogits,
    "wttm": WTTM,
}
