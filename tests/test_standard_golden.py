"""Whole training runs of the reference code of the standard benchmark, in 64 bits.

Every file of `standard/` in the golden folder is a run of CRD's reference code (Tian et al. 2020,
https://github.com/HobbitLong/RepDistiller), of mdistiller (https://github.com/megvii-research/mdistiller), or of code
built on them. Its `meta` names networks, method and settings. The run is repeated by our import, networks, losses,
phases, optimizer and schedule. Other files of the same form are tested without a change here.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cskd_jax.interop.names import from_torch
from cskd_jax.losses import CRD
from cskd_jax.models import BasicBlock, ResNet
from cskd_jax.models.shufflenet import ShuffleNet
from cskd_jax.models.vgg import VGG
from cskd_jax.models.wide_resnet import WideResNet
from cskd_jax.runs import schema
from cskd_jax.runs.optimization import make_training
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.objective import Objective
from cskd_jax.training.phases import make_parts
from cskd_jax.training.state import TrainState, init_optimizer
from tests.conftest import golden_path
from tests.whole_step import make_whole_step

pytestmark = pytest.mark.usefixtures("x64")
FILES = sorted((golden_path() / "standard").glob("*.npz"))
TOLERANCE = 1e-9
# Biases before a normalization get no gradient but rounding: arrays that are this small are compared absolutely.
SMALL = 1e-12


class Recorded(CRD):
    """CRD with the negatives of a recorded run, of one step after the other."""

    recorded: tuple = ()

    def draw(self, key, positions, num_negatives):
        step = self.variable("memory", "step", lambda: jnp.zeros((), jnp.int32))
        negatives = jnp.asarray(np.array(self.recorded, np.int32))[step.value][positions]
        step.value += 1
        return negatives[:, :num_negatives]


def make_network(kind, num_classes, norm_passes):
    """The network that `meta` describes."""
    common = {"num_classes": num_classes, "dtype": jnp.float64}
    if kind["kind"] == "resnet":
        stem, *widths = kind["channels"]
        sizes = ((kind["depth"] - 2) // 6,) * len(widths)
        common |= {"stage_sizes": sizes, "stage_widths": tuple(widths), "stem_width": stem, "pool_stride": None}
        return ResNet(block=BasicBlock, **common)
    if kind["kind"] == "wrn":
        return WideResNet(depth=kind["depth"], widening=kind["widening"], norm_passes=norm_passes, **common)
    if kind["kind"] == "vgg":
        stem, *sizes = kind["convolutions"]
        return VGG(stem_size=stem, stage_sizes=tuple(sizes), stage_widths=tuple(kind["channels"]), **common)
    if kind["kind"] == "shuffle1":
        sizes, widths = (tuple(kind[name]) for name in ("blocks_of_a_stage", "channels"))
        return ShuffleNet(version=1, stage_sizes=sizes, stage_widths=widths, groups=3, **common)
    *widths, head = kind["channels"]
    sizes = tuple(1 + number for number in kind["blocks_of_a_stage_after_its_first"])
    return ShuffleNet(version=2, stage_sizes=sizes, stage_widths=tuple(widths), head_width=head, **common)


def make_losses(meta, values):
    """The losses that `meta` describes, and the name of the method's own loss."""
    if meta["method"] == "ce":
        return {"cross_entropy": {"weight": 1.0}}, None
    if meta["method"] == "dist":
        settings = {"weight": meta["kd_loss_weight"], "temperature": meta["tau"]}
        settings |= {name: meta[name] for name in ("beta", "gamma")}
        return {"cross_entropy": {"weight": meta["ori_loss_weight"]}, "dist": settings}, "dist"
    if meta["method"] in meta:
        return losses_of_mdistiller(meta)
    return losses_of_repdistiller(meta, values)


def losses_of_repdistiller(meta, values):
    losses = {"cross_entropy": {"weight": meta["gamma"]}}
    if meta["alpha"]:
        losses["kd"] = {"weight": meta["alpha"], "temperature": meta["kd_T"]}
    if meta["method"] == "kd":
        return losses, "kd"
    name, settings = {
        "abound": ("ab", {}),
        "attention": ("at", {}),
        "correlation": ("cc", {"embedding_size": meta.get("feat_dim")}),
        "crd": ("crd", {}),
        "factor": ("ft", {}),
        "fsp": ("fsp", {}),
        "hint": ("fitnet", {"stage": meta.get("hint_layer")}),
        "nst": ("nst", {}),
        "pkt": ("pkt", {}),
        "rkd": ("rkd", {}),
        "similarity": ("sp", {}),
        "vid": ("vid", {}),
    }[meta["method"]]
    if name == "crd":
        recorded = values["random/contrast_idx"][:, :, 1:].tolist()
        sizes = {"embedding_size": meta["feat_dim"], "num_negatives": meta["nce_k"]}
        settings = sizes | {"temperature": meta["nce_t"], "momentum": meta["nce_m"]}
        settings |= {"loss": Recorded, "recorded": tuple(tuple(map(tuple, step)) for step in recorded)}
    return losses | {name: {"weight": meta["beta"], **settings}}, name


def losses_of_mdistiller(meta):
    section = meta[meta["method"]]
    weights = section | section.get("LOSS", {})
    name, weight, keys = {
        "KD": ("lskd" if meta.get("logit_stand") else "kd", "KD_WEIGHT", {"temperature": "TEMPERATURE"}),
        "AT": ("at", "FEAT_WEIGHT", {}),
        "RKD": ("rkd", "FEAT_WEIGHT", {"distance_weight": "DISTANCE_WEIGHT", "angle_weight": "ANGLE_WEIGHT"}),
        "DKD": ("dkd", None, {"alpha": "ALPHA", "beta": "BETA", "temperature": "T", "warmup_epochs": "WARMUP"}),
        "REVIEWKD": ("reviewkd", "REVIEWKD_WEIGHT", {"warmup_epochs": "WARMUP_EPOCHS"}),
    }[meta["method"]]
    settings = {"weight": weights[weight] if weight else 1.0} | {ours: section[key] for ours, key in keys.items()}
    if name == "reviewkd":
        settings["variant"] = "imagenet" if section["STU_PREACT"] else "cifar100"
    return {"cross_entropy": {"weight": weights["CE_WEIGHT"]}, name: settings}, name


def kernel(weight):
    """A convolution's kernel, or that of a linear layer, in our layout."""
    return weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T


def flipped(weight):
    """The kernel of the convolution that equals a transposed convolution."""
    return weight[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)


def norm(extra, name):
    return {"scale": extra[f"{name}.weight"], "bias": extra[f"{name}.bias"]}


def linear(extra, name):
    return {"kernel": kernel(extra[f"{name}.weight"]), "bias": extra[f"{name}.bias"]}


def regressor(extra, name):
    weight, bias = extra[f"{name}conv.weight"], extra[f"{name}conv.bias"]
    weight = flipped(weight) if weight.shape[2] == 4 else kernel(weight)
    return {"kernel": weight, "bias": bias, "normalization": norm(extra, f"{name}bn")}


def stack(extra, name, layout, normalized=False):
    """The three convolutions of a part of factor transfer."""
    params = {}
    for layer in (1, 2, 3):
        index = 3 * (layer - 1)
        params[f"layer{layer}"] = {"kernel": layout(extra[f"{name}.{index}.weight"])}
        params[f"bias{layer}"] = extra[f"{name}.{index}.bias"]
        if normalized:
            params[f"normalization{layer}"] = norm(extra, f"{name}.{index + 1}")
    return params


def fusion(extra, name):
    params = {}
    for ours, theirs in (("reduce", "conv1"), ("output", "conv2")):
        weight = kernel(extra[f"{name}.{theirs}.0.weight"])
        params[ours] = {"convolution": {"kernel": weight}, "normalization": norm(extra, f"{name}.{theirs}.1")}
    if f"{name}.att_conv.0.weight" in extra:
        attention = linear(extra, f"{name}.att_conv.0")
        params["attention"] = attention | {"kernel": attention["kernel"][0, 0]}
    return params


def loss_params(name, extra):
    """The parameters of the loss `name`, from the modules of the method in a state dict."""
    if name == "cc":
        return {"student": linear(extra, "embed_s/linear"), "teacher": linear(extra, "embed_t/linear")}
    if name == "crd":
        return {"student": linear(extra, "crd/embed_s.linear"), "teacher": linear(extra, "crd/embed_t.linear")}
    if name == "fitnet":
        return {"regressor": regressor(extra, "regressor/")}
    if name == "ab":
        indices = sorted({int(key.split(".")[1]) for key in extra})
        return {f"connector{index + 1}": regressor(extra, f"connector/connectors.{index}.") for index in indices}
    if name == "ft":
        return {
            "encoder": stack(extra, "paraphraser/encoder", kernel),
            "decoder": stack(extra, "paraphraser/decoder", flipped),
            "translator": stack(extra, "translator/encoder", kernel, normalized=True),
        }
    if name == "vid":
        params = {}
        for stage in sorted({key.split("/")[0].removeprefix("vid") for key in extra}):
            layers = {1: 0, 2: 2, 3: 4}
            weights = {f"layer{n}": kernel(extra[f"vid{stage}/regressor.{i}.weight"])[0, 0] for n, i in layers.items()}
            params[f"mean{stage}"] = {layer: {"kernel": weight} for layer, weight in weights.items()}
            params[f"log_scale{stage}"] = extra[f"vid{stage}/log_scale"]
        return params
    if name == "reviewkd":
        numbers = sorted({int(key.removeprefix("abfs/").split(".")[0]) for key in extra})
        return {f"fusion{len(numbers) - number}": fusion(extra, f"abfs/{number}") for number in numbers}
    return {}


def contrast_memory(extra, num_examples):
    """The memory of crd but for its labels."""
    normalizers = extra["crd/contrast.params"][2:4].astype(np.float64)
    unknown = normalizers < 0  # Until the first step sets them.
    logarithms = np.where(unknown, -np.inf, np.log(np.where(unknown, 1, normalizers) / num_examples))
    return {
        "student": extra["crd/contrast.memory_v1"],
        "teacher": extra["crd/contrast.memory_v2"],
        "log_normalizers": logarithms,
    }


class Case:
    """A recorded run with our networks, losses and phases for it."""

    def __init__(self, path):
        with np.load(path) as file:
            self.values = dict(file)
        self.meta = meta = json.loads(str(self.values["meta"]))
        self.num_examples = len(self.values["labels"])
        # The reference code applies the normalizations twice where a method reads pre-activations, mdistiller always.
        twice = meta["method"] == "abound" or "mdistiller" in meta["repository"]
        self.student = make_network(meta["student"], meta["num_classes"], 2 if twice else 1)
        self.teacher = meta["teacher"] and make_network(meta["teacher"], meta["num_classes"], 1)
        self.losses, self.method = make_losses(meta, self.values)

    @property
    def images(self):
        return self.values["images"].astype(np.float64).transpose(0, 2, 3, 1)

    def state_dict(self, prefix):
        found = {k.removeprefix(prefix + "/"): v for k, v in self.values.items() if k.startswith(prefix + "/")}
        return {k: np.asarray(v, np.float64) for k, v in found.items()}

    def variables(self, module, prefix):
        return jax.tree.map(jnp.asarray, from_torch(module, 3, self.state_dict(prefix))[0])

    def loss_params(self, prefix):
        params = loss_params(self.method, self.state_dict(prefix))
        return {self.method: jax.tree.map(jnp.asarray, params)} if params else {}

    def parts(self):
        """The phases, as recipes describe them."""
        meta = self.meta
        loss_settings = {name: dict(settings) for name, settings in self.losses.items()}
        foreign = {name: settings for name, settings in loss_settings.items() if "loss" in settings}
        config = schema.fill(
            ConfigDict(
                {
                    "epochs": meta["epochs"],
                    "losses": {name: settings for name, settings in loss_settings.items() if name not in foreign},
                    "optimizer": {
                        "name": "dot" if meta.get("trainer") == "dot" else "sgd",
                        "delta": meta.get("DOT", {}).get("DELTA", 0.0),
                        "learning_rate": meta["learning_rate"],
                        "momentum": meta["momentum"],
                        "weight_decay": meta["weight_decay"],
                        "milestones": tuple(meta["lr_decay_epochs"]),
                        "decay_factor": meta["decay_factor"],
                    },
                    "first_phase": {
                        "epochs": meta.get("init_epochs", 0),
                        "learning_rate": float(self.values["learning_rate"][0]),
                    },
                }
            )
        )
        training = make_training(config, meta["steps_per_epoch"])
        create = functools.partial(
            Objective.create,
            num_classes=meta["num_classes"],
            num_examples=self.num_examples,
            steps_per_epoch=meta["steps_per_epoch"],
        )
        return make_parts(
            training.phases,
            training.losses | foreign,
            training.optimizer,
            training.schedule,
            steps_per_epoch=meta["steps_per_epoch"],
            create=create,
        )

    def first_state(self):
        variables = self.variables(self.student, "student_init")
        params = {"network": variables["params"], "losses": self.loss_params("extra_init")}
        memory = {}
        if self.method == "crd":
            contrast = contrast_memory(self.state_dict("extra_init"), self.num_examples)
            contrast["labels"] = np.full(self.num_examples, -1, np.int32)
            memory = {"crd": {"contrast": jax.tree.map(jnp.asarray, contrast), "step": jnp.int32(0)}}
        return TrainState(jnp.int32(0), params, {"batch_stats": variables["batch_stats"]}, None, memory)


def relative_error(actual, expected):
    """The largest difference of two trees, relative to the largest element of each array unless it is small."""

    def error(a, e):
        difference, scale = np.max(np.abs(a - e), initial=0), np.max(np.abs(e), initial=0)
        assert np.isfinite(a).all()
        return difference / scale if scale > SMALL else difference

    errors = jax.tree.leaves(jax.tree.map(error, actual, expected))
    return max(errors, default=0.0)


class Errors:
    """The largest relative errors of a run."""

    def __init__(self):
        self.totals, self.weights = 0.0, 0.0

    def add_step(self, case, step, metrics):
        recorded = dict(zip(map(str, case.values["trajectory_keys"]), case.values["trajectory"][step], strict=True))
        compared = {"total": "loss", "cross_entropy": "cross_entropy", "kl": "kd", "method": case.method, "mse": "ft"}
        weights = {name: settings["weight"] for name, settings in case.losses.items()}
        for theirs, ours in compared.items():
            if ours in metrics and np.isfinite(recorded.get(theirs, np.nan)):
                self.totals = max(self.totals, relative_error(metrics[ours], recorded[theirs]))
        if "loss_ce" in recorded:
            found = weights["cross_entropy"] * metrics["cross_entropy"]
            self.totals = max(self.totals, relative_error(found, recorded["loss_ce"]))

    def add_state(self, case, state, when):
        expected = case.variables(case.student, f"student_{when}")
        found = {"params": state.params["network"], **state.collections}
        self.weights = max(self.weights, relative_error(found, expected))
        self.weights = max(self.weights, relative_error(state.params["losses"], case.loss_params(f"extra_{when}")))
        if case.method == "crd":
            memory = contrast_memory(case.state_dict(f"extra_{when}"), case.num_examples)
            found = {name: state.memory["crd"]["contrast"][name] for name in memory}
            self.weights = max(self.weights, relative_error(found, memory))


def compile_step(case, part, teacher):
    """The compiled training step of a phase."""
    step = make_whole_step(
        LinenNetwork(case.student, trainable=part.evaluated),
        part.objective,
        part.optimizer,
        teacher=teacher if part.objective.teacher_reader else None,
    )
    return jax.jit(step)


def replay(case):
    """Repeats a run; returns the largest errors."""
    values, errors, state = case.values, Errors(), case.first_state()
    teacher = case.teacher and LinenNetwork(case.teacher)
    teacher_variables = case.teacher and case.variables(case.teacher, "teacher")
    images, key, parts = case.images, jax.random.PRNGKey(0), case.parts()
    assert parts[-1].end == len(values["order"]) == len(values["trajectory"]) > 0
    for number, part in enumerate(parts):
        assert part.fresh
        state = dataclasses.replace(state, opt_state=init_optimizer(part.optimizer, state.params))
        train_step = compile_step(case, part, teacher)
        for step in range(part.start, part.end):
            rate = part.schedule.on_host(step - part.start)
            np.testing.assert_allclose(rate, values["learning_rate"][step], rtol=1e-12)
            rows = values["order"][step]
            batch = {"image": images[rows], "label": values["labels"][rows], "index": rows}
            state, metrics = train_step(state, teacher_variables, batch, key)
            errors.add_step(case, step, metrics)
        errors.add_state(case, state, "final" if number == len(parts) - 1 else "phase1")
    return errors, state


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_standard_run(path, capsys):
    case = Case(path)
    errors, state = replay(case)
    with capsys.disabled():
        print(f"\n{path.stem}: totals {errors.totals:.1e}, final weights {errors.weights:.1e}")
    assert errors.totals < TOLERANCE
    assert errors.weights < TOLERANCE
    evaluate = jax.jit(functools.partial(case.student.apply, train=False))
    after = evaluate(state.variables, case.images)
    assert relative_error(after.logits, case.values["student_logits_after"]) < TOLERANCE
