"""The methods that a recipe's config string may name, as their `losses`, with the weights of the published recipes."""

from ml_collections import ConfigDict


def category_structure(variant, *, intra=True, inter=True):
    """Objective of Chen et al. 2020, or with one of its two parts only (their table 4)."""
    structure = {"weight": 1.0, "variant": variant}
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
    return {
        "cross_entropy": {"weight": cross_entropy},
        "mse_logits": {"weight": mse},
        "category_structure": structure,
    }


def with_cross_entropy(name, weight):
    """Cross-entropy with weight 1 and one more method, as the field's comparison tables have it."""
    return {"cross_entropy": {"weight": 1.0}, name: {"weight": weight}}


METHODS = {
    "cskd": lambda: category_structure("reference"),
    "cskd_paper": lambda: category_structure("paper"),
    "intra": lambda: category_structure("reference", inter=False),
    "inter": lambda: category_structure("reference", intra=False),
    "kd": lambda: {"cross_entropy": {"weight": 0.1}, "kd": {"weight": 0.9, "temperature": 4.0}},
    "ce": lambda: {"cross_entropy": {"weight": 1.0}},
    "cckd": lambda: with_cross_entropy("cckd", 100.0),
    "crd": lambda: with_cross_entropy("crd", 0.8),
    "dist": lambda: with_cross_entropy("dist", 1.0),
    "irg": lambda: with_cross_entropy("irg", 1.0),
    "kdgan": lambda: with_cross_entropy("kdgan", 1.0),
}


def losses(method):
    """`config.losses` of a method; ValueError names the methods there are."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r} after the ':' of --config; known: {', '.join(METHODS)}")
    return ConfigDict(METHODS[method]())
