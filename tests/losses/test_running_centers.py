"""Centers that remember earlier batches: against an oracle, over devices, in the state of a method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, RunningCenters, category_structure_loss, running_category_structure_loss
from tests.method_checks import (
    NUM_CLASSES,
    any_number_of_devices,
    assert_close,
    assert_finite,
    assert_same_on_devices,
    create,
    evaluate,
    make_inputs,
    train,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
C, D = 6, 5
SETTINGS = {"variant": "reference", "filter_misclassified": False, "center_momentum": 0.8}


def batches(number=4, size=8, seed=0):
    """(student, teacher, labels) of some batches, with singletons and categories that come late or never."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        yield rng.normal(size=(size, D)), rng.normal(size=(size, D)), rng.integers(0, C - 1, size).astype(np.int32)


def oracle(momentum, variant):
    """(intra_feature, inter_feature) of each batch, by loops."""
    running, weight = {}, {}
    for student, teacher, labels in batches():
        categories = sorted(set(labels.tolist()))
        for c in categories:
            for name, features in (("s", student), ("t", teacher)):
                mean = features[labels == c].mean(0)
                running[name, c] = momentum * running.get((name, c), 0.0) + (1 - momentum) * mean
            weight[c] = momentum * weight.get(c, 0.0) + 1 - momentum
        center = {key: value / weight[key[1]] for key, value in running.items()}
        deviations = [
            (teacher[j] - center["t", c]) - (student[j] - center["s", c]) for j, c in enumerate(labels.tolist())
        ]
        units = {name: [center[name, c] / np.linalg.norm(center[name, c]) for c in categories] for name in "st"}
        cosines = {name: np.array([[a @ b for b in rows] for a in rows]) for name, rows in units.items()}
        difference = cosines["t"] - cosines["s"]
        if variant == "paper":
            norms = [np.linalg.norm([d for d, y in zip(deviations, labels, strict=True) if y == c]) for c in categories]
            yield np.mean(norms), np.linalg.norm(difference)
        else:
            yield np.mean(np.square(deviations)) / D, np.mean(np.square(difference)) / len(categories)


def run(momentum, variant, num_classes=C, labels_as=lambda labels: labels):
    """Terms of each batch, and the running centers after the last."""
    running, terms = RunningCenters.zeros(num_classes, D, jnp.float64), []
    for student, teacher, labels in batches():
        arguments = {"momentum": momentum, "num_classes": num_classes, "variant": variant}
        _, found, running = running_category_structure_loss(student, teacher, labels_as(labels), running, **arguments)
        terms.append((float(found["intra_feature"]), float(found["inter_feature"])))
    return terms, running


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_values(variant, momentum):
    np.testing.assert_allclose(run(momentum, variant)[0], list(oracle(momentum, variant)), rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_many_categories_are_like_few():
    """With more categories than samples the slots are others than the categories."""
    terms, running = run(0.9, "paper", num_classes=1000, labels_as=lambda labels: 7 * labels + 900)
    expected, few = run(0.9, "paper")
    np.testing.assert_allclose(terms, expected, rtol=1e-10)
    assert_close(jax.tree.map(lambda x: x[900 + 7 * np.arange(C)], running), few)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_without_momentum_or_memory_it_is_the_loss_of_the_batch():
    student, teacher, labels = next(batches())
    zeros = RunningCenters.zeros(C, D, jnp.float64)

    def of_the_batch(student):
        return category_structure_loss(student, teacher, labels, num_classes=C, variant="paper")[0]

    expected = jax.value_and_grad(of_the_batch)(student)
    for momentum in (0.0, 0.9):

        def running(student, momentum=momentum):
            arguments = {"momentum": momentum, "num_classes": C, "variant": "paper"}
            return running_category_structure_loss(student, teacher, labels, zeros, **arguments)[0]

        assert_close(jax.value_and_grad(running)(student), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_sample_alone_in_its_category_is_taught():
    student, teacher, _ = next(batches())
    labels = np.arange(8, dtype=np.int32)
    running = RunningCenters(*(np.random.default_rng(1).normal(size=(8, D)) for _ in range(2)), np.ones(8))
    settings = {"num_classes": 8, "variant": "paper", "inter_weight": 0.0}

    def loss(student):
        return running_category_structure_loss(student, teacher, labels, running, momentum=0.9, **settings)[0]

    assert not jax.grad(lambda s: category_structure_loss(s, teacher, labels, **settings)[0])(student).any()
    assert np.abs(jax.grad(loss)(student)).min(axis=1).max() > 0


def test_a_category_seen_rarely_is_not_drawn_to_zero():
    running = RunningCenters.zeros(2, 1)
    for value in (4.0, 6.0):
        features = jnp.array([[value]])
        label = jnp.array([1])
        running = running_category_structure_loss(features, features, label, running, momentum=0.9, num_classes=2)[2]
    assert running.weights.tolist() == pytest.approx([0, 0.19])
    assert float(running.student[1, 0]) == pytest.approx((0.9 * 4 + 6) / 1.9)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", ["paper", "reference"])
@any_number_of_devices
def test_any_number_of_devices(variant, devices):
    inputs = make_inputs()
    settings = SETTINGS | ({"variant": "paper", "filter_misclassified": None} if variant == "paper" else {})
    method, variables = create(LOSSES["category_structure"], inputs, **settings)
    centers = {
        name: np.random.default_rng(3).uniform(0.1, 1, x.shape) for name, x in variables["memory"]["centers"].items()
    }
    assert_same_on_devices(method, variables | {"memory": {"centers": centers}}, inputs, devices)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_training_step_updates_the_memory():
    states, metrics = train({"category_structure": {"weight": 1.0, **SETTINGS}, "cross_entropy": {"weight": 1.0}})
    weights = [np.asarray(state.memory["category_structure"]["centers"]["weights"]) for state in states]
    assert not weights[0].any()
    assert (np.diff(weights, axis=0) >= 0).all()
    assert weights[-1].max() == pytest.approx(1 - 0.8**3)
    assert_finite(metrics)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"num_classes": 5}, r"running centers must have shapes \(\(5, 5\), \(5, 5\), \(5,\)\)"),
        ({"variant": "paper", "compactness_weight": 0.1}, "apply only to variant 'reference'"),
    ],
)
def test_errors(changes, text):
    student, teacher, labels = (jnp.asarray(x) for x in next(batches()))
    arguments = {"momentum": 0.9, "num_classes": C} | changes
    with pytest.raises(ValueError, match=text):
        running_category_structure_loss(
            student.astype(jnp.float32), teacher.astype(jnp.float32), labels, RunningCenters.zeros(C, D), **arguments
        )


@pytest.mark.parametrize("filtered", [True, None])
def test_the_filter_is_refused(filtered):
    """Also where it is not set, since that turns it on."""
    inputs = make_inputs(dtype=np.float32)
    with pytest.raises(ValueError, match="center_momentum needs filter_misclassified=False"):
        create(LOSSES["category_structure"], inputs, **SETTINGS | {"filter_misclassified": filtered})


def test_degenerate_inputs_are_finite():
    loss = jax.jit(
        jax.grad(lambda s, t, y, r: running_category_structure_loss(s, t, y, r, momentum=0.9, num_classes=C)[0])
    )
    _, teacher, labels = next(batches())
    for student in (np.zeros((8, D), np.float32), np.full((8, D), 1e4, np.float32)):
        for same in (labels, np.zeros_like(labels)):
            assert_finite(loss(student, teacher.astype(np.float32), same, RunningCenters.zeros(C, D)))


def test_evaluation_of_the_method_keeps_shapes():
    inputs = make_inputs(dtype=np.float32)
    method, variables = create(LOSSES["category_structure"], inputs, **SETTINGS)
    _, _, memory = evaluate(method, variables, inputs)
    assert memory["centers"]["weights"].shape == (NUM_CLASSES,)
    assert jax.tree.map(jnp.shape, memory) == jax.tree.map(jnp.shape, variables["memory"])
