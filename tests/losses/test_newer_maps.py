"""The newer losses of maps and embeddings: several devices, degenerate inputs, other batches, orthogonal projectors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cskd_jax
from cskd_jax.data import ImageDataset, Split
from cskd_jax.errors import InterruptedRun
from cskd_jax.losses import (
    LOSSES,
    LossInputs,
    dense_dist_loss,
    itrd_correlation_loss,
    itrd_mutual_loss,
    semckd_attention,
    semckd_loss,
    srd_correlation_loss,
    srd_difference_loss,
    vkd_loss,
    wkd_feature_loss,
)
from cskd_jax.losses._connectors import Orthogonal, orthogonal_matrix
from cskd_jax.losses.base import Method
from cskd_jax.models import ModelOutput
from cskd_jax.training.optimizers import ConstantSchedule, SeparateGradients, dot, sgd, without_decay
from tests.conftest import Stop
from tests.method_checks import (
    BATCH,
    NUM_CLASSES,
    any_number_of_devices,
    assert_close,
    assert_finite,
    assert_same_on_devices,
    create,
    evaluate,
    make_output,
    train,
)
from tests.tiers import chosen

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Name of a case: name of the loss, and its settings.
CASES = {
    "itrd": ("itrd", {}),
    "semckd": ("semckd", {"batch_size": BATCH}),
    "srd": ("srd", {}),
    "srd, correlation": ("srd", {"variant": "correlation", "projector": "orthogonal"}),
    "vkd": ("vkd", {}),
    "vkd, tokens": ("vkd", {"student": "tokens"}),
    "wkd_f": ("wkd_f", {"hidden": 3, "grid": 2}),
    "wkd_f, conv1x1": ("wkd_f", {"projector": "conv1x1", "grid": 1}),
}

# Those that compile for long are slow tests.
COMPILED = [pytest.param(case, marks=pytest.mark.slow) if case in ("semckd", "wkd_f") else case for case in CASES]


def make_inputs(batch=BATCH, dtype=np.float32, num_classes=NUM_CLASSES):
    """One stage of the student and two of the teacher, which has other channels, are enough."""

    def of(seed, channels, stages):
        output = make_output(seed, batch, channels, dtype, num_classes)
        return ModelOutput(output.logits, output.features[-stages:], output.embedding)

    return LossInputs(of(1, (2, 3, 4), 1), of(2, (2, 4, 6), 2), (np.arange(batch) % num_classes).astype(np.int32))


def created(case, inputs):
    name, settings = CASES[case]
    return create(LOSSES[name], inputs, **settings)


# Several devices.


class DenseDIST(Method):
    """The dense form of DIST, as a method."""

    def __call__(self, inputs):
        return dense_dist_loss(inputs.student.features[-1], inputs.teacher.features[-1], axis_name=self.axis_name)


# In CI those that relate the samples of a batch.
@pytest.mark.slow
@pytest.mark.parametrize("case", chosen([*CASES], ("itrd", "semckd", "wkd_f")))
@pytest.mark.usefixtures("x64")
@any_number_of_devices
def test_newer_any_number_of_devices(case, devices):
    inputs = make_inputs(dtype=np.float64)
    method, variables = created(case, inputs)
    # Biases in front of a normalization have gradients of rounding.
    assert_same_on_devices(method, variables, inputs, devices, least=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@any_number_of_devices
def test_newer_dense_dist_on_any_number_of_devices(devices):
    inputs = make_inputs(dtype=np.float64)
    teacher = inputs.teacher._replace(features=(inputs.teacher.features[-1][..., :4],))
    inputs = inputs._replace(teacher=teacher)
    assert_same_on_devices(DenseDIST(num_classes=NUM_CLASSES), {"params": {}}, inputs, devices)


# Degenerate inputs and mixed precision.


@functools.cache
def compiled(case):
    """`(params, inputs) -> (value, gradients)`, and params."""
    method, variables = created(case, make_inputs())

    @jax.jit
    def value_and_gradients(params, inputs):
        def value(params, student, teacher):
            return method.apply({"params": params}, inputs._replace(student=student, teacher=teacher))

        return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)(params, inputs.student, inputs.teacher)

    return functools.partial(value_and_gradients, variables["params"])


def zeros(outputs):
    return jax.tree.map(np.zeros_like, outputs)


def constant(outputs):
    return jax.tree.map(lambda x: np.full_like(x, 1e4), outputs)


def identical_samples(outputs):
    return jax.tree.map(lambda x: np.broadcast_to(x[:1], x.shape).copy(), outputs)


def one_dead_sample(outputs):
    return jax.tree.map(lambda x: np.concatenate([np.zeros_like(x[:1]), x[1:]]), outputs)


def vanishing(outputs):
    return jax.tree.map(lambda x: x * np.float32(1e-30), outputs)


def large(outputs):
    return jax.tree.map(lambda x: x * np.float32(1e4), outputs)


@pytest.mark.parametrize("loss", [itrd_correlation_loss, srd_correlation_loss])
@pytest.mark.parametrize(("batch_size", "features"), [(12, 6), (64, 10), (128, 200)])
def test_newer_equal_samples_have_no_gradient(loss, batch_size, features):
    """The mean of equal numbers is rounded; what is left must not become a direction."""
    rng = np.random.default_rng(0)
    equal = np.tile(rng.normal(size=features).astype(np.float32), (batch_size, 1))
    teacher = rng.normal(size=equal.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: loss(x, teacher)))(jnp.asarray(equal))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_newer_degenerate_inputs_are_finite(case):
    inputs = make_inputs()
    for change in (zeros, constant, identical_samples, one_dead_sample, vanishing, large):
        for roles in (("student",), ("teacher",), ("student", "teacher")):
            changed = inputs._replace(**{role: change(getattr(inputs, role)) for role in roles})
            assert_finite(compiled(case)(changed))


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_newer_teacher_gets_no_gradient_and_all_else_that_is_read_does(case):
    _, (params, student, teacher) = compiled(case)(make_inputs())
    assert not any(leaf.any() for leaf in jax.tree.leaves(teacher))
    assert any(leaf.any() for leaf in jax.tree.leaves(student))
    for path, leaf in jax.tree.leaves_with_path(params):
        # A bias in front of a normalization has no gradient but rounding.
        assert leaf.any() or path[-1].key == "bias", path


@pytest.mark.slow
@pytest.mark.parametrize("case", ["srd", "vkd"])
def test_newer_two_classes(case):
    """The other methods read no logits."""
    assert_finite(compiled(case)(make_inputs(num_classes=2)))


@pytest.mark.parametrize("case", CASES)
def test_newer_bfloat16_is_computed_in_float32(case):
    name, settings = CASES[case]
    method = LOSSES[name](num_classes=NUM_CLASSES, **settings)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), make_inputs()[:2])
    inputs = LossInputs(*half, make_inputs().labels)

    def apply(inputs):
        variables = method.init(jax.random.key(0), inputs)
        return variables, method.apply(variables, inputs)

    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(apply, inputs))} == {np.dtype(np.float32)}


def test_newer_one_position_has_no_variance():
    student, teacher = np.random.default_rng(0).normal(size=(2, 3, 1, 1, 4)).astype(np.float32)
    value, terms = jax.jit(functools.partial(wkd_feature_loss, grid=2))(student, teacher)
    np.testing.assert_allclose(value, 2 * np.mean(np.sum((student - teacher) ** 2, axis=(1, 2, 3))), rtol=1e-5)
    assert terms["std"] == 0


def test_newer_equal_features_have_a_finite_logarithm():
    x = np.ones((4, 3), np.float32)
    value, gradient = jax.jit(jax.value_and_grad(srd_difference_loss))(x, 2 * x)
    assert np.isfinite(value)
    assert not gradient.any()


# semckd and the size of the batch.


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_newer_semckd_fills_up_a_smaller_batch():
    """Missing samples have nothing in common with the others: the weights of their products are not read."""
    method, variables = created("semckd", make_inputs(dtype=np.float64))
    smaller = make_inputs(batch=6, dtype=np.float64)
    value, gradients, _ = evaluate(method, variables, smaller)

    def cut(path, x):
        name = jax.tree_util.keystr(path)
        return x[:6] if "layer1']['kernel']" in name and ("query" in name or "key" in name) else x

    narrow = method.clone(batch_size=6, factor=3)  # As many outputs, 8 // 4 = 6 // 3, from fewer inputs.
    expected, wanted, _ = evaluate(narrow, {"params": jax.tree.map_with_path(cut, variables["params"])}, smaller)
    assert_close(value, expected)
    assert_close(jax.tree.map_with_path(cut, gradients[0]), wanted[0])
    layer = gradients[0]["cross_layers"]["query1_layer1"]["kernel"]
    assert layer[:6].any()
    assert not layer[6:].any()


def test_newer_semckd_refuses_a_larger_batch():
    method = LOSSES["semckd"](num_classes=NUM_CLASSES, batch_size=8)
    with pytest.raises(ValueError, match="^semckd was created for batches of 8 samples, got 10"):
        method.lazy_init(jax.random.key(0), make_inputs(batch=10))


# Orthogonal projectors.


def matrix_by_hand(reflections):
    """Minus the first columns of the product of reflections, one after the other."""
    rows, columns = reflections.shape
    product = np.eye(rows)
    for i in range(columns):
        vector = np.concatenate([np.zeros(i), [1.0], reflections[i + 1 :, i]])
        product -= 2 * (product @ vector)[:, None] * vector / (vector @ vector)
    return -product[:, :columns]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(4, 4), (7, 3)])
def test_newer_orthogonal_matrix_is_a_product_of_reflections(shape):
    reflections = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_allclose(jax.jit(orthogonal_matrix)(reflections), matrix_by_hand(reflections), atol=1e-13)
    np.testing.assert_array_equal(orthogonal_matrix(np.zeros(shape)), np.eye(*shape))


def error_of(matrix):
    """The largest deviation of a product of columns from that of orthonormal ones."""
    matrix = np.asarray(matrix, np.float64)
    return np.abs(matrix.T @ matrix - np.eye(matrix.shape[1])).max()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(64, 64), (64, 256), (256, 64)])
def test_newer_projector_is_orthogonal_in_float32(sizes):
    """So it is whatever the parameters are, and where the output is wider as well as where it is narrower."""
    module, x = Orthogonal(sizes[1]), np.eye(sizes[0], dtype=np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), x)

    @jax.jit
    def matrix(scale):
        return module.apply(jax.tree.map(lambda leaf: scale * leaf, variables), x)

    for scale in (0.0, 1e-3, 0.1, 1.0, 30.0):
        kernel = matrix(np.float32(scale))
        assert error_of(kernel if sizes[0] >= sizes[1] else kernel.T) < 1e-6, scale


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vkd", "srd"])
def test_newer_projector_stays_orthogonal_at_every_step(method):
    settings = {"weight": 10.0} | ({"projector": "orthogonal"} if method == "srd" else {})
    states, _ = train({"cross_entropy": {"weight": 1.0}, method: settings}, steps=5, dtype=jnp.float32)
    reflections = [state.params["losses"][method]["projector"]["reflections"] for state in states]
    assert np.abs(reflections[-1] - reflections[0]).max() > 1e-3
    for x in reflections:
        assert error_of(jax.jit(orthogonal_matrix)(x)) < 1e-6


class Net(nn.Module):
    """A network with a map, for whole trainings."""

    channels: int

    @nn.compact
    def __call__(self, x):
        features = nn.Conv(self.channels, (3, 3))(x)
        embedding = features.mean((1, 2))
        return ModelOutput(nn.Dense(3)(embedding), (features,), embedding)


def make_trainer(losses, optimizer, workdir=None, epochs=2, **settings):
    """A training on 22 images in batches of 8, 8 and 6."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(22, 4, 4, 1)).astype(np.float32), (np.arange(22) % 3).astype(np.int32)
    variables = jax.jit(lambda: Net(5).init(jax.random.key(1), images[:2]))()
    return cskd_jax.Trainer(
        {"net": cskd_jax.Student(Net(3), losses, optimizer)},
        teachers=[cskd_jax.Teacher(Net(5), variables)],
        data=ImageDataset("arrays", Split(images, labels), Split(images, labels), ("a", "b", "c")),
        phases=[cskd_jax.Phase(epochs)],
        batch_size=8,
        workdir=workdir,
        callbacks=(),
        devices=1,
        **settings,
    )


@pytest.mark.slow
def test_newer_orthogonal_projector_does_not_decay():
    """Nothing but the decay moves parameters where the weights are 0."""
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    params = []
    for epochs in (1, 2):
        trainer = make_trainer({"vkd": 0.0, "srd": 0.0}, optimizer, epochs=epochs)
        trainer.fit()
        params.append(trainer.state["net"].params["losses"])
    np.testing.assert_array_equal(*(x["vkd"]["projector"]["reflections"] for x in params))
    shrunk = params[0]["srd"]["projector"]["kernel"] * np.float32(0.95**3)
    np.testing.assert_allclose(params[1]["srd"]["projector"]["kernel"], shrunk, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sgd", "adamw", "dot"])
def test_newer_decay_leaves_out_what_does_not_decay(name):
    schedule = ConstantSchedule(0.1)
    make = {
        "sgd": lambda decay: sgd(schedule, momentum=0.9, weight_decay=decay),
        "adamw": lambda decay: optax.adamw(schedule, weight_decay=decay),
        "dot": lambda decay: dot(schedule, momentum=0.9, delta=0.075, weight_decay=decay),
    }[name]
    rng = np.random.default_rng(0)

    def draw():
        parts = {"projector": {"w": rng.normal(size=3)}, "rest": rng.normal(size=3)}
        return {"network": rng.normal(size=3), "losses": {"vkd": parts}}

    params, gradients = draw(), draw()
    if name == "dot":
        gradients = SeparateGradients(gradients, gradients)

    def update(optimizer):
        """The second update: dot lets nothing decay in the first that distillation alone reaches."""
        with jax.numpy_dtype_promotion("standard"):
            _, state = optimizer.update(gradients, optimizer.init(params), params)
            return optimizer.update(gradients, state, params)[0]

    found = update(without_decay(make(0.5), {("vkd", "projector")}))
    decayed, plain = update(make(0.5)), update(make(0.0))
    np.testing.assert_array_equal(found["losses"]["vkd"]["projector"]["w"], plain["losses"]["vkd"]["projector"]["w"])
    assert np.any(plain["losses"]["vkd"]["projector"]["w"] != decayed["losses"]["vkd"]["projector"]["w"])
    np.testing.assert_array_equal(found["losses"]["vkd"]["rest"], decayed["losses"]["vkd"]["rest"])
    np.testing.assert_array_equal(found["network"], decayed["network"])


@pytest.mark.slow
def test_newer_vkd_resumes_bit_for_bit(tmp_path):
    """A part of its parameters does not decay."""
    losses, optimizer = {"cross_entropy": 1.0, "vkd": 1.0}, optax.adamw(0.01)
    expected = make_trainer(losses, optimizer, epochs=1)
    expected.fit()
    with pytest.raises(InterruptedRun):
        make_trainer(losses, optimizer, tmp_path, epochs=1).fit(Stop(1))
    resumed = make_trainer(losses, optimizer, tmp_path, epochs=1)
    resumed.fit()
    jax.tree.map(np.testing.assert_array_equal, resumed.state["net"].params, expected.state["net"].params)


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation_steps", "width"), [(1, 8), (2, 4)])
def test_newer_semckd_is_as_wide_as_a_batch_or_micro_batch(accumulation_steps, width):
    """The smaller last batch of an epoch asks for no other parameters."""
    trainer = make_trainer({"semckd": 1.0}, optax.sgd(0.01), accumulation_steps=accumulation_steps)
    layers = trainer.programs("net").states[0].params["losses"]["semckd"]["cross_layers"]
    assert layers["query1_layer1"]["kernel"].shape[0] == layers["key1_layer1"]["kernel"].shape[0] == width


# Errors.

VECTORS, MAPS = np.ones((4, 3), np.float32), np.ones((4, 2, 2, 3), np.float32)
FUNCTIONS = {
    itrd_correlation_loss: VECTORS,
    itrd_mutual_loss: VECTORS,
    srd_correlation_loss: VECTORS,
    srd_difference_loss: VECTORS,
    vkd_loss: VECTORS,
    wkd_feature_loss: MAPS,
    dense_dist_loss: MAPS,
    semckd_attention: MAPS[0],
    semckd_loss: MAPS[0],
}


@pytest.mark.parametrize("loss", FUNCTIONS)
def test_newer_wrong_arrays_are_refused(loss):
    array = FUNCTIONS[loss]
    for arguments in ((array.astype(np.int32), array), (array, array.astype(np.int32))):
        with pytest.raises(TypeError, match=r"must have a floating-point dtype, got int32$"):
            loss(*arguments)
    with pytest.raises(ValueError, match="equal, got"):
        loss(array, array[:1])
    with pytest.raises(ValueError, match="must have . dimensions, got shape"):
        loss(array[0], array[0])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: itrd_correlation_loss(VECTORS[:1], VECTORS[:1]), "it needs at least 2 in the global batch, got 1"),
        (lambda: itrd_correlation_loss(VECTORS, VECTORS, alpha=0.0), "alpha must be greater than 0, got 0.0"),
        (lambda: srd_correlation_loss(VECTORS[:1], VECTORS[:1]), "it needs at least 2 in the global batch, got 1"),
        (lambda: srd_difference_loss(VECTORS[:1], VECTORS[:1]), "it needs at least 2 in the global batch, got 1"),
        (lambda: srd_difference_loss(VECTORS, VECTORS, power=1.0), "power must be greater than 1, got 1.0"),
        (lambda: wkd_feature_loss(MAPS, MAPS, grid=0), "grid must be at least 1, got 0"),
        (lambda: wkd_feature_loss(MAPS, MAPS, epsilon=0.0), "epsilon must be greater than 0, got 0.0"),
        (lambda: semckd_attention(MAPS[0], MAPS[0], temperature=0.0), "temperature must be greater than 0, got 0.0"),
    ],
)
def test_newer_wrong_values_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("name", ["semckd", "wkd_f"])
def test_newer_tokens_are_no_maps(name):
    tokens = make_inputs().student._replace(features=(np.ones((8, 5, 3), np.float32),))
    method = LOSSES[name](num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match=r"stage.* must have 4 dimensions, got shape \(8, 5, 3\)"):
        method.lazy_init(jax.random.key(0), LossInputs(tokens, tokens, None))
