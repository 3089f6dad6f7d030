"""Newer losses that use a classifier, exits or normalizations, against what their authors' code computes in 64 bits."""

import re

import jax.numpy as jnp
import pytest
from flax import linen as nn

from cskd_jax.losses import (
    LOSSES,
    Head,
    LossInputs,
    Norm,
    cross_entropy_loss,
    ofa_loss,
    ofd_margin,
    region_logits,
    region_weights,
)
from cskd_jax.losses._arrays import pool_to_common_size
from cskd_jax.losses._connectors import Connector, Projector
from cskd_jax.losses.ofa import Exit
from cskd_jax.models import ModelOutput
from tests.newer_cases import check_case, longest_prefix, names_of, read_cases


def linear(params, name):
    """The kernel and the bias of one of torch's linear layers, or of a 1x1 convolution."""
    weight = params[f"{name}.weight"]
    return {"kernel": weight.reshape(weight.shape[:2]).T, "bias": params[f"{name}.bias"]}


def kernel(params, name):
    """The kernel of one of torch's convolutions, HWIO."""
    return params[f"{name}.weight"].transpose(2, 3, 1, 0)


def norm(params, name):
    return {"scale": params[f"{name}.weight"], "bias": params[f"{name}.bias"]}


def connector(params, convolution, normalization):
    return {"convolution": {"kernel": kernel(params, convolution)}, "normalization": norm(params, normalization)}


def new_averages(tree):
    """Running averages before the first batch, for every normalization among some parameters."""
    if "scale" in tree:
        return {"mean": jnp.zeros_like(tree["scale"]), "variance": jnp.ones_like(tree["scale"])}
    found = {name: new_averages(part) for name, part in tree.items() if isinstance(part, dict)}
    return {name: part for name, part in found.items() if part}


def averages_after(module, params, x):
    """What a module that keeps running averages returns for a batch, and the averages after it."""
    y, updated = module.apply({"params": params, "memory": new_averages(params)}, x, mutable=["memory"])
    return y, updated["memory"]


def named(averages, name):
    """Running averages of a normalization by their keys in the file."""
    return {
        f"state_after/{name}.running_mean": averages["mean"],
        f"state_after/{name}.running_var": averages["variance"],
    }


def head_of(inputs, role="teacher"):
    return Head(inputs[f"{role}_fc_weight"].T, inputs[f"{role}_fc_bias"])


def output(logits=None, **fields):
    return ModelOutput(logits, **fields)


def create(name, inputs, **settings):
    classes = inputs["teacher_fc_bias"].shape[0] if "teacher_fc_bias" in inputs else inputs["student"].shape[1]
    return LOSSES[name](num_classes=classes, **settings)


def simkd(case):
    assert (case.hyper["cls"], case.hyper["div"], case.hyper["beta"]) == (0.0, 0.0, 1.0)

    def loss(inputs, params):
        method = create("simkd", inputs, factor=case.hyper["factor"])
        layers = {1: (0, 1), 2: (3, 4), 3: (6, 7)}
        projector = {f"layer{n}": connector(params, f"transfer.{i}", f"transfer.{j}") for n, (i, j) in layers.items()}
        student, teacher = (output(features=(inputs[role],)) for role in ("student", "teacher"))
        memory = {"projector": new_averages(projector)}
        given = LossInputs(student, teacher, inputs["labels"], teacher_head=head_of(inputs))
        variables = {"params": {"projector": projector}, "memory": memory}
        (value, _), updated = method.apply(variables, given, mutable=["memory"])
        pooled, target = pool_to_common_size(inputs["student"], inputs["teacher"])
        channels = target.shape[-1]
        module = Projector(channels // case.hyper["factor"], channels)
        projected = module.apply({"params": projector}, pooled)
        logits = head_of(inputs)(projected.mean((1, 2)))
        results = {
            "term/projected": projected,
            "term/target": target,
            "term/train_logits": logits,
            "term/eval_logits": method.apply({**variables, **updated}, student, method="predict"),
            "term/ce_train": cross_entropy_loss(logits, inputs["labels"]),
        }
        for n, (_, j) in layers.items():
            results |= named(updated["memory"]["projector"][f"layer{n}"]["normalization"], f"transfer.{j}")
        return value, results

    return loss


def srrl(case):
    maps = "weight" in case.hyper
    name = "Connectors" if maps else "transfer"

    def loss(inputs, params):
        weight = case.hyper["weight"] if maps else 1.0
        method = create("srrl", inputs, variant="maps" if maps else "vectors", regression_weight=weight)
        if maps:
            student, teacher = (output(features=(inputs[role],)) for role in ("student", "teacher"))
            x = inputs["student"]
        else:
            student, teacher = (output(embedding=inputs[role]) for role in ("student", "teacher"))
            x = inputs["student"][:, None, None, :]
        teacher = teacher._replace(logits=inputs["teacher_logits"])
        own = connector(params, f"{name}.0", f"{name}.1")
        given = LossInputs(student, teacher, None, teacher_head=head_of(inputs))
        value, terms = method.apply({"params": {"connector": own}}, given)
        y, averages = averages_after(Connector(inputs["teacher"].shape[-1], running=True), own, x)
        results = {
            f"term/{'statistic' if maps else 'feature'}": terms["feature"],
            "term/regression": terms["regression"],
            "term/pred": head_of(inputs)(nn.relu(y).mean((1, 2))),
        }
        # The first form has one weight for the sum, the second one for the part on logits.
        value = value if maps else case.hyper["beta"] * value
        return value, results | named(averages["normalization"], f"{name}.1")

    return loss


def stages_of(inputs, role):
    names = [name for name in inputs if re.fullmatch(rf"{role}\d+", name)]
    return tuple(inputs[name] for name in sorted(names, key=lambda name: int(name.removeprefix(role))))


def ofd(case):
    def loss(inputs, params):
        students, teachers = stages_of(inputs, "student"), stages_of(inputs, "teacher")
        size, count = case.hyper["kernel_size"], len(students)
        assert case.hyper["stage_weights"] == [2.0 ** (stage - count) for stage in range(1, count + 1)]
        norms = tuple(
            Norm(inputs[f"teacher_bn{stage}_weight"], inputs[f"teacher_bn{stage}_bias"])
            for stage in range(1, count + 1)
        )
        own = {f"connector{n + 1}": connector(params, f"connectors.{n}.0", f"connectors.{n}.1") for n in range(count)}
        method = LOSSES["ofd"](num_classes=2, kernel_size=size)

        def apply(students, own, teachers, norms):
            outputs = (output(preactivations=maps) for maps in (students, teachers))
            return method.apply({"params": own}, LossInputs(*outputs, None, teacher_norms=norms))[0]

        results = {f"term/margin{stage}": ofd_margin(norm) for stage, norm in enumerate(norms, start=1)}
        for n in range(count):
            # A stage alone has weight 1.
            alone = {"connector1": own[f"connector{n + 1}"]}
            results[f"term/stage{n + 1}"] = apply(students[n : n + 1], alone, teachers[n : n + 1], norms[n : n + 1])
            module = Connector(teachers[n].shape[-1], size, running=True)
            _, averages = averages_after(module, own[f"connector{n + 1}"], students[n])
            results |= named(averages["normalization"], f"connectors.{n}.1")
        return apply(students, own, teachers, norms), results

    return loss


def sdd(case):
    kind = re.match(r"sdd_(kd|dkd|nkd)", case.name).group(1)
    settings = {key: value for key, value in case.hyper.items() if key in ("alpha", "beta", "gamma", "temperature")}
    scales = case.hyper["M"].strip("[]").replace(" ", "")
    warmup = min(case.hyper["epoch"] / case.hyper["warmup"], 1) if "warmup" in case.hyper else None

    def loss(inputs, params):
        method = create(f"sdd_{kind}", inputs, scales=scales, **settings)
        heads = {"student": Head(**linear(params, "fc")), "teacher": head_of(inputs)}
        outputs = (output(features=(inputs[role],)) for role in heads)
        given = LossInputs(*outputs, inputs["labels"], student_head=heads["student"], teacher_head=heads["teacher"])
        value, _ = method.apply({}, given)
        sides = tuple(map(int, scales.split(",")))
        regions = {role: region_logits(inputs[role], head, sides) for role, head in heads.items()}
        results = {f"term/{role}_region_logits": logits.swapaxes(1, 2) for role, logits in regions.items()}
        results["term/region_weight"] = region_weights(regions["teacher"], inputs["labels"])
        if warmup is None:
            return value, results
        cross_entropy = case.hyper["ce_weight"] * cross_entropy_loss(regions["student"][:, 0], inputs["labels"])
        results |= {"term/loss_ce": cross_entropy, "term/loss_kd": warmup * value}
        return cross_entropy + warmup * value, results

    return loss


def ofa(case):
    if "stages" in case.hyper:
        return ofa_full(case)

    def loss(inputs, params):
        del params
        settings = {"epsilon": case.hyper["eps"], "temperature": case.hyper["temperature"]}
        logits = inputs["student"], inputs["teacher"]
        return ofa_loss(*logits, inputs["labels"], **settings), {}

    return loss


def exit_parameters(params, stage, blocks):
    """The parameters of an exit, and {name of its normalization: path in ours}."""
    own, paths = {}, {}
    for block in range(blocks):
        part = {}
        for half, first in ((1, 0), (2, 4)):
            name = f"{stage}.{block}.op"
            part[f"depthwise{half}"] = kernel(params, f"{name}.{first}")
            part[f"pointwise{half}"] = {"kernel": kernel(params, f"{name}.{first + 1}")[0, 0]}
            part[f"normalization{half}"] = norm(params, f"{name}.{first + 2}")
            paths[f"{name}.{first + 2}"] = f"block{block + 1}", f"normalization{half}"
        own[f"block{block + 1}"] = part
    if not blocks:
        own["pointwise"] = linear(params, f"{stage}.0")
    # The pool and the flattening come between.
    own["classifier"] = linear(params, f"{stage}.{max(blocks, 1) + 2}")
    return own, paths


def ofa_full(case):
    stages, eps, temperature = case.hyper["stages"], case.hyper["eps"], case.hyper["temperature"]

    def loss(inputs, params):
        labels, teacher, last = inputs["labels"], inputs["teacher"], max(stages)
        maps = {stage: inputs[f"student_map{stage}"] for stage in stages}
        results, own, parts = {}, {}, []
        for stage, epsilon in zip(stages, eps, strict=False):
            own[f"exit{stage}"], paths = exit_parameters(params, stage, last - stage)
            width = own[f"exit{stage}"]["classifier"]["kernel"].shape[0]
            module = Exit(inputs["student"].shape[1], width, last - stage, running=True)
            logits, averages = averages_after(module, own[f"exit{stage}"], maps[stage])
            parts.append(ofa_loss(logits, teacher, labels, epsilon=epsilon, temperature=temperature))
            results[f"term/head_logits_stage{stage}"] = logits
            for name, (block, normalization) in paths.items():
                results |= named(averages[block][normalization], name)
        weights = {"gt": case.hyper["gt_weight"], "kd": case.hyper["kd_weight"], "ofa": case.hyper["ofa_weight"]}
        cross_entropy = cross_entropy_loss(inputs["student"], labels)
        kd = ofa_loss(inputs["student"], teacher, labels, epsilon=eps[-1], temperature=temperature)
        losses = {"gt": cross_entropy, "kd": kd, "ofa": sum(parts)}
        results |= {f"term/loss_{name}": weights[name] * value for name, value in losses.items()}
        value = sum(weights[name] * value for name, value in losses.items())
        if len(set(eps)) == 1 and list(stages) == list(range(1, last + 1)):
            value = of_method(inputs, own, maps)
        return value, results

    def of_method(inputs, own, maps):
        """The value by the method, which has one exponent for all exits."""
        settings = {"kd_weight": case.hyper["kd_weight"], "exit_weight": case.hyper["ofa_weight"]}
        method = create("ofa", inputs, epsilon=eps[0], temperature=temperature, **settings)
        student = output(inputs["student"], features=tuple(maps.values()))
        given = LossInputs(student, output(inputs["teacher"]), inputs["labels"])
        value, _ = method.apply({"params": own}, given)
        return value + case.hyper["gt_weight"] * cross_entropy_loss(inputs["student"], inputs["labels"])

    return loss


ADAPTERS = {"simkd": simkd, "srrl": srrl, "ofd": ofd, "sdd": sdd, "ofa": ofa}


def is_slow(name):
    """Whether many modules are compiled."""
    return "stages" in read_cases()[name].hyper


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if is_slow(n) else n for n in names_of(*ADAPTERS)]
)
@pytest.mark.usefixtures("x64")
def test_newer_case(name):
    case = read_cases()[name]
    check_case(case, ADAPTERS[longest_prefix(name, ADAPTERS)](case))
