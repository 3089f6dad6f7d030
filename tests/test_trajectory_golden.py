"""Whole training trajectories of the released code, through our step, models, optimizer and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.interop.names import from_torch
from cskd_jax.models import BasicBlock, Bottleneck, ResNet
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.objective import Objective
from cskd_jax.training.optimizers import StepSchedule, sgd
from cskd_jax.training.state import TrainState
from tests.whole_step import make_whole_step

pytestmark = pytest.mark.usefixtures("x64")
TOLERANCE = 1e-10
# What the golden files record, by the names of our metrics.
METRICS = {
    "cross_entropy": "cross_entropy",
    "kd": "mse_logits",
    "total": "loss",
    **{
        term: f"category_structure/{term}"
        for term in ("intra_feature", "intra_logits", "compactness", "inter_feature", "inter_logits")
        + ("intra", "inter", "category")
    },
}


class Case:
    """A golden trajectory with our networks and variables for it."""

    def __init__(self, path):
        with np.load(path) as file:
            self.values = dict(file)
        self.num_classes = int(self.values["num_classes"])
        common = {"num_classes": self.num_classes, "stage_widths": (4, 4, 8, 8), "dtype": jnp.float64}
        self.student = ResNet(stage_sizes=(2, 1, 1, 1), block=BasicBlock, **common)
        self.teacher = ResNet(stage_sizes=(1, 1, 2, 1), block=Bottleneck, projection_features=24, **common)
        variables, _, unused = from_torch(self.teacher, 3, self.state_dict("teacher"))
        # Nothing reads the branches of the other stages.
        assert {name for name in unused if "num_batches" not in name} == {f"branch{n}.weight" for n in (1, 2, 3)}
        self.teacher_variables = jax.tree.map(jnp.asarray, variables)

    def state_dict(self, prefix):
        return {k.removeprefix(prefix + "/"): v for k, v in self.values.items() if k.startswith(prefix + "/")}

    def student_parts(self, prefix):
        state_dict = self.state_dict(prefix)
        variables, *_ = from_torch(self.student, 3, state_dict)
        sigma = state_dict["branch4.weight"][:, :, 0, 0].T
        params = {"network": variables["params"], "losses": {"category_structure": {"sigma": sigma}}}
        return jax.tree.map(jnp.asarray, (params, variables["batch_stats"]))

    def batches(self):
        size = int(self.values["batch_size"])
        for order in self.values["order"]:
            for start in range(0, len(order), size):
                index = order[start : start + size]
                yield {"image": self.values["images"][index], "label": self.values["labels"][index]}


def assert_close(actual, expected, name):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=name)


@pytest.mark.slow
def test_trajectory(train_file):
    case = Case(train_file)
    values = case.values
    losses = {
        "cross_entropy": {"weight": 0.9},
        "category_structure": {"weight": 1.0, "variant": "reference"},
        "mse_logits": {"weight": 0.1 * 1e-5},
    }
    objective = Objective.create(losses, num_classes=case.num_classes)
    steps_per_epoch = -(-values["order"].shape[1] // int(values["batch_size"]))
    optimizer = sgd(
        StepSchedule(float(values["learning_rate"])),
        momentum=float(values["momentum"]),
        weight_decay=float(values["weight_decay"]),
        restart_every_steps=steps_per_epoch if values["momentum_reset_each_epoch"] else None,
    )
    student, teacher = LinenNetwork(case.student), LinenNetwork(case.teacher)
    train_step = jax.jit(make_whole_step(student, objective, optimizer, teacher=teacher))
    params, batch_stats = case.student_parts("student_init")
    state = TrainState(jnp.int32(0), params, {"batch_stats": batch_stats}, optimizer.init(params))
    key = jax.random.PRNGKey(0)
    num_steps = 0
    for batch, expected in zip(case.batches(), values["trajectory"], strict=True):
        state, metrics = train_step(state, case.teacher_variables, batch, key)
        for name, value in zip(values["trajectory_keys"], expected, strict=True):
            actual = metrics[METRICS[name]] * (1e-5 if name == "kd" else 1)
            np.testing.assert_allclose(actual, value, rtol=TOLERANCE, err_msg=f"step {num_steps}, {name}")
        num_steps += 1
    assert num_steps == len(values["trajectory"]) > 0

    final_params, final_stats = case.student_parts("student_final")
    for actual, expected in ((state.params, final_params), (state.collections["batch_stats"], final_stats)):
        jax.tree.map_with_path(lambda path, a, e: assert_close(a, e, jax.tree_util.keystr(path)), actual, expected)
    output = case.student.apply(state.variables, values["eval_images"], train=False)
    assert_close(output.logits, values["student_final_eval_logits"], "final evaluation")


@pytest.mark.slow
def test_evaluation_before_training(train_file):
    case = Case(train_file)
    images = case.values["eval_images"]
    params, batch_stats = case.student_parts("student_init")
    student = case.student.apply({"params": params["network"], "batch_stats": batch_stats}, images, train=False)
    teacher = case.teacher.apply(case.teacher_variables, images, train=False)
    assert_close(student.logits, case.values["student_eval_logits"], "student logits")
    assert_close(teacher.logits, case.values["teacher_eval_logits"], "teacher logits")
    sigma = params["losses"]["category_structure"]["sigma"]
    assert_close(student.features[-1] @ sigma, case.values["student_eval_features4"], "student features")
    assert_close(teacher.features[-1], case.values["teacher_eval_features4"], "teacher features")
