"""The methods that may follow the name of a recipe, as losses with the weights of the published recipes.

An entry of `losses` gives its weight and the settings that differ from the defaults of its loss. docs/methods.md
explains the methods, and docs/configuration.md the settings of every loss. "The released code" is the code of Chen et
al. 2020, https://github.com/xeanzheng/CSKD.
"""

from ml_collections import ConfigDict

from cskd_jax.configs import networks


def category_structure(variant, *, intra=True, inter=True):
    """Returns the losses of Chen et al. 2020, or of only one of its two parts (table 4 of the paper)."""
    structure = {"weight": 1.0}
    if variant == "paper":
        cross_entropy, mse = 0.1, 0.9  # alpha and 1 - alpha, Eq. 10
        structure |= {"variant": "paper", "intra_weight": 0.01, "inter_weight": 0.2}  # beta and gamma, Eq. 9
    else:
        cross_entropy, mse = 0.9, 1e-6  # The released code has 0.1 times 1e-5.
        structure |= {"intra_weight": 0.002, "inter_weight": 0.04, "compactness_weight": 0.1}
        structure["filter_misclassified"] = True
    if not intra:
        structure |= {key: 0.0 for key in ("intra_weight", "compactness_weight") if key in structure}
    if not inter:
        structure["inter_weight"] = 0.0
    return {"cross_entropy": {"weight": cross_entropy}, "mse_logits": {"weight": mse}, "category_structure": structure}


def with_cross_entropy(name, weight, **settings):
    """Returns cross-entropy with weight 1 and one more loss, as in published comparisons."""
    return {"cross_entropy": {"weight": 1.0}, name: {"weight": weight, **settings}}


def table(warmup_epochs):
    """Returns {method: its losses} for data with exactly one class per image."""
    warmup = {"warmup_epochs": warmup_epochs}
    return {
        "cskd": category_structure("reference"),
        "cskd_paper": category_structure("paper"),
        "intra": category_structure("reference", inter=False),
        "inter": category_structure("reference", intra=False),
        "ce": {"cross_entropy": {"weight": 1.0}},
        "kd": {"cross_entropy": {"weight": 0.1}, "kd": {"weight": 0.9}},
        "lskd": {"cross_entropy": {"weight": 0.1}, "lskd": {"weight": 9.0}},
        "fitnet": with_cross_entropy("fitnet", 100.0),
        "at": with_cross_entropy("at", 1000.0),
        "nst": with_cross_entropy("nst", 50.0),
        "fsp": with_cross_entropy("fsp", 1.0),
        "ab": with_cross_entropy("ab", 1.0),
        "cckd": with_cross_entropy("cckd", 100.0),
        "cc": with_cross_entropy("cc", 0.02),
        "rkd": with_cross_entropy("rkd", 1.0),
        "irg": with_cross_entropy("irg", 1.0),
        "itrd": with_cross_entropy("itrd", 1.0),
        "semckd": with_cross_entropy("semckd", 400.0) | {"kd": {"weight": 1.0}},  # As in the authors' script.
        "sp": with_cross_entropy("sp", 3000.0),
        "pkt": with_cross_entropy("pkt", 30000.0),
        "srd": with_cross_entropy("srd", 1.0),
        "vid": with_cross_entropy("vid", 1.0),
        "vkd": with_cross_entropy("vkd", 1.0),
        "wkd_f": with_cross_entropy("wkd_f", 1.0),
        "ft": with_cross_entropy("ft", 200.0),
        "cosine": {"cosine": {"weight": 1.0}},
        "smooth_l1": {"smooth_l1": {"weight": 1.0}},
        "crd": with_cross_entropy("crd", 0.8),
        "dkd": with_cross_entropy("dkd", 1.0, **warmup),
        "dml": with_cross_entropy("dml", 1.0),
        "reviewkd": with_cross_entropy("reviewkd", 1.0, **warmup),
        "deit": {"cross_entropy": {"weight": 0.5, "first_head": True}, "deit": {"weight": 0.5}},
        "dist": with_cross_entropy("dist", 2.0),
        "nkd": with_cross_entropy("nkd", 1.0),
        "ttm": with_cross_entropy("ttm", 45.0),
        "wttm": with_cross_entropy("wttm", 4.0),
        "rld": with_cross_entropy("rld", 1.0, **warmup),
        "mlkd": {"cross_entropy": {"weight": 0.1, "all_views": True}, "mlkd": {"weight": 0.9}},
        "ctkd": {"cross_entropy": {"weight": 0.1}, "ctkd": {"weight": 0.9}},
        # Standardized logits, with the weight 9 and the temperature 2 that the authors recommend (Sun et al. 2024).
        "ctkd_ls": {"cross_entropy": {"weight": 0.1}, "ctkd": {"weight": 9.0, "standardize": True}},
        "dkd_ls": with_cross_entropy("dkd", 9.0, standardize=True, temperature=2.0, **warmup),
        "mlkd_ls": {
            "cross_entropy": {"weight": 0.1, "all_views": True},
            "mlkd": {"weight": 9.0, "standardize": True, "temperature": 2.0},
        },
        "luminet": {"cross_entropy": {"weight": 2.0}, "luminet": {"weight": 1.0, **warmup}},
        "abkd": with_cross_entropy("abkd", 32.0, alpha=0.8, beta=0.3),
        "wkd_l": with_cross_entropy("wkd_l", 30.0) | {"weighted_target": {"weight": 1.0}},
        "kdgan": with_cross_entropy("kdgan", 1.0),
        "ofa": with_cross_entropy("ofa", 1.0),
        "ofd": with_cross_entropy("ofd", 0.001),
        "sdd_dkd": with_cross_entropy("sdd_dkd", 1.0, **warmup),
        "sdd_kd": {"cross_entropy": {"weight": 0.1}, "sdd_kd": {"weight": 0.9}},
        "sdd_nkd": with_cross_entropy("sdd_nkd", 1.0, **warmup),
        "simkd": {"simkd": {"weight": 1.0}},
        "srrl": with_cross_entropy("srrl", 1.0) | {"kd": {"weight": 1.0}},
    }


def multilabel_table():
    """Returns {method: its losses} for data with any number of classes per image."""
    supervised = {"binary_cross_entropy": {"weight": 1.0}}
    # Binary cross-entropy is a mean over ten classes, not a sum: 0.1 brings the other losses to its scale.
    distilled = supervised | {"binary_kd": {"weight": 0.1}}
    paper = {"weight": 0.1, "intra_weight": 0.01, "inter_weight": 0.2}
    reference = {"weight": 0.1, "variant": "reference", "intra_weight": 0.002, "inter_weight": 0.04}
    return {
        "mlcskd": distilled | {"multilabel_category_structure": paper},
        "mlcskd_reference": distilled | {"multilabel_category_structure": reference},
        "bkd": distilled,
        "bce": supervised,
    }


METHODS, MULTILABEL_METHODS = tuple(table(1)), tuple(multilabel_table())

# Methods for students that are Vision Transformers with a distillation token.
TOKEN_METHODS = ("deit",)
# Losses that supervise with the labels: they occur only once in a combination, with weight 1.
SUPERVISION = ("cross_entropy", "binary_cross_entropy")
# Methods with a first phase of their own, and its learning rate in the reference code of Tian et al. 2020; None means
# the optimizer's learning rate. The first two methods are off after that phase.
FIRST_PHASES = {"ab": None, "fsp": None, "ft": 0.01}
# Weights of combinations published with weights different from their methods': {methods: {loss: weight}}.
COMBINATIONS = {
    frozenset({"crd", "kd"}): {"cross_entropy": 1.0, "kd": 1.0, "crd": 0.8},  # Tian et al. 2020, reference code
}


def first_phase(method, epochs=30):
    """Returns the first phase of a method, for `config.first_phase`; it has no epochs for most methods.

    Args:
      method: Name of the method, as in `losses`.
      epochs: Length of the first phase of the methods that have one.
    """
    rates = [FIRST_PHASES[part] for part in method.split("+") if part in FIRST_PHASES]
    return ConfigDict({"epochs": epochs, "learning_rate": rates[0]} if rates else {"epochs": 0})


def losses(method, *, warmup_epochs=20, multilabel=False, changes=None):
    """Returns the losses of a method, for `config.losses`.

    Args:
      method: One of METHODS or MULTILABEL_METHODS, or several joined by +, such as "at+kd".
      warmup_epochs: Epochs over which the weights of dkd, dkd_ls, luminet, reviewkd, rld, sdd_dkd and sdd_nkd grow.
      multilabel: Whether the images of the recipe may have any number of classes instead of exactly one.
      changes: {method: {loss: {setting: value}}}, the settings in which a recipe differs from the table of methods.

    Returns:
      A ConfigDict with the settings of each loss.

    Raises:
      UnknownWordError: If there is no such method.
      ValueError: If the methods of a sum cannot be combined.
    """
    known = multilabel_table() if multilabel else table(warmup_epochs)
    parts = method.split("+")
    for part in parts:
        if part in MULTILABEL_METHODS and not multilabel:
            raise ValueError(f"{part} is a method for images with any number of classes, as in digit_pairs:{part}")
        if part not in known:
            raise networks.UnknownWordError("method", part, known, "; + joins several, as in kd+at")
        for name, settings in (changes or {}).get(part, {}).items():
            known[part][name] |= settings
    if len(parts) == 1:
        return ConfigDict(known[method])
    try:
        return ConfigDict(combine({part: known[part] for part in parts}, len(parts)))
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None


def combine(parts, count):
    """Returns the combined losses of several methods: each with its own weight, and supervision once with weight 1.

    Args:
      parts: {method: its losses}.
      count: Number of methods that were named; greater than the size of `parts` if one was named twice.
    """
    if len(parts) < count:
        raise ValueError("a method is named twice")
    phases = [part for part in parts if part in FIRST_PHASES]
    if len(phases) > 1:
        raise ValueError(f"{' and '.join(phases)} each need their own first phase")
    losses = {}
    for part, terms in parts.items():
        for name, settings in terms.items():
            if name in losses and name not in SUPERVISION:
                raise ValueError(f"the loss {name} is used by {part} and by another method")
            losses[name] = {**losses.get(name, {}), **settings} | ({"weight": 1.0} if name in SUPERVISION else {})
    for name, weight in COMBINATIONS.get(frozenset(parts), {}).items():
        losses[name]["weight"] = weight
    return losses
