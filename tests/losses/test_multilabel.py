"""`multilabel_category_structure_loss` against plain loops and the single-label loss, and on degenerate batches."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import (
    LossInputs,
    MultilabelCategoryStructure,
    category_structure_loss,
    multilabel_category_structure_loss,
)
from tests.method_checks import any_number_of_devices, assert_same_on_devices, create, finite_differences, make_inputs

VARIANTS = ("paper", "reference")
BATCH, CATEGORIES = 7, 5

pytestmark = pytest.mark.usefixtures("quick_compilation")


def center_of(features, weights):
    return sum(w * f for w, f in zip(weights, features, strict=True)) / sum(weights)


def cosine(a, b):
    norms = np.sqrt(np.sum(a * a)) * np.sqrt(np.sum(b * b))
    return np.sum(a * b) / norms if norms > 0 else 0.0


def oracle(student, teacher, labels, variant):
    """The equations, sample by sample and pair by pair."""
    student, teacher = (f.reshape(len(f), -1) for f in (student, teacher))
    present = [i for i in range(labels.shape[1]) if labels[:, i].sum() > 0]
    centers = {i: (center_of(student, labels[:, i]), center_of(teacher, labels[:, i])) for i in present}
    squares = []
    for i in present:
        center_s, center_t = centers[i]
        deviations = (teacher - center_t) - (student - center_s)
        squares.append(sum(labels[j, i] * np.sum(deviations[j] ** 2) for j in range(len(labels))))
    cosines_s, cosines_t = (
        np.array([[cosine(centers[i][network], centers[k][network]) for k in present] for i in present])
        for network in (0, 1)
    )
    difference = cosines_t - cosines_s
    if variant == "paper":
        intra, inter, weights = np.mean(np.sqrt(squares)), np.sqrt(np.sum(difference**2)), (0.01, 0.2)
    else:
        size = student.shape[1]
        intra, inter = sum(squares) / (size * labels.sum()) / size, np.mean(difference**2) / len(present)
        weights = (0.002, 0.04)
    terms = {"intra_feature": intra, "inter_feature": inter}
    terms |= {"intra": weights[0] * intra, "inter": weights[1] * inter}
    return terms | {"category": terms["intra"] + terms["inter"]}


def make_batch(dtype=np.float32):
    """Maps of both networks, and labels: category 4 has no sample, 3 has one, sample 5 is of none, two have weights."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, BATCH, 2, 1, 3)).astype(dtype)
    labels = np.zeros((BATCH, CATEGORIES), dtype)
    for sample, categories in enumerate([(0, 1), (1,), (0, 1, 2), (2, 3), (0,), (), (2,)]):
        labels[sample, list(categories)] = 1
    labels[1, 1], labels[3, 3] = 0.3, 0.7
    return student, teacher, labels


@functools.cache
def compiled(variant, of):
    def scalar(student, teacher, labels):
        terms = multilabel_category_structure_loss(student, teacher, labels, variant=variant)[1]
        return terms[of], terms

    return jax.jit(jax.grad(scalar, has_aux=True))


def terms_and_gradient(batch, variant, of="category"):
    gradient, terms = compiled(variant, of)(*batch)
    return terms, gradient


def assert_terms_close(terms, expected, rtol, atol=0.0):
    assert set(terms) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("x64")
def test_values_and_gradients(variant):
    student, teacher, labels = make_batch(np.float64)
    terms, gradient = terms_and_gradient((student, teacher, labels), variant)
    assert_terms_close(terms, oracle(student, teacher, labels, variant), rtol=1e-12)
    expected = finite_differences(lambda f: oracle(f, teacher, labels, variant)["category"], student)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_values_without_jit():
    student, teacher, labels = (array[:3] for array in make_batch())
    with jax.disable_jit():
        terms = multilabel_category_structure_loss(student, teacher, labels[:, :2])[1]
    assert_terms_close(terms, multilabel_category_structure_loss(student, teacher, labels[:, :2])[1], rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("classes", [np.array([1, 3, 1, 0, 1, 3, 3]), np.array([4, 4, 4, 4, 4, 4, 4])])
@pytest.mark.usefixtures("x64")
def test_one_hot_rows_are_the_single_label_loss(variant, classes):
    student, teacher, _ = make_batch(np.float64)
    options = {} if variant == "paper" else {"filter_misclassified": False}

    def single(student):
        return category_structure_loss(
            student, teacher, classes.astype(np.int32), num_classes=CATEGORIES, variant=variant, **options
        )

    expected_gradient, expected = jax.jit(jax.grad(single, has_aux=True))(student)
    terms, gradient = terms_and_gradient((student, teacher, np.eye(CATEGORIES)[classes]), variant)
    assert_terms_close(terms, expected, rtol=1e-10, atol=1e-15)
    scale = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("x64")
def test_weight_two_is_the_sample_twice(variant):
    student, teacher, labels = make_batch(np.float64)
    labels[2] *= 2
    once = labels.copy()
    once[2] /= 2
    terms, _ = terms_and_gradient((student, teacher, labels), variant)
    repeated = [np.concatenate([array, array[2:3]]) for array in (student, teacher, once)]
    assert_terms_close(terms, multilabel_category_structure_loss(*repeated, variant=variant)[1], rtol=1e-12)


def test_bool_labels():
    student, teacher, labels = make_batch()
    expected = terms_and_gradient((student, teacher, np.ceil(labels)), "paper")[0]
    assert_terms_close(multilabel_category_structure_loss(student, teacher, labels > 0)[1], expected, rtol=1e-6)


def test_weights_of_the_terms():
    _, terms = multilabel_category_structure_loss(*make_batch(), intra_weight=3.0, inter_weight=0.0)
    np.testing.assert_allclose(terms["intra"], 3 * terms["intra_feature"], rtol=1e-6)
    assert terms["inter"] == 0
    assert terms["category"] == terms["intra"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_neither_teacher_nor_labels_get_a_gradient(variant):
    student, teacher, labels = make_batch()
    loss = functools.partial(multilabel_category_structure_loss, student, variant=variant)
    for gradient in jax.grad(lambda *inputs: loss(*inputs)[0], (0, 1))(teacher, labels):
        assert not gradient.any()


# Degenerate batches.


def no_labels(student, teacher, labels):
    labels[:] = 0


def one_category(student, teacher, labels):
    labels[:] = 0
    labels[:, 2] = 1


def all_categories(student, teacher, labels):
    labels[:] = 1


def tiny_weights(student, teacher, labels):
    labels *= 1e-20


def zero_student(student, teacher, labels):
    student[:] = 0


def zero_teacher(student, teacher, labels):
    teacher[:] = 0


def zero_networks(student, teacher, labels):
    student[:], teacher[:] = 0, 0


def identical_networks(student, teacher, labels):
    student[:] = teacher


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "change",
    [no_labels, one_category, all_categories, tiny_weights, zero_student, zero_teacher, zero_networks,
     identical_networks],
)  # fmt: skip
def test_degenerate_batch(variant, change):
    batch = make_batch()
    change(*batch)
    terms, gradient = terms_and_gradient(batch, variant)
    assert np.isfinite(gradient).all()
    if change in (no_labels, zero_networks, identical_networks):
        assert not any(terms.values())
        assert not gradient.any()
    else:
        expected = oracle(*(array.astype(np.float64) for array in batch), variant)
        # Where all samples are of all categories all cosines are 1 up to rounding.
        assert_terms_close(terms, expected, rtol=1e-4, atol=1e-5 if change is all_categories else 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", [np.ones(6), np.array([0.3, 1e-3, 0.7, 1 / 3, 5.0, 0.1])])
def test_singletons_have_exactly_no_intra_structure(variant, weights):
    """Categories 0 to 5 have one sample each, which shares them with others; category 6 has none."""
    rng = np.random.default_rng(1)
    student, teacher = (1e4 * rng.normal(size=(2, 4, 50))).astype(np.float32)
    labels = np.zeros((4, 7), np.float32)
    labels[[0, 0, 1, 2, 2, 2], range(6)] = weights
    terms, gradient = terms_and_gradient((student, teacher, labels), variant, "intra_feature")
    assert terms["intra_feature"] == 0
    assert not gradient.any()


@pytest.mark.parametrize("factor", [0.5, 10.0])
@pytest.mark.parametrize("term", ["intra_feature", "inter_feature"])
def test_paper_counts_rounding_as_zero(term, factor):
    """At half of 8 eps of the norms of what is subtracted all is 0; at ten times as much the gradient is whole."""
    direction, teacher, labels = (array.astype(np.float64) for array in make_batch())
    if term == "intra_feature":
        labels = labels[:, 1:2]  # There is one norm then.
        norm = np.sqrt(np.sum(labels * np.sum(teacher.reshape(BATCH, -1) ** 2, axis=1, keepdims=True)))
    else:
        centers = [center_of(teacher.reshape(BATCH, -1), column) for column in labels.T if column.any()]
        norm = np.linalg.norm([[cosine(a, b) for a in centers] for b in centers])
    bound = 8 * np.finfo(np.float32).eps * np.sqrt(2) * norm
    slope = oracle(teacher + 1e-4 * direction, teacher, labels, "paper")[term] / 1e-4
    student = teacher + factor * bound / slope * direction
    batch = [array.astype(np.float32) for array in (student, teacher, labels)]
    terms, gradient = terms_and_gradient(batch, "paper", term)
    if factor < 1:
        assert terms[term] == 0
        assert not gradient.any()
    else:
        np.testing.assert_allclose(terms[term], factor * bound, rtol=0.05)
        with jax.enable_x64(True):
            _, expected = terms_and_gradient([array.astype(np.float64) for array in batch], "paper", term)
        np.testing.assert_allclose(gradient, expected, atol=0.05 * np.linalg.norm(expected))


def test_bfloat16_is_computed_in_float32():
    student, teacher, labels = make_batch()
    terms = multilabel_category_structure_loss(*(jnp.asarray(f, jnp.bfloat16) for f in (student, teacher)), labels)[1]
    assert {value.dtype for value in terms.values()} == {jnp.dtype(jnp.float32)}


def test_memory_does_not_hold_the_deviations_from_every_center():
    batch, categories, size = 64, 200, 2048
    gradient = jax.jit(jax.grad(multilabel_category_structure_loss, has_aux=True))
    features = jax.ShapeDtypeStruct((batch, size), jnp.float32)
    compiled = gradient.lower(features, features, jax.ShapeDtypeStruct((batch, categories), jnp.float32)).compile()
    arrays = batch * size + categories * size + batch * categories + categories**2
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * 4 * arrays


# Errors.


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"variant": "papers"}, ValueError, "variant must be one of ['paper', 'reference'], got 'papers'"),
        ({"student_features": np.ones((BATCH, 6), int)}, TypeError,
         "student_features must have a floating-point dtype, got int"),
        ({"teacher_features": np.ones(BATCH, np.float32)}, ValueError,
         "teacher_features must have at least 2 dimensions, got shape (7,)"),
        ({"teacher_features": np.ones((BATCH, 7), np.float32)}, ValueError,
         "shapes must be equal, got student_features (7, 2, 1, 3), teacher_features (7, 7)"),
        ({"labels": np.ones((BATCH, CATEGORIES), np.int32)}, TypeError,
         "multi-label labels must have a floating-point dtype or be bool, got int32"),
        ({"labels": np.ones(BATCH, np.float32)}, ValueError,
         "multi-label labels must have shape (7, classes) to match the batch, got (7,)"),
        ({"labels": np.ones((6, CATEGORIES), np.float32)}, ValueError,
         "multi-label labels must have shape (7, classes) to match the batch, got (6, 5)"),
    ],
)  # fmt: skip
def test_errors(changes, error, text):
    inputs = dict(zip(("student_features", "teacher_features", "labels"), make_batch(), strict=True)) | changes
    with pytest.raises(error, match="^" + re.escape(text)):
        multilabel_category_structure_loss(**inputs)


# The method that configurations name, on several devices.


def multilabel_inputs() -> LossInputs:
    """A category without samples, one with a single sample, and samples without categories, some with weights."""
    inputs = make_inputs()
    labels = np.random.default_rng(3).integers(0, 2, (len(inputs.labels), CATEGORIES)).astype(np.float64)
    labels[:, 1] = 0
    labels[:, 2] = np.arange(len(labels)) == 5
    labels[3] = 0
    labels[4] *= 0.4
    return inputs._replace(labels=labels)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("x64")
@any_number_of_devices
def test_any_number_of_devices(variant, devices):
    inputs = multilabel_inputs()
    method, variables = create(MultilabelCategoryStructure, inputs, variant=variant)
    assert_same_on_devices(method, variables, inputs, devices)


@pytest.mark.usefixtures("x64")
def test_method_projects_the_last_map_of_the_student():
    inputs = multilabel_inputs()
    method, variables = create(MultilabelCategoryStructure, inputs, variant="reference", inter_weight=3.0)
    sigma = variables["params"]["sigma"]
    assert sigma.shape == (6, 10)
    actual = method.apply(variables, inputs)
    student = inputs.student.features[-1] @ sigma
    expected = multilabel_category_structure_loss(
        student, inputs.teacher.features[-1], inputs.labels, variant="reference", inter_weight=3.0
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), actual, expected)
