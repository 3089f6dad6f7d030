"""Losses that read classifiers, normalizations or exits: what the golden values leave open."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, Head, LossInputs, Norm, kd_loss, ofa_loss, ofd_margin, region_logits, sdd_loss
from cskd_jax.models.outputs import TokenGrid
from cskd_jax.training.objective import Objective
from tests import method_checks
from tests.method_checks import (
    NUM_CLASSES,
    any_number_of_devices,
    assert_finite,
    assert_same_on_devices,
    create,
    make_output,
)
from tests.tiers import chosen

NAMES = ("ofa", "ofd", "sdd_dkd", "sdd_kd", "sdd_nkd", "simkd", "srrl", "srrl_maps")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nothing here runs long enough to be worth optimizing; the golden tests run what is optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def method_class(name):
    return LOSSES[name.removesuffix("_maps")]


def settings_of(name):
    return {"variant": "maps"} if name == "srrl_maps" else {}


def make_inputs(batch=8, dtype=np.float64):
    """Outputs of both networks with their layers; no last map has the size of the other."""
    rng = np.random.default_rng(9)
    inputs = method_checks.make_inputs(batch, dtype)
    larger = rng.normal(size=(batch, 4, 4, 10)).astype(dtype)
    teacher = inputs.teacher._replace(features=(*inputs.teacher.features[:-1], larger))

    def head(features):
        return Head(*(rng.normal(size=shape).astype(dtype) for shape in ((features, NUM_CLASSES), (NUM_CLASSES,))))

    norms = tuple(Norm(*rng.normal(size=(2, channels)).astype(dtype)) for channels in (4, 6, 10))
    return inputs._replace(
        teacher=teacher, indices=None, key=None, student_head=head(6), teacher_head=head(10), teacher_norms=norms
    )


def batch_of(inputs):
    """The part of the inputs that is split over devices, and the rest as a function from it to the whole."""
    layers = {name: getattr(inputs, name) for name in ("student_head", "teacher_head", "teacher_norms")}
    return inputs._replace(**dict.fromkeys(layers)), layers


class WithLayers:
    """A method whose inputs lack the layers that no device splits; it gives them back to the method."""

    def __init__(self, method, layers):
        self.method, self.layers = method, layers

    def clone(self, **changes):
        return WithLayers(self.method.clone(**changes), self.layers)

    def apply(self, variables, inputs, **others):
        return self.method.apply(variables, inputs._replace(**self.layers), **others)


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen(NAMES, ("ofa", "ofd", "simkd")))
@pytest.mark.usefixtures("x64")
@any_number_of_devices
def test_devices_share_one_global_batch(name, devices):
    inputs = make_inputs()
    method, variables = create(method_class(name), inputs, **settings_of(name))
    batch, layers = batch_of(inputs)
    assert_same_on_devices(WithLayers(method, layers), variables, batch, devices)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32(name):
    inputs = make_inputs(dtype=np.float32)
    outputs = [jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 2 else x, output) for output in inputs[:2]]
    method = method_class(name)(num_classes=NUM_CLASSES, **settings_of(name))

    def apply(inputs):
        variables = method.init(jax.random.key(0), inputs)
        return method.apply(variables, inputs, mutable=["memory"])[0]

    for value in jax.tree.leaves(jax.eval_shape(apply, LossInputs(*outputs, *inputs[2:]))):
        assert value.dtype == jnp.float32


def zeros(inputs):
    return jax.tree.map(np.zeros_like, inputs)


def dead_norms(inputs):
    return inputs._replace(teacher_norms=tuple(Norm(np.zeros_like(n.scale), n.bias) for n in inputs.teacher_norms))


def confident(inputs):
    logits = 1e4 * np.eye(NUM_CLASSES, dtype=np.float32)
    student = inputs.student._replace(logits=logits[inputs.labels])
    return inputs._replace(student=student, teacher=inputs.teacher._replace(logits=logits[inputs.labels - 1]))


def confident_regions(inputs):
    heads = (Head(head.kernel * 1e6, head.bias) for head in (inputs.student_head, inputs.teacher_head))
    return inputs._replace(**dict(zip(("student_head", "teacher_head"), heads, strict=True)))


@functools.cache
def compiled(name):
    """A function of inputs to the value, and the gradients of parameters, student, its classifier, and teacher."""
    method, variables = create(method_class(name), make_inputs(dtype=np.float32), **settings_of(name))

    def value(params, student, student_head, teacher, inputs):
        given = inputs._replace(student=student, student_head=student_head, teacher=teacher)
        applied = variables | {"params": params}
        (found, terms), updated = method.apply(applied, given, mutable=["memory"])
        return found, (terms, updated)

    run = jax.jit(jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True))
    params = variables.get("params", {})
    return lambda inputs: run(params, inputs.student, inputs.student_head, inputs.teacher, inputs)


# Compiling the exits takes a while.
QUICK_OR_SLOW = [pytest.param("ofa", marks=pytest.mark.slow), *NAMES[1:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK_OR_SLOW)
def test_values_and_gradients_are_finite_and_reach_the_student(name):
    result, (params, student, head, teacher) = compiled(name)(make_inputs(dtype=np.float32))
    assert_finite((result, params, student, head, teacher))
    assert any(leaf.any() for leaf in jax.tree.leaves(student))
    assert head.kernel.any() == head.bias.any() == name.startswith("sdd")
    assert not any(leaf.any() for leaf in jax.tree.leaves(teacher))


@pytest.mark.slow
@pytest.mark.parametrize("change", [zeros, dead_norms, confident, confident_regions])
@pytest.mark.parametrize("name", QUICK_OR_SLOW)
def test_degenerate_inputs(name, change):
    assert_finite(compiled(name)(change(make_inputs(dtype=np.float32))))


@pytest.mark.usefixtures("x64")
def test_the_students_classifier_is_trained_through_the_regions():
    inputs = make_inputs()
    method = LOSSES["sdd_kd"](num_classes=NUM_CLASSES)

    def value(heads):
        student, teacher = heads
        return method.apply({}, inputs._replace(student_head=student, teacher_head=teacher))[0]

    student, teacher = jax.jit(jax.grad(value))((inputs.student_head, inputs.teacher_head))
    assert student.kernel.any()
    assert student.bias.any()
    assert not teacher.kernel.any()


@pytest.mark.usefixtures("x64")
def test_one_region_is_the_network_itself():
    inputs = make_inputs()
    features, head = inputs.teacher.features[-1], inputs.teacher_head
    logits = region_logits(features, head, (1,))
    expected = features.mean((1, 2)) @ head.kernel + head.bias
    np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-12)
    value = sdd_loss(2 * logits, logits, inputs.labels, lambda student, teacher, _: kd_loss(student, teacher))
    np.testing.assert_allclose(value, kd_loss(2 * expected, expected), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_margin_is_the_mean_below_zero():
    rng = np.random.default_rng(0)
    scale, bias = np.array([1.5, -0.7, 1.0, 0.0, 0.0]), np.array([0.4, -1.0, 50.0, -2.0, 2.0])
    margins = ofd_margin(Norm(scale, bias))
    for channel in (0, 1):
        x = rng.normal(bias[channel], abs(scale[channel]), 400_000)
        np.testing.assert_allclose(margins[channel], x[x < 0].mean(), rtol=0.01)
    np.testing.assert_allclose(margins[2:], [-3, -2, 0], atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_ofa_with_exponent_1_is_the_cross_entropy_with_the_teacher():
    inputs = make_inputs()
    student, teacher = (jax.nn.log_softmax(output.logits) for output in inputs[:2])
    found = ofa_loss(inputs.student.logits, inputs.teacher.logits, inputs.labels)
    np.testing.assert_allclose(found, -np.mean(np.sum(np.exp(teacher) * student, axis=1)), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "layer", "text"),
    [
        ("simkd", "teacher_head", "it reads the classifier of the teacher, which is unknown: name the path"),
        ("srrl", "teacher_head", "it reads the classifier of the teacher, which is unknown: name the path"),
        ("sdd_kd", "student_head", "it reads the classifier of the student, which is unknown: name the path"),
        ("ofd", "teacher_norms", "it reads the batch normalizations before the last ReLU of each stage"),
    ],
)
def test_a_layer_that_is_not_known(name, layer, text):
    inputs = make_inputs(dtype=np.float32)._replace(**{layer: None})
    with pytest.raises(ValueError, match="^" + re.escape(f"losses.{name}: {text}")):
        jax.eval_shape(Objective.create({name: 1.0}, num_classes=NUM_CLASSES).init, jax.random.key(0), inputs)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("simkd", {"teacher_head": Head(np.zeros((3, 5), np.float32), np.zeros(5, np.float32))},
         "a classifier of 3 features is applied to a map of 10 channels"),
        ("ofd", {"teacher": make_output(2, 8, (4, 6, 10), np.float32)._replace(preactivations=())},
         "student has 3 stages and teacher 0"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit(name, change, text):
    inputs = make_inputs(dtype=np.float32)._replace(**change)
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        jax.eval_shape(LOSSES[name](num_classes=NUM_CLASSES).init, jax.random.key(0), inputs)


@pytest.mark.parametrize(
    ("name", "settings", "roles"),
    [
        *((name, {}, ("student", "teacher")) for name in ("simkd", "sdd_kd", "sdd_dkd", "sdd_nkd")),
        ("srrl", {"variant": "maps"}, ("teacher",)),
    ],
)
def test_a_classifier_of_tokens(name, settings, roles):
    inputs = make_inputs(dtype=np.float32)
    objective = Objective.create({name: settings}, num_classes=NUM_CLASSES)
    for role in roles:
        output = getattr(inputs, role)
        tokens = tuple(x.reshape(len(x), -1, x.shape[-1]) for x in output.features)
        output = output._replace(features=tokens, grid=TokenGrid(0, *output.features[-1].shape[1:3]))
        text = f"losses.{name}: it needs networks whose classifier reads the mean over the positions .* the {role} is"
        with pytest.raises(ValueError, match=text):
            jax.eval_shape(objective.init, jax.random.key(0), inputs._replace(**{role: output}))


@pytest.mark.parametrize("variant", ["vectors", "maps"])
def test_a_teacher_that_predicts_with_the_mean_of_two_classifiers(variant):
    inputs = make_inputs(dtype=np.float32)
    teacher = inputs.teacher._replace(head_logits=(inputs.teacher.logits, inputs.teacher.logits))
    objective = Objective.create({"srrl": {"variant": variant}}, num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match=r"^losses.srrl: it needs a teacher with one classifier"):
        jax.eval_shape(objective.init, jax.random.key(0), inputs._replace(teacher=teacher))


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("simkd", {"factor": 11}, "simkd: factor 11 leaves none of the teacher's 10 channels"),
        ("ofd", {"kernel_size": 2}, "ofd: kernel_size must be odd, got 2"),
    ],
)
def test_settings_that_do_not_fit(name, settings, text):
    method = LOSSES[name](num_classes=NUM_CLASSES, **settings)
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        jax.eval_shape(method.init, jax.random.key(0), make_inputs(dtype=np.float32))
