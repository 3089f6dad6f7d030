"""The newer losses of logits: what the golden values leave open (devices, degenerate inputs, limits, errors)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cskd_jax.data import ImageDataset, Split
from cskd_jax.errors import UserError
from cskd_jax.losses import (
    LOSSES,
    Head,
    LossInputs,
    View,
    abkd_loss,
    kd_loss,
    mlkd_loss,
    nkd_loss,
    rld_loss,
    sinkhorn_distance,
    standardize_logits,
    ttm_loss,
)
from cskd_jax.training.checks import check_losses
from cskd_jax.training.objective import Objective, Weight
from tests.method_checks import assert_close, assert_finite, make_inputs
from tests.tiers import chosen

pytestmark = pytest.mark.usefixtures("quick_compilation")
AXIS = "devices"
NAMES = ("student", "teacher", "strong_student", "strong_teacher")
LABELED = ("ctkd", "mlkd", "nkd", "rld", "weighted_target", "wkd_l")
STANDARDIZED = ("abkd", "ctkd", "dkd", "kd", "mlkd", "nkd", "rld")
# {name: (loss, settings)}
PLAIN = {name: (name, {}) for name in ("abkd", "ctkd", "luminet", "mlkd", "nkd", "rld", "ttm", "wttm", "wkd_l")}
METHODS = PLAIN | {f"standardized {name}": (name, {"standardize": True}) for name in STANDARDIZED}
METHODS["ctkd of dkd"] = "ctkd", {"variant": "dkd", "schedule": "linear"}
METHODS["weighted_target"] = "weighted_target", {}
BOUNDS = {name: {"temperature": (1e-3, 1e6)} for name in ("abkd", "kd", "luminet", "mlkd", "nkd", "rld", "wkd_l")}
BOUNDS |= {"ttm": {"exponent": (1e-6, 1e3)}, "wttm": {"exponent": (1e-6, 1e3)}, "ctkd": {"span": (1e-6, 1e6)}}
EXTREME = {
    f"{name} {setting} {value}": (name, {setting: value})
    for name, settings in BOUNDS.items()
    for setting, values in settings.items()
    for value in values
}
SETS = {
    "all": METHODS,
    "plain": PLAIN,
    "extreme": EXTREME,
    "of two classes": {name: method for name, method in METHODS.items() if "dkd" not in name},
}


class Logits:
    """Outputs of a network that has nothing but logits."""

    def __init__(self, logits):
        self.logits = logits


def make_arrays(batch=8, num_classes=5, dtype=np.float64, scale=2.0):
    """Logits of both networks for two views, labels, and the kernel of a classifier."""
    rng = np.random.default_rng(0)
    arrays = {name: (scale * rng.normal(size=(batch, num_classes))).astype(dtype) for name in NAMES}
    return arrays | {"labels": (np.arange(batch) % num_classes).astype(np.int32)}


@functools.cache
def compiled(methods, devices, num_classes, dtype):
    """All methods in one program, which compiles faster than many; on several devices as a training step does it."""
    kernel = np.random.default_rng(1).normal(size=(6, num_classes)).astype(dtype)
    axis = None if devices is None else AXIS

    def run(arrays, params):
        def of(loss, settings):
            method = LOSSES[loss](num_classes=num_classes, axis_name=axis, **settings)

            def value(moved, params):
                student, teacher, strong_student, strong_teacher = (Logits(moved[name]) for name in NAMES)
                inputs = LossInputs(
                    student,
                    teacher,
                    arrays["labels"],
                    teacher_head=Head(kernel, np.zeros(num_classes, dtype)),
                    epoch=jnp.int32(5),
                    views=(View(strong_student, strong_teacher),),
                )
                return method.apply({"params": params if loss == "ctkd" else {}}, inputs)

            moved = {name: arrays[name] for name in NAMES}
            value, (of_rows, of_params) = jax.value_and_grad(value, (0, 1), has_aux=True)(moved, params)
            if devices is None:
                return value, of_rows, of_params
            value, of_params = lax.pmean((value, of_params), AXIS)
            return value, jax.tree.map(lambda gradient: gradient / devices, of_rows), of_params

        return {name: of(*method) for name, method in SETS[methods].items()}

    if devices is None:
        return jax.jit(run)
    return jax.pmap(run, AXIS, in_axes=(0, None), devices=jax.devices()[:devices])


def evaluate_all(arrays, methods="all", devices=None):
    """{name: ((value, terms), gradients by arrays, gradients by parameters)} of the global batch."""
    dtype = np.promote_types(arrays["student"].dtype, np.float32)
    params = {"temperature": np.asarray(0.3, dtype)}
    run = compiled(methods, devices, arrays["student"].shape[1], dtype)
    if devices is None:
        return jax.device_get(run(arrays, params))
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), arrays)
    found = {}
    for name, (value, of_rows, of_params) in jax.device_get(run(split, params)).items():
        value, of_params = jax.tree.map(lambda x: x[0], (value, of_params))
        found[name] = value, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), of_rows), of_params
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("devices", chosen([8, 1, 2, 4], 1))
def test_values_and_gradients_of_several_devices(devices):
    assert_close(evaluate_all(make_arrays(), "plain", devices), evaluate_all(make_arrays(), "plain"))


@pytest.mark.slow
def test_methods_move_the_student_and_never_the_teacher():
    for name, (_, arrays, params) in evaluate_all(make_arrays(20, dtype=np.float32)).items():
        assert arrays["student"].any(), name
        assert not arrays["teacher"].any(), name
        assert not arrays["strong_teacher"].any(), name
        assert arrays["strong_student"].any() == ("mlkd" in name), name
        assert params["temperature"].any() == ("ctkd" in name), name


FILLS = {
    "equal": np.zeros(5),
    "one class": np.array([1e4, 0, 0, 0, 0]),
    "far apart": np.array([1e4, 0, 0, 0, -1e4]),
    "the label last": np.arange(5.0) * 10,
}


@pytest.mark.slow
@pytest.mark.parametrize("roles", [("student",), ("teacher",), ("student", "teacher")], ids="+".join)
def test_degenerate_logits_are_finite(roles):
    """One program; each sample of the batch is degenerate in another way, and its label differs."""
    arrays = make_arrays(batch=20, dtype=np.float32)
    for role in roles:
        arrays[role] = np.repeat(np.stack(list(FILLS.values())), 5, axis=0).astype(np.float32)
        arrays[f"strong_{role}"] = arrays[role]
    assert_finite(evaluate_all(arrays))


@pytest.mark.slow
def test_two_classes_and_two_samples_are_finite():
    assert_finite(evaluate_all(make_arrays(2, 2, np.float32), "of two classes"))


@pytest.mark.slow
def test_extreme_temperatures_are_finite():
    assert_finite(evaluate_all(make_arrays(dtype=np.float32), "extreme"))


@pytest.mark.slow
def test_bfloat16_is_computed_in_float32():
    arrays = make_arrays(20, dtype=jnp.bfloat16)
    exact = evaluate_all({name: array.astype(np.float32) if name in NAMES else array for name, array in arrays.items()})
    for name, ((value, _), gradients, _) in evaluate_all(arrays).items():
        assert value.dtype == np.float32, name
        assert gradients["student"].dtype == jnp.bfloat16, name
        np.testing.assert_allclose(value, exact[name][0][0], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_teacher_that_ranks_the_label_last_teaches_no_relations():
    teacher, student = np.array([[3.0, 1.0, 2.0]], np.float32), np.array([[0.5, 0.1, 0.2]], np.float32)
    gradient = jax.grad(lambda x: rld_loss(x, teacher, np.array([1], np.int32), alpha=0.0)[0])(student)
    assert not gradient.any()


@pytest.mark.usefixtures("x64")
def test_limits_of_abkd():
    arrays = make_arrays()
    student, teacher = arrays["student"], arrays["teacher"]

    def value(alpha, beta, **settings):
        return abkd_loss(student, teacher, alpha=alpha, beta=beta, temperature=1.0, **settings)[0]

    np.testing.assert_allclose(value(1.0, 0.0), kd_loss(student, teacher, temperature=1.0), rtol=1e-12)
    np.testing.assert_allclose(value(0.0, 1.0), kd_loss(teacher, student, temperature=1.0), rtol=1e-12)
    for alpha, beta in ((0.5, 0.0), (0.0, 0.5), (0.7, -0.7), (0.0, 0.0)):
        for step in (1e-6, -1e-6):
            np.testing.assert_allclose(value(alpha + step / 3, beta + step), value(alpha, beta), rtol=1e-4)
    assert value(0.5, 0.0, released_limits=True) == 0.5 * value(0.5, 0.0)
    assert value(0.0, 0.25, released_limits=True) == 0.25 * value(0.0, 0.25)
    assert value(0.5, 0.5, released_limits=True) == value(0.5, 0.5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, -1.0), (-1.0, 2.0), (5.0, -4.0)])
def test_abkd_with_a_negative_exponent_is_finite_where_its_value_is(alpha, beta):
    """A power of one network may overflow where the other's makes the product vanish."""
    student, teacher = np.array([[0.0, -1.0, -2.0]]), np.array([[0.0, -1.0, -2.0]])
    (student if beta > 0 else teacher)[0, 2] = -120  # The network whose power has a positive exponent.
    loss = functools.partial(abkd_loss, alpha=alpha, beta=beta, temperature=1.0)
    (expected, _), expected_gradient = jax.value_and_grad(loss, has_aux=True)(student, teacher)
    single = jax.value_and_grad(loss, has_aux=True)(student.astype(np.float32), teacher.astype(np.float32))
    np.testing.assert_allclose(single[0][0], expected, rtol=1e-5)
    np.testing.assert_allclose(single[1], expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_abkd_leaves_out_infinite_logits():
    arrays = make_arrays()
    wider = {name: np.pad(arrays[name], ((0, 0), (0, 1)), constant_values=-np.inf) for name in ("student", "teacher")}
    expected, _ = abkd_loss(arrays["student"], arrays["teacher"])
    (value, _), gradient = jax.value_and_grad(abkd_loss, has_aux=True)(wider["student"], wider["teacher"])
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert_finite(gradient)


@pytest.mark.usefixtures("x64")
def test_transport_between_two_classes():
    """With little regularization it is the cost of the probability that has to move."""
    cost, a = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[0.7, 0.3], [1.0, 0.0]])
    np.testing.assert_allclose(sinkhorn_distance(a, a, cost, regularization=0.05), 0, atol=1e-6)
    found = sinkhorn_distance(a, np.full((2, 2), [0.25, 0.75]), cost, regularization=0.2, iterations=50)
    np.testing.assert_allclose(found, [0.45, 0.75], atol=1e-4)


@pytest.mark.parametrize("name", LABELED)
def test_multilabel_data_are_refused_in_words(name):
    labels = np.zeros((4, 3), np.float32)
    split = Split(np.zeros((4, 2, 2, 1), np.uint8), labels)
    objective = Objective.create({name: 1.0}, num_classes=3)
    with pytest.raises(
        UserError, match=rf"losses.{name} does not work with data set 'pairs', whose images have any number"
    ):
        check_losses(objective, ImageDataset("pairs", split, split, tuple("abc")))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x, y: standardize_logits(x[:, :1]), "standardize_logits needs at least 2 classes, got 1"),
        (lambda x, y: nkd_loss(x[:, :1], x[:, :1], y), "nkd_loss needs at least 2 classes, got 1"),
        (lambda x, y: rld_loss(x, x, y, alpha_temperature=0.0), "temperature must be greater than 0, got 0.0"),
        (lambda x, y: ttm_loss(x, x, exponent=0.0), "exponent must be greater than 0, got 0.0"),
        (lambda x, y: sinkhorn_distance(x, x, x[:2]), r"cost must have shape \(3, 3\): classes times classes"),
        (lambda x, y: mlkd_loss((x, x), (x, x[:, :2])), "shapes must be equal"),
    ],
)
def test_wrong_values(function, text):
    with pytest.raises(ValueError, match=text):
        function(np.ones((4, 3), np.float32), np.zeros(4, np.int32))


def test_weight_that_falls_along_a_cosine():
    """It begins to fall after `decay_epoch` epochs and is 0 in the last one before `end_epoch`."""
    weight = Weight(2.0, end_epoch=10, decay_epoch=6)
    found = [float(weight.at(jnp.int32(epoch))) for epoch in (0, 5, 6, 7, 9, 10, 12)]
    np.testing.assert_allclose(found, [2, 2, 1 + np.sqrt(0.5), 1, 0, 0, 0], atol=1e-6)


def test_the_epochs_that_a_loss_sees_begin_with_its_own():
    """Otherwise a curriculum would be over when a first phase has come before."""
    inputs = make_inputs()
    losses = {"own": {"loss": lambda inputs: inputs.epoch.astype(float), "start_epoch": 30}}
    objective = Objective.create(losses, num_classes=inputs.student.logits.shape[1], steps_per_epoch=10)
    seen = [objective({}, {}, inputs, jnp.int32(step))[1]["own"] for step in (0, 299, 300, 309, 310, 400)]
    np.testing.assert_array_equal(seen, [0, 0, 0, 0, 1, 10])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"decay_epoch": 3}, "losses.kd.decay_epoch is 3; it needs end_epoch, by which the weight reaches 0"),
        (
            {"decay_epoch": 9, "end_epoch": 9},
            "losses.kd.decay_epoch is 9; it must be at least start_epoch, 0, and less than end_epoch, 9",
        ),
    ],
)
def test_weight_that_cannot_fall(settings, text):
    with pytest.raises(UserError, match=f"^{text}$"):
        Objective.create({"kd": settings}, num_classes=3)
