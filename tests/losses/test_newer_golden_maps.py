"""The golden values of the newer losses of maps and embeddings: values, terms, gradients and batch statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cskd_jax.losses import (
    LOSSES,
    LossInputs,
    cross_entropy_loss,
    dense_dist_loss,
    dist_loss,
    vkd_loss,
    weighted_target_loss,
    wkd_logits_loss,
)
from cskd_jax.losses._arrays import mean_over_positions
from cskd_jax.losses._batch import batch_statistics
from cskd_jax.losses._connectors import orthogonal_matrix
from cskd_jax.models import ModelOutput
from cskd_jax.training.objective import Weight
from tests import newer_cases

pytestmark = pytest.mark.usefixtures("x64", "quick_compilation")


def stages(inputs, network):
    """Returns the maps NETWORK1, NETWORK2, ... in their order."""
    names = [name for name in inputs if name.removeprefix(network).isdigit()]
    return [inputs[name] for name in sorted(names, key=lambda name: int(name.removeprefix(network)))]


def convolution(params, name):
    """Returns the parameters of a convolution, from PyTorch's OIHW."""
    found = {"kernel": params[f"{name}.weight"].transpose(2, 3, 1, 0)}
    return found | ({"bias": params[f"{name}.bias"]} if f"{name}.bias" in params else {})


def linear(params, name):
    """Returns the parameters of a linear layer, or of a 1x1 convolution, from PyTorch's layout."""
    weight = params[f"{name}.weight"]
    found = {"kernel": weight.reshape(weight.shape[:2]).T}
    return found | ({"bias": params[f"{name}.bias"]} if f"{name}.bias" in params else {})


def normalization(params, name):
    return {"scale": params[f"{name}.weight"], "bias": params[f"{name}.bias"]}


def running_statistics(x, name):
    """Returns what PyTorch's running averages of a normalization are after one batch x [..., D].

    The methods keep none, because nothing reads them: batch normalization beside a student is used in training only.
    """
    rows = x.reshape(-1, x.shape[-1])
    mean, variance = batch_statistics(rows, None)
    unbiased = variance * (len(rows) / (len(rows) - 1))
    return {f"{name}.running_mean": 0.1 * mean, f"{name}.running_var": 0.9 + 0.1 * unbiased}


def states(statistics):
    return {f"state_after/{name}": value for name, value in statistics.items()}


def outputs(stages=(), embedding=None, logits=None):
    return ModelOutput(logits, tuple(stages), embedding)


# semckd.


def semckd(case):
    hyper = case.hyper
    method = LOSSES["semckd"](
        num_classes=3, batch_size=hyper["feat_dim"], temperature=hyper["soft"], factor=hyper["factor"]
    )

    def loss(inputs, params):
        students, teachers = stages(inputs, "student"), stages(inputs, "teacher")
        layers, of_torch = {}, {"query": "query_", "key": "key_"}
        for kind, number in (("query", len(students)), ("key", len(teachers))):
            for stage in range(number):
                for layer in (1, 2):
                    layers[f"{kind}{stage + 1}_layer{layer}"] = linear(params, f"{of_torch[kind]}{stage}.linear{layer}")
        for i in range(len(students)):
            for j in range(len(teachers)):
                ours, theirs = f"value{i + 1}_{j + 1}", f"regressor{i}{j}.regressor"
                for layer in (1, 2):
                    first = 3 * (layer - 1)
                    layers[f"{ours}_layer{layer}"] = {
                        "convolution": convolution(params, f"{theirs}.{first}"),
                        "normalization": normalization(params, f"{theirs}.{first + 1}"),
                    }
                layers[f"{ours}_layer3"] = linear(params, f"{theirs}.6")
        loss_inputs = LossInputs(outputs(students), outputs(teachers), None)
        value_and_terms, seen = method.apply(
            {"params": {"cross_layers": layers}}, loss_inputs, capture_intermediates=True
        )
        seen = seen["intermediates"]["cross_layers"]
        attention, errors = seen["__call__"][0]
        statistics = {}
        for i in range(len(students)):
            for j in range(len(teachers)):
                for layer in (1, 2):
                    inner = seen[f"value{i + 1}_{j + 1}_layer{layer}"]["convolution"]["__call__"][0]
                    name = f"regressor{i}{j}.regressor.{3 * layer - 2}"
                    statistics |= running_statistics(inner, name)
        return value_and_terms[0], {"term/attention": attention, "term/pair_mse": errors, **states(statistics)}

    return loss


@pytest.mark.slow
@pytest.mark.parametrize("name", newer_cases.names_of("semckd"))
def test_newer_semckd(name):
    case = newer_cases.read_cases()[name]
    newer_cases.check_case(case, semckd(case))


# wkd_f.


def wkd_feature(case, params, student, teacher):
    """Returns the loss of the maps, its terms, and the running statistics of PyTorch."""
    names = sorted({name.split(".")[0] for name in params if name.startswith("conv")})
    settings = {name: case.hyper[name] for name in ("hidden", "grid", "mean_cov_ratio") if name in case.hyper}
    method = LOSSES["wkd_f"](
        num_classes=3,
        projector=case.hyper.get("projector", "conv1x1"),
        epsilon=case.hyper["eps"],
        **settings,
    )
    layers = {f"convolution{i}": convolution(params, name) for i, name in enumerate(names, start=1)}
    layers["normalization"] = normalization(params, "bn")
    inputs = LossInputs(outputs([student]), outputs([teacher]), None)
    (value, terms), seen = method.apply({"params": layers}, inputs, capture_intermediates=True)
    last = seen["intermediates"][f"convolution{len(names)}"]["__call__"][0]
    return value, terms, states(running_statistics(last, "bn"))


@pytest.mark.slow
@pytest.mark.parametrize("name", newer_cases.names_of("wkd_f"))
def test_newer_wkd_f(name):
    case = newer_cases.read_cases()[name]

    def loss(inputs, params):
        value, terms, statistics = wkd_feature(case, params, inputs["student"], inputs["teacher"])
        return value, {f"term/{term}": x for term, x in terms.items()} | statistics

    newer_cases.check_case(case, loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", newer_cases.names_of("wkd_train"))
def test_newer_wkd_train(name):
    """The whole sum: cross-entropy, the losses of logits, and that of maps, whose weights fall from an epoch on."""
    case = newer_cases.read_cases()[name]
    hyper = case.hyper
    end = {"end_epoch": hyper["epochs"], "decay_epoch": hyper["cosine_decay_epoch"]}
    weights = {
        part: Weight(hyper[f"{part}_weight"], **end).at(jnp.int32(hyper["epoch"] - 1)) for part in ("logit", "feat")
    }
    settings = {
        "temperature": hyper["temperature"],
        "regularization": hyper["sinkhorn_lambda"],
        "iterations": hyper["sinkhorn_iter"],
    }

    def loss(inputs, params):
        logits, labels = (inputs["student"], inputs["teacher"]), inputs["labels"]
        cross_entropy = hyper["ce_weight"] * cross_entropy_loss(logits[0], labels)
        transport = wkd_logits_loss(*logits, labels, inputs["cost"], **settings)
        maps, _, statistics = wkd_feature(case, params, inputs["student_map"], inputs["teacher_map"])
        distillation = weighted_target_loss(*logits, labels) + weights["logit"] * transport + weights["feat"] * maps
        terms = {"loss_ce": cross_entropy, "loss_kd": distillation}
        terms |= {f"{part}_weight": weight for part, weight in weights.items()}
        return cross_entropy + distillation, {f"term/{term}": x for term, x in terms.items()} | statistics

    newer_cases.check_case(case, loss)


# itrd.


@pytest.mark.parametrize("name", newer_cases.names_of("itrd"))
def test_newer_itrd(name):
    case = newer_cases.read_cases()[name]
    hyper = case.hyper
    method = LOSSES["itrd"](
        num_classes=3,
        alpha=hyper["alpha"],
        correlation_weight=hyper["lambda_corr"],
        mutual_weight=hyper["lambda_mutual"],
    )

    def loss(inputs, params):
        variables = {"params": {"embed": linear(params, "embed.linear")}}
        student, teacher = (outputs(embedding=inputs[name]) for name in ("student", "teacher"))
        value, terms = method.apply(variables, LossInputs(student, teacher, None))
        return value, {f"term/{name}": term for name, term in terms.items()}

    newer_cases.check_case(case, loss)


# vkd.


def effective_matrix(params):
    """Returns PyTorch's matrix [teacher, student], differentiable as itself and as a product of reflections."""
    weight, original = params["projector.weight"], params["projector.parametrizations.weight.original"]
    base = params["projector.parametrizations.weight.0.base"]
    if original.shape[0] < original.shape[1]:
        original = original.T
    columns = orthogonal_matrix(original) * -jnp.sign(jnp.diagonal(original))
    product = base @ columns
    product = product if product.shape == weight.shape else product.T
    return weight + product - lax.stop_gradient(product), product


@pytest.mark.parametrize("name", newer_cases.names_of("vkd"))
def test_newer_vkd(name):
    case = newer_cases.read_cases()[name]
    hyper = case.hyper

    def loss(inputs, params):
        matrix, _ = effective_matrix(params)
        projected = mean_over_positions(inputs["student_tokens"]) @ matrix.T
        representation = hyper["alpha"] * vkd_loss(projected, mean_over_positions(inputs["teacher"]))
        student, teacher = (outputs(logits=inputs[name]) for name in ("student_distill_logits", "teacher_logits"))
        kd = LOSSES["kd"](num_classes=3, temperature=hyper["T"])
        kl = hyper["gamma"] * kd.apply({}, LossInputs(student, teacher, None))[0]
        ce = cross_entropy_loss(inputs["student_logits"], inputs["labels"])
        return ce + kl + representation, {"term/ce": ce, "term/kl": kl, "term/representation": representation}

    newer_cases.check_case(case, loss)


@pytest.mark.parametrize("name", newer_cases.names_of("vkd"))
def test_newer_vkd_matrix_is_a_product_of_reflections(name):
    params = newer_cases.read_cases()[name].part("params")
    _, product = effective_matrix(jax.tree.map(jnp.asarray, params))
    np.testing.assert_allclose(product, params["projector.weight"], rtol=0, atol=1e-12)


# srd.


@pytest.mark.parametrize("name", newer_cases.names_of("srd"))
def test_newer_srd(name):
    case = newer_cases.read_cases()[name]
    hyper = case.hyper
    with_logits = "rep_weight" in hyper
    method = LOSSES["srd"](
        num_classes=3,
        variant="difference" if with_logits else "correlation",
        power=hyper["power"],
        representation_weight=hyper.get("rep_weight", 1.0),
        kd_weight=float(with_logits),
        temperature=hyper.get("T", 1.0),
    )

    def loss(inputs, params):
        student, teacher = (mean_over_positions(inputs[name]) for name in ("student", "teacher"))
        zeros = jnp.zeros((len(student), 3))
        logits = [inputs.get(f"{network}_logits", zeros) for network in ("student", "teacher")]
        projector = linear(params, "embed")
        value, terms = method.apply(
            {"params": {"projector": projector}},
            LossInputs(outputs((), student, logits[0]), outputs((), teacher, logits[1]), None),
        )
        mapped = student @ projector["kernel"] + projector["bias"]
        statistics = running_statistics(mapped, "bn_s") | running_statistics(teacher, "bn_t")
        found = {"term/representation": terms["representation"], "term/logit": terms.get("kd", 0.0)}
        return value, found | states(statistics)

    newer_cases.check_case(case, loss)


# dist.


@pytest.mark.parametrize("name", newer_cases.names_of("dist"))
def test_newer_dist(name):
    case = newer_cases.read_cases()[name]
    weights = {weight: case.hyper[weight] for weight in ("beta", "gamma")}

    def loss(inputs, params):
        del params
        if inputs["student"].ndim == 4:
            return dense_dist_loss(inputs["student"], inputs["teacher"], **weights)[0], {}
        tau = case.hyper["tau"]
        value, terms = dist_loss(inputs["student"], inputs["teacher"], temperature=tau, **weights)
        return value, {f"term/{name}": tau**2 * term for name, term in terms.items()}

    newer_cases.check_case(case, loss)
