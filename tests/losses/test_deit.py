"""The distillation token of DeiT, and the two settings of cross-entropy that its training uses, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cskd_jax
from cskd_jax.losses import LOSSES, LossInputs, cross_entropy_loss, hard_distillation_loss
from cskd_jax.models import ModelOutput, create_model
from cskd_jax.training.objective import Objective
from tests.losses.test_logits import LABELS, kd_oracle, make_logits, softmax
from tests.torch_files import assert_same_variables


def make_inputs(heads=2):
    """The outputs of a student of this many heads, and of a teacher of one."""
    student, teacher = make_logits()
    other = student[::-1]
    outputs = ModelOutput((student + other) / 2, head_logits=(student, other)[:heads])
    return LossInputs(outputs, ModelOutput(teacher), LABELS), other, teacher


def value_of(name, inputs, **settings):
    loss = LOSSES[name](num_classes=3, **settings)
    return loss.apply({}, inputs)[0]


def test_hard():
    inputs, student, teacher = make_inputs()
    expected = -np.mean(np.log(softmax(student)[np.arange(4), teacher.argmax(axis=1)]))
    np.testing.assert_allclose(value_of("deit", inputs), expected, rtol=1e-6)
    np.testing.assert_allclose(hard_distillation_loss(student, teacher), expected, rtol=1e-6)


def test_soft_is_a_mean_over_classes():
    inputs, student, teacher = make_inputs()
    expected = kd_oracle(student, teacher, 3.0) / 3
    np.testing.assert_allclose(value_of("deit", inputs, hard=False, temperature=3.0), expected, rtol=1e-5)


def test_teacher_is_not_differentiated():
    student, teacher = make_logits()
    assert not np.any(jax.grad(hard_distillation_loss, argnums=1)(student, jnp.asarray(teacher)))


def test_without_the_token():
    with pytest.raises(ValueError, match="use a Vision Transformer with distillation_token=True"):
        value_of("deit", make_inputs(heads=0)[0])


@pytest.mark.slow
def test_networks_of_one_head():
    """Losses that prefer one of several heads take a network of one head; deit says what it needs."""
    inputs = make_inputs(heads=0)[0]
    embedded = (network._replace(embedding=jnp.ones((4, 5))) for network in (inputs.student, inputs.teacher))
    inputs = LossInputs(*embedded, inputs.labels)
    losses = {"cross_entropy": {"weight": 1.0, "first_head": True}, "vkd": 1.0}
    objective = Objective.create(losses, num_classes=3)
    params, memory = objective.init(jax.random.key(0), inputs)
    assert np.isfinite(objective(params, memory, inputs, jnp.int32(0))[0])
    with pytest.raises(ValueError, match="use a Vision Transformer with distillation_token=True"):
        Objective.create({"deit": 1.0}, num_classes=3).init(jax.random.key(0), inputs)


def test_labels_are_for_the_class_token():
    inputs = make_inputs()[0]
    first = cross_entropy_loss(inputs.student.head_logits[0], LABELS)
    assert value_of("cross_entropy", inputs, first_head=True) == first
    assert value_of("cross_entropy", inputs) == cross_entropy_loss(inputs.student.logits, LABELS)
    assert value_of("cross_entropy", make_inputs(heads=0)[0], first_head=True) == value_of("cross_entropy", inputs)


def test_label_smoothing():
    logits, _ = make_logits()
    target = 0.9 * np.eye(3)[LABELS] + 0.1 / 3
    expected = -np.mean(np.sum(target * np.log(softmax(logits)), axis=1))
    np.testing.assert_allclose(cross_entropy_loss(logits, LABELS, label_smoothing=0.1), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        cross_entropy_loss(logits, LABELS, label_smoothing=1.0)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_runs(tmp_path):
    """Both heads learn; four devices are one, and a run that goes on is one that was never interrupted."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 8, 8, 3), np.uint8), rng.integers(0, 3, 24).astype(np.int32)
    settings = {"patch_size": 4, "image_size": (8, 8), "depth": 1, "distillation_token": True}
    student = create_model("deit_tiny", num_classes=3, width=1 / 16, settings=settings)
    teacher = create_model("resnet8", num_classes=3, width=0.25)
    variables = teacher.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)

    def train(epochs, devices=1, workdir=None):
        return cskd_jax.distill(
            student,
            teacher=teacher,
            teacher_variables=variables,
            losses={"cross_entropy": {"weight": 0.5, "first_head": True}, "deit": 0.5},
            optimizer=optax.adam(1e-2),
            train=(images, labels),
            test=(images, labels),
            epochs=epochs,
            batch_size=8,
            devices=devices,
            workdir=workdir,
            callbacks=(),
        ).variables

    whole = train(2)
    assert all(np.any(whole["params"][name]["bias"]) for name in ("classifier", "distillation_classifier"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), train(2, devices=4), whole)
    train(1, workdir=tmp_path / "run")
    assert_same_variables(train(2, workdir=tmp_path / "run"), whole)
