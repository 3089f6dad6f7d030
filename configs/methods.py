"""The methods that a recipe's config string may name, as their `losses`, with the weights of the published recipes.

Every entry of `losses` has `weight`, and, so that methods can follow each other, `start_epoch` (the first epoch with
it, counted from 0), `end_epoch` (the first without it) and `warmup_epochs` (the weight grows linearly over so many).
The other keys are the method's own; docs/methods.md explains them.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def category_structure(variant, *, intra=True, inter=True):
    """Objective of Chen et al. 2020, or with one of its two parts only (their table 4)."""
    # center_momentum: of centers that remember earlier batches; None: the centers of the batch alone
    structure = {"weight": 1.0, "variant": variant, "center_momentum": placeholder(float)}
    if variant == "paper":
        cross_entropy, mse = 0.1, 0.9  # alpha and 1 - alpha, Eq. 10
        structure |= {"intra_weight": 0.01, "inter_weight": 0.2}  # beta and gamma, Eq. 9
    else:
        cross_entropy, mse = 0.9, 1e-6  # released code: 0.1 times its 1e-5
        structure |= {"intra_weight": 0.002, "inter_weight": 0.04, "compactness_weight": 0.1}
        structure["filter_misclassified"] = True  # centers of the features from what a network classifies correctly
    if not intra:
        structure |= {key: 0.0 for key in ("intra_weight", "compactness_weight") if key in structure}
    if not inter:
        structure["inter_weight"] = 0.0
    return {"cross_entropy": {"weight": cross_entropy}, "mse_logits": {"weight": mse}, "category_structure": structure}


def with_cross_entropy(name, weight, start_epoch=0, **settings):
    """Cross-entropy with weight 1, from `start_epoch` on, and one more method, as in the field's comparison tables."""
    return {"cross_entropy": {"weight": 1.0, "start_epoch": start_epoch}, name: {"weight": weight, **settings}}


def table(init_epochs, warmup_epochs):
    """{method: its losses}."""
    init = {"start_epoch": init_epochs}  # cross-entropy waits until a first phase of the method alone is over
    kdgan = {
        "student_share": 0.5, "student_distillation": 1.0, "teacher_distillation": 0.1, "temperature": 4.0,
        "sample_temperature": 1.0, "hidden_size": 128,
    }  # fmt: skip
    crd = {"embedding_size": 128, "num_negatives": 16384, "temperature": 0.07, "momentum": 0.5}
    irg = {"lower_stage": 2, "upper_stage": 3, "vertex_weight": 0.1, "edge_weight": 5.0, "transformation_weight": 5.0}
    return {
        "cskd": category_structure("reference"),
        "cskd_paper": category_structure("paper"),
        "intra": category_structure("reference", inter=False),
        "inter": category_structure("reference", intra=False),
        "ce": {"cross_entropy": {"weight": 1.0}},
        "kd": {"cross_entropy": {"weight": 0.1}, "kd": {"weight": 0.9, "temperature": 4.0}},
        "lskd": {"cross_entropy": {"weight": 0.1}, "lskd": {"weight": 9.0, "temperature": 2.0}},
        "fitnet": with_cross_entropy("fitnet", 100.0, **init, stage=2),
        "at": with_cross_entropy("at", 1000.0),
        "nst": with_cross_entropy("nst", 50.0),
        "fsp": with_cross_entropy("fsp", 1.0, **init, end_epoch=init_epochs),
        "ab": with_cross_entropy("ab", 1.0, **init, end_epoch=init_epochs, margin=1.0),
        "cckd": with_cross_entropy("cckd", 100.0, gamma=0.4, order=2),
        "cc": with_cross_entropy("cc", 0.02, embedding_size=128),
        "rkd": with_cross_entropy("rkd", 1.0, distance_weight=25.0, angle_weight=50.0),
        "irg": with_cross_entropy("irg", 1.0, **irg),
        "sp": with_cross_entropy("sp", 3000.0),
        "pkt": with_cross_entropy("pkt", 30000.0, epsilon=1e-7),
        "vid": with_cross_entropy("vid", 1.0, initial_variance=5.0),
        "ft": with_cross_entropy("ft", 200.0, rate=0.5, pool_channels=placeholder(bool), reconstruction_weight=0.005),
        "crd": with_cross_entropy("crd", 0.8, **crd),
        "dkd": with_cross_entropy("dkd", 1.0, warmup_epochs=warmup_epochs, alpha=1.0, beta=8.0, temperature=4.0),
        "reviewkd": with_cross_entropy(
            "reviewkd", 1.0, warmup_epochs=warmup_epochs, mid_channels=placeholder(int), with_embedding=True
        ),
        "dist": with_cross_entropy("dist", 1.0, beta=1.0, gamma=1.0, temperature=4.0),
        "kdgan": with_cross_entropy("kdgan", 1.0, **kdgan),
    }


def multilabel_table():
    """{method: its losses} for data whose images have any number of categories."""
    supervised = {"binary_cross_entropy": {"weight": 1.0}}
    # Binary cross-entropy is a mean over categories, a tenth of their sum: 0.1 brings the other methods to its scale.
    distilled = supervised | {"binary_kd": {"weight": 0.1, "temperature": 4.0}}
    paper = {"weight": 0.1, "variant": "paper", "intra_weight": 0.01, "inter_weight": 0.2}
    reference = {"weight": 0.1, "variant": "reference", "intra_weight": 0.002, "inter_weight": 0.04}
    return {
        "mlcskd": distilled | {"multilabel_category_structure": paper},
        "mlcskd_reference": distilled | {"multilabel_category_structure": reference},
        "bkd": distilled,
        "bce": supervised,
    }


METHODS, MULTILABEL_METHODS = tuple(table(1, 1)), tuple(multilabel_table())


def losses(method, *, init_epochs=30, warmup_epochs=20, multilabel=False):
    """`config.losses` of a method.

    Args:
      method: of METHODS, or of MULTILABEL_METHODS; ValueError names them.
      init_epochs: length of the first phase of the methods that have one (fitnet, fsp, ab).
      warmup_epochs: over which the weights of dkd and reviewkd grow.
      multilabel: whether the images of the recipe have any number of categories instead of one.
    """
    known = multilabel_table() if multilabel else table(init_epochs, warmup_epochs)
    if method not in known:
        raise ValueError(f"unknown method {method!r} after the ':' of --config; known: {', '.join(known)}")
    entries = known[method]
    # A placeholder for each: a shared one would be set for all at once.
    always = [{"start_epoch": 0, "end_epoch": placeholder(int), "warmup_epochs": 0} for _ in entries]
    return ConfigDict({name: keys | entries[name] for name, keys in zip(entries, always, strict=True)})
