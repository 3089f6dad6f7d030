"""The newer losses of logits against values, terms and gradients of their authors' code, in 64 bits.

Which function a case belongs to is read from the beginning of its name, shapes and hyper-parameters from the file: more
cases of the same kinds are tested without a change here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cskd_jax.losses import (
    LOSSES,
    LossInputs,
    View,
    abkd_loss,
    abkd_tokens_loss,
    cka_cost,
    class_correlation_loss,
    classifier_cost,
    cross_entropy_loss,
    curriculum_factor,
    dkd_loss,
    kd_loss,
    luminet_loss,
    mlkd_loss,
    nkd_loss,
    perception,
    rld_loss,
    sample_correlation_loss,
    sinkhorn_distance,
    standardize_logits,
    standardized_kd_loss,
    ttm_loss,
    uncertain,
    weighted_target_loss,
    wkd_logits_loss,
    wttm_loss,
)
from cskd_jax.training.objective import Weight
from cskd_jax.training.optimizers import ConstantSchedule, SeparateGradients, dot, sgd
from tests.newer_cases import FAMILIES, check_case, longest_prefix, names_of, read_cases

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")


def pair(inputs):
    return inputs["student"], inputs["teacher"]


def without_label(array, labels):
    """The columns of [B, C] other than that of the label, [B, C - 1]."""
    columns = jnp.arange(array.shape[1] - 1, dtype=jnp.int32)
    return jnp.take_along_axis(array, columns + (columns >= labels[:, None]).astype(jnp.int32), axis=1)


def warmed_up(hyper):
    """The weight that grows over the first epochs; the released code counts them from 1."""
    return Weight(1.0, warmup_epochs=int(hyper["warmup"])).at(jnp.int32(hyper["epoch"] - 1))


def nkd(hyper, inputs):
    # The released code takes the likeliest class of a soft label.
    labels = inputs["labels"] if "labels" in inputs else jnp.argmax(inputs["soft_labels"], axis=1)
    return nkd_loss(*pair(inputs), labels, gamma=hyper["gamma"], temperature=hyper["temp"])[0], {}


def ttm(hyper, inputs):
    return ttm_loss(*pair(inputs), exponent=hyper["l"]), {}


def wttm(hyper, inputs):
    return wttm_loss(*pair(inputs), exponent=hyper["l"]), {}


def wttm_train(hyper, inputs):
    cross_entropy = cross_entropy_loss(inputs["student"], inputs["labels"])
    value, _ = wttm(hyper, inputs)
    terms = {"term/ce": cross_entropy, "term/wttm": value}
    return hyper["cls_weight"] * cross_entropy + hyper["wttm_weight"] * value, terms


def rld(hyper, inputs):
    logits = map(standardize_logits, pair(inputs)) if hyper["logit_stand"] else pair(inputs)
    settings = {name: hyper[name] for name in ("alpha", "beta", "temperature", "alpha_temperature")}
    value, terms = rld_loss(*logits, inputs["labels"], **settings)
    return value, {"term/scd": terms["confidence"], "term/mcd": terms["correlation"]}


def with_cross_entropy(loss, weight=None):
    """A case of a training loop: cross-entropy and the loss, warmed up."""

    def adapter(hyper, inputs):
        cross_entropy = hyper["ce_weight"] * cross_entropy_loss(inputs["student"], inputs["labels"])
        value, _ = loss(hyper, inputs)
        value = (warmed_up(hyper) if weight is None else hyper[weight]) * value
        return cross_entropy + value, {"term/loss_ce": cross_entropy, "term/loss_kd": value}

    return adapter


def mlkd(hyper, inputs):
    views = tuple((inputs[f"student_{view}"], inputs[f"teacher_{view}"]) for view in ("weak", "strong"))
    assert hyper["other_temperatures"] == [2, 3, 5, 6]
    settings = {"temperature": hyper["base_temperature"], "standardize": hyper["logit_stand"]}
    value, parts = mlkd_loss(*zip(*views, strict=True), **settings)
    inputs = LossInputs(Logits(views[0][0]), None, inputs["labels"], views=(View(Logits(views[1][0]), None),))
    cross_entropy = LOSSES["cross_entropy"](num_classes=views[0][0].shape[1], all_views=True)(inputs)[0]
    cross_entropy, weight = hyper["ce_weight"] * cross_entropy, hyper["kd_weight"]
    terms = {"loss_ce": cross_entropy}
    of_code = {"kd": "loss_kd", "classes": "loss_cc", "samples": "loss_bc"}
    terms |= {name: weight * parts[part] for part, name in of_code.items()}
    for view, (student, teacher) in zip(("weak", "strong"), views, strict=True):
        z = tuple(map(standardize_logits, (student, teacher))) if hyper["logit_stand"] else (student, teacher)
        for T in {hyper["base_temperature"], *hyper["other_temperatures"]}:
            terms[f"kd_{view}_T{T:g}"] = kd_loss(*z, temperature=T)
            terms[f"cc_{view}_T{T:g}"] = class_correlation_loss(student, teacher, temperature=T)
            terms[f"bc_{view}_T{T:g}"] = sample_correlation_loss(student, teacher, temperature=T)
    terms["sample_mask"], terms["class_mask"] = uncertain(views[0][1])
    return cross_entropy + weight * value, {f"term/{name}": term for name, term in terms.items()}


class Logits:
    """Outputs of a network that has nothing but logits."""

    def __init__(self, logits):
        self.logits = logits


jax.tree_util.register_pytree_node(Logits, lambda x: ((x.logits,), None), lambda _, children: Logits(*children))


def ls_kd(hyper, inputs):
    student, teacher = map(standardize_logits, pair(inputs))
    terms = {"term/student_normalized": student, "term/teacher_normalized": teacher}
    return standardized_kd_loss(*pair(inputs), temperature=hyper["temperature"]), terms


def ls_dkd(hyper, inputs):
    settings = {name: hyper[name] for name in ("alpha", "beta", "temperature")}
    value, terms = dkd_loss(*map(standardize_logits, pair(inputs)), inputs["labels"], **settings)
    return value, {"term/tckd": terms["target"], "term/nckd": terms["non_target"]}


def luminet(hyper, inputs):
    student, teacher = map(perception, pair(inputs))
    terms = {"term/student_perception": student, "term/teacher_perception": teacher}
    return luminet_loss(*pair(inputs), alpha=hyper["alpha"], temperature=hyper["temperature"]), terms


def abkd(hyper, inputs):
    settings = {name: hyper[name] for name in ("alpha", "beta", "temperature")}
    value, terms = abkd_loss(*pair(inputs), **settings, released_limits=True)
    return value, {f"term/{name}": term for name, term in terms.items()}


def abkd_ttm(hyper, inputs):
    # A power of the teacher's distribution is the softmax of its multiplied logits.
    settings = {"alpha": hyper["alpha"], "beta": hyper["beta"], "temperature": 1.0}
    return abkd_loss(inputs["student"], hyper["l"] * inputs["teacher"], **settings)[0], {}


def abkd_ls(hyper, inputs):
    settings = {name: hyper[name] for name in ("alpha", "beta", "temperature")}
    method = LOSSES["abkd"](num_classes=inputs["student"].shape[1], standardize=True, **settings)
    return method(LossInputs(*map(Logits, pair(inputs)), inputs.get("labels")))[0], {}


def abkd_dkd(hyper, inputs):
    labels, temperature = inputs["labels"], hyper["temperature"]
    target = dkd_loss(*pair(inputs), labels, temperature=temperature)[1]["target"]
    among = (without_label(logits, labels) for logits in pair(inputs))
    settings = {"alpha": hyper["ab_alpha"], "beta": hyper["ab_beta"], "temperature": temperature}
    non_target = temperature**2 * abkd_loss(*among, **settings)[0]
    return warmed_up(hyper) * (hyper["alpha"] * target + hyper["beta"] * non_target), {}


def abkd_tokens(hyper, inputs):
    return abkd_tokens_loss(*pair(inputs), inputs["labels"], alpha=hyper["alpha"], beta=hyper["beta"]), {}


def sinkhorn_settings(hyper):
    return {"regularization": hyper["sinkhorn_lambda"], "iterations": hyper["sinkhorn_iter"]}


def wasserstein(hyper, inputs):
    settings = sinkhorn_settings(hyper) | {"temperature": hyper["temperature"]}
    return wkd_logits_loss(*pair(inputs), inputs["labels"], inputs["cost"], **settings)


def wkd_l(hyper, inputs):
    target = weighted_target_loss(*pair(inputs), inputs["labels"])
    distance = wasserstein(hyper, inputs)
    probabilities = (jax.nn.softmax(logits / hyper["temperature"]) for logits in pair(inputs))
    of_all = jnp.mean(sinkhorn_distance(*probabilities, inputs["cost"], **sinkhorn_settings(hyper)))
    terms = {"target": target, "wasserstein": distance, "wasserstein_all_classes": of_all}
    return target + hyper["gamma"] * distance, {f"term/{name}": term for name, term in terms.items()}


ADAPTERS = {
    "nkd": nkd,
    "ttm": ttm,
    "wttm": wttm,
    "wttm_train": wttm_train,
    "rld": rld,
    "rld_train": with_cross_entropy(rld),
    "mlkd": mlkd,
    "ls_kd": ls_kd,
    "ls_kd_train": with_cross_entropy(ls_kd, "kd_weight"),
    "ls_dkd": ls_dkd,
    "ls_dkd_train": with_cross_entropy(ls_dkd),
    "ls_mlkd": mlkd,
    "luminet": luminet,
    "luminet_train": with_cross_entropy(luminet),
    "abkd": abkd,
    "abkd_ttm": abkd_ttm,
    "abkd_ls": abkd_ls,
    "abkd_dkd": abkd_dkd,
    "abkd_tokens": abkd_tokens,
    "wkd_l": wkd_l,
}
SIMPLE = ("nkd", "ttm", "wttm", "rld", "mlkd", "ls_kd", "ls_dkd", "ls_mlkd", "luminet", "abkd", "wkd_l")


def test_every_newer_case_has_a_family():
    unknown = [name for name in read_cases() if longest_prefix(name, FAMILIES) is None]
    assert not unknown, f"no method is known for the golden cases {unknown}"


@pytest.mark.slow
@pytest.mark.parametrize("name", names_of(*SIMPLE))
def test_newer_case(name):
    case = read_cases()[name]
    adapter = ADAPTERS[longest_prefix(name, ADAPTERS)]
    check_case(case, lambda inputs, _: adapter(case.hyper, inputs))


def ctkd_factor(hyper, epoch):
    settings = {"loops": hyper["decay_loops"], "maximum": hyper["decay_max"], "minimum": hyper["decay_min"]}
    return curriculum_factor(jnp.asarray(epoch, jnp.int32), **settings)


def ctkd_method(case, **settings):
    """The method of a case."""
    hyper = case.hyper
    settings |= {"variant": "dkd" if case.name.startswith(("ctkd_dkd", "ls_ctkd_dkd")) else "kd"}
    settings |= {name: hyper[name] for name in ("alpha", "beta") if name in hyper}
    return LOSSES["ctkd"](
        num_classes=case.inputs["student"].shape[1],
        start=hyper["t_start"],
        span=hyper["t_end"],
        loops=hyper["decay_loops"],
        maximum=hyper["decay_max"],
        minimum=hyper["decay_min"],
        standardize=case.name.startswith("ls_"),
        **settings,
    )


def ctkd_value(case, inputs, raw, epoch):
    """The value of a case; epochs of cases count from 1."""
    inputs = LossInputs(*map(Logits, pair(inputs)), inputs["labels"], epoch=jnp.asarray(epoch - 1, jnp.int32))
    return ctkd_method(case).apply({"params": {"temperature": raw}}, inputs)


@pytest.mark.parametrize("name", [n for n in names_of("ctkd", "ls_ctkd") if "steps" not in n and "schedule" not in n])
def test_newer_case_of_a_curriculum(name):
    case = read_cases()[name]

    def loss(inputs, params):
        value, terms = ctkd_value(case, inputs, params["global_T"][0], case.hyper["epoch"])
        factor = ctkd_factor(case.hyper, case.hyper["epoch"])
        return value, {"term/temperature": terms["temperature"], "term/decay_value": factor}

    check_case(case, loss)


@pytest.mark.parametrize("name", [name for name in names_of("ctkd", "ls_ctkd") if "schedule" in name])
def test_newer_schedule_of_a_curriculum(name):
    case = read_cases()[name]
    settings = {"loops": case.hyper["decay_loops"]}
    settings |= {ours: case.hyper[f"decay_{ours[:3]}"] for ours in ("maximum", "minimum")}
    for schedule in ("cosine", "linear"):
        actual = curriculum_factor(jnp.asarray(case.inputs["epoch"]), schedule=schedule, **settings)
        case.assert_close(f"term/{schedule}", actual)


@pytest.mark.parametrize("name", [name for name in names_of("ctkd", "ls_ctkd") if "steps" in name])
def test_newer_training_of_a_curriculum(name):
    case = read_cases()[name]
    hyper, inputs = case.hyper, jax.tree.map(jnp.asarray, case.inputs)
    optimizer = sgd(ConstantSchedule(hyper["lr"]), momentum=hyper["momentum"], weight_decay=hyper["weight_decay"])

    @jax.jit
    def step(params, state, epoch):
        def loss(params):
            student = {"student": params["student"]}
            value, terms = ctkd_value(case, inputs | student, params["global_T"], epoch)
            cross_entropy = cross_entropy_loss(params["student"], inputs["labels"])
            return hyper["cls_weight"] * cross_entropy + hyper["kd_weight"] * value, terms["temperature"]

        (value, temperature), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value, temperature, gradients

    params = {"student": inputs["student"], "global_T": jnp.asarray(hyper["global_T_init"], jnp.float64)}
    state, found = optimizer.init(params), {key: [] for key in case.part("steps")}
    for epoch in inputs["epoch"]:
        params, state, value, temperature, gradients = step(params, state, epoch)
        row = {"loss": value, "temperature": temperature, "decay_value": ctkd_factor(hyper, epoch), **params}
        row |= {f"grad_{key}": gradient for key, gradient in gradients.items()}
        for key, values in found.items():
            values.append(row[key])
    for key, values in found.items():
        case.assert_close(f"steps/{key}", np.stack(values))


@pytest.mark.parametrize("name", names_of("wkd_cost"))
def test_newer_costs(name):
    case = read_cases()[name]
    features, kernel = jnp.asarray(case.inputs["class_features"]), jnp.asarray(case.inputs["teacher_fc_weight"]).T
    sharpen = case.hyper["sharpen"]
    case.assert_close("term/cka_distance", cka_cost(features, sharpen=0))
    case.assert_close("term/cka_sharpened", cka_cost(features, sharpen=sharpen))
    case.assert_close("term/fc_cosine_sharpened", classifier_cost(kernel, sharpen=sharpen))


@pytest.mark.parametrize("name", names_of("dot"))
def test_newer_steps_of_dot(name):
    """`dot_mixed` has parameters that only one of the two gradients reaches."""
    case = read_cases()[name]
    hyper, steps = case.hyper, case.part("steps")
    settings = {name: hyper[name] for name in ("momentum", "delta", "weight_decay")}
    optimizer = dot(ConstantSchedule(hyper["lr"]), **settings)
    start = case.part("params")

    def gradients(kind, step):
        found = {name: steps.get(f"grad_{kind}/{name}") for name in start}
        return {n: jnp.zeros(start[n].shape) if g is None else jnp.asarray(g[step]) for n, g in found.items()}

    params = jax.tree.map(jnp.asarray, start)
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for step in range(len(steps["loss_kd"])):
        updates, state = update(SeparateGradients(gradients("task", step), gradients("kd", step)), state, params)
        params = optax.apply_updates(params, updates)
        task, kd = state.buffers
        rows = {"param": params, "momentum_task": task, "momentum_kd": kd}
        found.append({f"{kind}/{name}": value for kind, row in rows.items() for name, value in row.items()})
    for key in steps:
        if key.split("/")[0] in ("param", "momentum_task", "momentum_kd"):
            case.assert_close(f"steps/{key}", np.stack([row[key] for row in found]))
