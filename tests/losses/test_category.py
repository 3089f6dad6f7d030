"""`category_structure_loss` and its parts against plain loops, on degenerate batches, and over several devices."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import (
    LOSSES,
    CategoryStructure,
    LossInputs,
    category_centers,
    category_index,
    category_structure_loss,
    inter_category_structure,
    intra_category_structure,
)
from tests.tiers import chosen

# name -> the arguments that choose it; "no_logits" is what is left of `reference` without its logit terms.
SETTINGS = {
    "paper": {"variant": "paper"},
    "reference": {"variant": "reference"},
    "unfiltered": {"variant": "reference", "filter_misclassified": False},
}
ARRAYS = ("student_features", "teacher_features", "labels", "student_logits", "teacher_logits")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nothing here runs long enough to be worth optimizing; the golden tests run what is optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# The oracle: the equations, sample by sample and pair by pair.


def center_of(features, labels, category, allowed=None):
    rows = [f for j, f in enumerate(features) if labels[j] == category and (allowed is None or allowed[j])]
    return sum(rows) / len(rows) if rows else None


def deviations(features, labels, detached, allowed=None):
    """F_j - P_j with the centers P taken from `detached`; a sample whose category has no center is its own."""
    result = np.empty_like(features)
    for j, feature in enumerate(features):
        center = center_of(detached, labels, labels[j], allowed)
        result[j] = feature - (detached[j] if center is None else center)
    return result


def cosines(features, labels):
    categories = sorted(set(labels.tolist()))
    result = np.zeros((len(categories), len(categories)))
    for row, i in enumerate(categories):
        for column, k in enumerate(categories):
            a, b = center_of(features, labels, i), center_of(features, labels, k)
            norms = np.sqrt(np.sum(a * a)) * np.sqrt(np.sum(b * b))
            result[row, column] = np.sum(a * b) / norms if norms > 0 else 0.0
    return result


def paper_oracle(fs, ft, labels, intra_weight=0.01, inter_weight=0.2):
    categories = sorted(set(labels.tolist()))
    intra = 0.0
    for i in categories:
        squares = 0.0
        for j in np.flatnonzero(labels == i):
            difference = (ft[j] - center_of(ft, labels, i)) - (fs[j] - center_of(fs, labels, i))
            squares += np.sum(difference**2)
        intra += np.sqrt(squares) / len(categories)
    inter = np.sqrt(np.sum((cosines(ft, labels) - cosines(fs, labels)) ** 2))
    terms = {"intra_feature": intra, "inter_feature": inter}
    terms |= {"intra": intra_weight * intra, "inter": inter_weight * inter}
    return terms | {"category": terms["intra"] + terms["inter"]}


def reference_oracle(fs, ft, labels, zs, zt, *, filtered=True, detached, intra_weight=0.002, inter_weight=0.04,
                     compactness_weight=0.1):  # fmt: skip
    """`detached` is (fs, zs) as the non-differentiated centers see them."""
    fs_fixed, zs_fixed = detached
    num_categories = len(set(labels.tolist()))
    correct_s = np.argmax(zs_fixed, axis=1) == labels if filtered else None
    correct_t = np.argmax(zt, axis=1) == labels if filtered else None
    feature_difference = deviations(ft, labels, ft, correct_t) - deviations(fs, labels, fs_fixed, correct_s)
    logit_deviation = deviations(zs, labels, zs_fixed)
    terms = {
        "intra_feature": np.mean(feature_difference**2) / fs.shape[1],
        "intra_logits": np.mean((deviations(zt, labels, zt) - logit_deviation) ** 2) / zs.shape[1],
        "compactness": np.mean(logit_deviation**2),
        "inter_feature": np.mean((cosines(ft, labels) - cosines(fs, labels)) ** 2) / num_categories,
        "inter_logits": np.mean((cosines(zt, labels) - cosines(zs, labels)) ** 2) / num_categories,
    }
    intra = intra_weight * (terms["intra_feature"] + terms["intra_logits"]) + compactness_weight * terms["compactness"]
    inter = inter_weight * (terms["inter_feature"] + terms["inter_logits"])
    return terms | {"intra": intra, "inter": inter, "category": intra + inter}


def oracle(setting, batch, detached=None):
    fs, ft, labels, zs, zt = (batch[name] for name in ARRAYS)
    fs, ft = fs.reshape(len(fs), -1), ft.reshape(len(ft), -1)
    if setting == "paper":
        return paper_oracle(fs, ft, labels)
    fixed = detached or batch
    fixed = fixed["student_features"].reshape(len(fs), -1), fixed["student_logits"]
    return reference_oracle(fs, ft, labels, zs, zt, filtered=setting == "reference", detached=fixed)


def finite_differences(function, array, step=1e-6):
    gradient = np.empty_like(array)
    for position in np.ndindex(array.shape):
        above, below = array.copy(), array.copy()
        above[position] += step
        below[position] -= step
        gradient[position] = (function(above) - function(below)) / (2 * step)
    return gradient


NUM_CLASSES = 8


def make_batch(dtype=np.float32):
    """Three samples of category 1, two of 2 and of 3 (which both networks misclassify), one of 4, no others."""
    rng = np.random.default_rng(0)
    labels = np.array([1, 3, 2, 1, 4, 3, 2, 1], np.int32)
    logits = rng.normal(size=(2, len(labels), NUM_CLASSES))
    logits[:, np.arange(len(labels)), labels] += np.where(labels == 3, -9.0, 1.5)
    features = rng.normal(size=(2, len(labels), 2, 1, 3))
    return {
        "student_features": features[0].astype(dtype),
        "teacher_features": features[1].astype(dtype),
        "labels": labels,
        "student_logits": logits[0].astype(dtype),
        "teacher_logits": logits[1].astype(dtype),
    }


def apply_loss(batch, setting, num_classes=NUM_CLASSES, **options):
    """The terms of a batch."""
    return category_structure_loss(**batch, num_classes=num_classes, **SETTINGS[setting], **options)[1]


@functools.cache
def compiled(setting):
    def terms_and_gradients(batch, factors):
        def scalar(features, logits):
            terms = apply_loss(batch | {"student_features": features, "student_logits": logits}, setting)
            return sum(factors.get(name, 0.0) * value for name, value in terms.items()), terms

        gradients, terms = jax.grad(scalar, (0, 1), has_aux=True)(batch["student_features"], batch["student_logits"])
        return terms, gradients

    return jax.jit(terms_and_gradients)


def loss_and_gradients(batch, setting, of="category"):
    """(terms, gradients of term `of` with respect to the student's features and logits)."""
    names = (
        "intra_feature",
        "intra_logits",
        "compactness",
        "inter_feature",
        "inter_logits",
        "intra",
        "inter",
        "category",
    )
    # The term is an argument, so that all the tests of a setting share one compilation.
    return compiled(setting)(batch, {name: float(name == of) for name in names})


def assert_terms_close(terms, expected, rtol, atol=0.0):
    assert set(terms) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(terms[name], value, rtol=rtol, atol=atol, err_msg=name)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all(), tree


# Values and gradients.


@pytest.mark.parametrize("setting", SETTINGS)
def test_values(setting, x64):
    batch = make_batch(np.float64)
    assert_terms_close(loss_and_gradients(batch, setting)[0], oracle(setting, batch), rtol=1e-12)


def test_the_batch_exercises_the_filter():
    batch = make_batch(np.float64)
    filtered, unfiltered = oracle("reference", batch), oracle("unfiltered", batch)
    assert abs(filtered["intra_feature"] - unfiltered["intra_feature"]) > 0.01 * unfiltered["intra_feature"]


@pytest.mark.slow
def test_values_without_jit():
    batch = make_batch()
    with jax.disable_jit():
        terms = apply_loss(batch, "paper")
    assert_terms_close(terms, loss_and_gradients(batch, "paper")[0], rtol=1e-6)


def test_loss_is_the_category_term():
    category, terms = category_structure_loss(**make_batch(), num_classes=NUM_CLASSES)
    assert category.shape == ()
    assert category == terms["category"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients(setting, x64):
    batch = make_batch(np.float64)
    _, gradients = loss_and_gradients(batch, setting)
    for name, gradient in zip(("student_features", "student_logits"), gradients, strict=True):
        expected = finite_differences(
            lambda array, name=name: oracle(setting, batch | {name: array}, detached=batch)["category"], batch[name]
        )
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-9, err_msg=name)


def test_paper_gradient_does_not_depend_on_logits():
    _, (_, gradient) = loss_and_gradients(make_batch(), "paper")
    assert not gradient.any()


@pytest.mark.parametrize("setting", ["paper", "reference"])
def test_teacher_gets_no_gradient(setting):
    batch = make_batch()

    def scalar(features, logits):
        return apply_loss(batch | {"teacher_features": features, "teacher_logits": logits}, setting)["category"]

    for gradient in jax.grad(scalar, argnums=(0, 1))(batch["teacher_features"], batch["teacher_logits"]):
        assert not gradient.any()


def test_default_variant_is_paper():
    batch = make_batch()
    _, terms = category_structure_loss(**batch, num_classes=NUM_CLASSES)
    assert_terms_close(terms, loss_and_gradients(batch, "paper")[0], rtol=1e-6)


def test_default_weights_of_paper():
    terms, _ = loss_and_gradients(make_batch(), "paper")
    np.testing.assert_allclose(terms["intra"], 0.01 * terms["intra_feature"], rtol=1e-6)
    np.testing.assert_allclose(terms["inter"], 0.2 * terms["inter_feature"], rtol=1e-6)


def test_default_weights_of_reference():
    terms, _ = loss_and_gradients(make_batch(), "reference")
    intra = 0.002 * (terms["intra_feature"] + terms["intra_logits"]) + 0.1 * terms["compactness"]
    inter = 0.04 * (terms["inter_feature"] + terms["inter_logits"])
    np.testing.assert_allclose([terms["intra"], terms["inter"]], [intra, inter], rtol=1e-6)


def test_weights_scale_the_terms_of_paper():
    terms = apply_loss(make_batch(), "paper", intra_weight=3.0, inter_weight=7.0)
    np.testing.assert_allclose(terms["intra"], 3 * terms["intra_feature"], rtol=1e-6)
    np.testing.assert_allclose(terms["inter"], 7 * terms["inter_feature"], rtol=1e-6)


# 0.0 must not be taken for "not given".
@pytest.mark.parametrize("weights", [(3.0, 7.0, 5.0), (0.0, 0.0, 0.0)])
def test_weights_scale_the_terms_of_reference(weights):
    names = ("intra_weight", "inter_weight", "compactness_weight")
    terms = apply_loss(make_batch(), "reference", **dict(zip(names, weights, strict=True)))
    intra = weights[0] * (terms["intra_feature"] + terms["intra_logits"]) + weights[2] * terms["compactness"]
    inter = weights[1] * (terms["inter_feature"] + terms["inter_logits"])
    expected = [intra, inter, intra + inter]
    np.testing.assert_allclose([terms["intra"], terms["inter"], terms["category"]], expected, rtol=1e-6)


def test_unfiltered_reference_without_logits_leaves_their_terms_out():
    batch = make_batch()
    expected, _ = loss_and_gradients(batch, "unfiltered")
    terms = apply_loss(batch | {"student_logits": None, "teacher_logits": None}, "unfiltered")
    assert set(terms) == {"intra_feature", "inter_feature", "intra", "inter", "category"}
    np.testing.assert_allclose(terms["intra"], 0.002 * expected["intra_feature"], rtol=1e-6)
    np.testing.assert_allclose(terms["inter"], 0.04 * expected["inter_feature"], rtol=1e-6)


def spread_labels(batch):
    """The labels 1 to 4 of a batch become labels of 30 categories."""
    return np.array([3, 8, 12, 20, 29], np.int32)[batch["labels"]]


def test_many_categories_are_like_relabeled_few(x64):
    batch = make_batch(np.float64)
    wide = batch | {"labels": spread_labels(batch), "student_logits": None, "teacher_logits": None}
    terms = apply_loss(wide, "paper", num_classes=30)
    assert_terms_close(terms, loss_and_gradients(batch, "paper")[0], rtol=1e-12)


def test_many_categories_with_their_logits(x64):
    batch = make_batch(np.float64)
    wide = batch | {"labels": spread_labels(batch)}
    rng = np.random.default_rng(2)
    for name in ("student_logits", "teacher_logits"):
        wide[name] = rng.normal(size=(8, 30))
        wide[name][:4, wide["labels"][:4]] += 9
    terms = apply_loss(wide, "reference", num_classes=30)
    assert_terms_close(terms, oracle("reference", wide), rtol=1e-10)


# Degenerate batches.


def absent_categories(batch):
    batch["labels"][:] = [0, 0, 3, 3, 0, 3, 0, 3]


def all_singletons(batch):
    batch["labels"][:] = [3, 0, 4, 2, 7, 6, 1, 5]


def one_category(batch):
    batch["labels"][:] = 2


def one_sample(batch):
    for name in batch:
        batch[name] = batch[name][:1]


def zero_student(batch):
    batch["student_features"][:] = 0
    batch["student_logits"][:] = 0


def zero_teacher(batch):
    batch["teacher_features"][:] = 0
    batch["teacher_logits"][:] = 0


def zero_networks(batch):
    zero_student(batch)
    zero_teacher(batch)


def one_center_is_zero(batch):
    for name in ("student_features", "student_logits"):
        batch[name][batch["labels"] == 2] = 0


def all_misclassified(batch):
    for name in ("student_logits", "teacher_logits"):
        batch[name][np.arange(8), batch["labels"]] = -9


def identical_networks(batch):
    batch["student_features"] = batch["teacher_features"].copy()
    batch["student_logits"] = batch["teacher_logits"].copy()


DEGENERATE = (
    absent_categories, all_singletons, one_category, one_sample, zero_student, zero_teacher, zero_networks,
    one_center_is_zero, all_misclassified, identical_networks,
)  # fmt: skip


def degenerate_batch(change):
    batch = make_batch()
    change(batch)
    return batch


@pytest.mark.parametrize("change", DEGENERATE)
@pytest.mark.parametrize("setting", SETTINGS)
def test_degenerate_batch(setting, change):
    batch = degenerate_batch(change)
    terms, gradients = loss_and_gradients(batch, setting)
    assert_finite(gradients)
    expected = oracle(setting, {name: array.astype(np.float64) for name, array in batch.items()})
    assert_terms_close(terms, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("setting", "change", "zeros"),
    [
        ("paper", all_singletons, ["intra_feature"]),
        ("paper", one_category, ["inter_feature"]),
        ("paper", one_sample, ["intra_feature", "inter_feature"]),
        ("paper", zero_networks, ["intra_feature", "inter_feature"]),
        ("reference", one_category, ["inter_feature", "inter_logits"]),
        ("reference", zero_networks, ["category"]),
        ("unfiltered", all_singletons, ["intra_feature", "intra_logits", "compactness"]),
        ("unfiltered", one_sample, ["category"]),
    ],
)
def test_zeros_with_zero_gradients(setting, change, zeros):
    batch = degenerate_batch(change)
    for term in zeros:
        terms, gradients = loss_and_gradients(batch, setting, of=term)
        assert terms[term] == 0, term
        assert not any(gradient.any() for gradient in gradients), term


def test_identical_networks_paper():
    # Exactly 0: the norms are not squared, so that differences by rounding alone would have a gradient of full size.
    terms, gradients = loss_and_gradients(degenerate_batch(identical_networks), "paper")
    assert terms["category"] == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("factor", [0.5, 10.0])
@pytest.mark.parametrize("term", ["intra_feature", "inter_feature"])
def test_paper_counts_rounding_as_zero(term, factor):
    """At half of 8 eps of the norms of what is subtracted all is 0; at ten times as much the gradient is whole."""
    batch = make_batch()
    if term == "intra_feature":
        batch["labels"][:] = 2  # There is one norm then.
    teacher, direction = (batch[f"{name}_features"].astype(np.float64) for name in ("teacher", "student"))

    def networks_apart(step):
        return batch | {"student_features": teacher + step * direction, "teacher_features": teacher}

    structure = teacher if term == "intra_feature" else cosines(teacher.reshape(8, -1), batch["labels"])
    bound = 8 * np.finfo(np.float32).eps * np.sqrt(2) * np.linalg.norm(structure)
    slope = oracle("paper", networks_apart(1e-4))[term] / 1e-4
    batch["student_features"] = networks_apart(factor * bound / slope)["student_features"].astype(np.float32)
    terms, (gradient, _) = loss_and_gradients(batch, "paper", of=term)
    if factor < 1:
        assert terms[term] == 0
        assert not gradient.any()
    else:
        np.testing.assert_allclose(terms[term], factor * bound, rtol=0.05)
        with jax.enable_x64(True):
            wide = {name: array if name == "labels" else array.astype(np.float64) for name, array in batch.items()}
            _, (expected, _) = loss_and_gradients(wide, "paper", of=term)
        np.testing.assert_allclose(gradient, expected, atol=0.05 * np.linalg.norm(expected))
        if term == "intra_feature":
            np.testing.assert_allclose(np.linalg.norm(gradient), 1, rtol=1e-5)


@pytest.mark.parametrize("term", ["intra_feature", "intra_logits", "inter_feature", "inter_logits"])
def test_identical_networks_reference(term):
    terms, gradients = loss_and_gradients(degenerate_batch(identical_networks), "reference", of=term)
    assert terms[term] < 1e-13
    assert all(np.abs(gradient).max() < 1e-7 for gradient in gradients)


def test_zero_student_gets_no_inter_gradient():
    batch = make_batch()
    zero_student(batch)
    terms, gradients = loss_and_gradients(batch, "paper", of="inter_feature")
    assert terms["inter_feature"] > 0
    assert not gradients[0].any()


def test_gradient_flows_through_a_misclassified_student(x64):
    batch = make_batch(np.float64)
    batch["student_logits"][np.arange(8), batch["labels"]] = -9
    _, (gradient, _) = loss_and_gradients(batch, "reference", of="intra_feature")
    fs, ft = (batch[name].reshape(8, -1) for name in ("student_features", "teacher_features"))
    correct = np.argmax(batch["teacher_logits"], axis=1) == batch["labels"]
    # The student's own deviation is 0, its derivative is 1.
    expected = -2 * deviations(ft, batch["labels"], ft, correct) / fs.size / fs.shape[1]
    np.testing.assert_allclose(gradient.reshape(8, -1), expected, rtol=1e-12)


# Types.


@pytest.mark.parametrize("setting", ["paper", "reference"])
def test_bfloat16_is_computed_in_float32(setting):
    batch = {name: jnp.asarray(value) for name, value in make_batch().items()}
    half = {name: value if name == "labels" else value.astype(jnp.bfloat16) for name, value in batch.items()}
    full = {name: value if name == "labels" else value.astype(jnp.float32) for name, value in half.items()}
    terms, expected = apply_loss(half, setting), loss_and_gradients(full, setting)[0]
    assert {value.dtype for value in terms.values()} == {jnp.dtype(jnp.float32)}
    assert_terms_close(terms, expected, rtol=1e-6)


def test_float64_stays_float64(x64):
    terms, _ = loss_and_gradients(make_batch(np.float64), "reference")
    assert {value.dtype for value in terms.values()} == {jnp.dtype(jnp.float64)}


# Errors.


def message(text):
    return "^" + re.escape(text)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"variant": "papers"}, ValueError, "variant must be one of ['paper', 'reference'], got 'papers'"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"student_features": np.ones((8, 6), int)}, TypeError,
         "student_features must have a floating-point dtype, got int"),
        ({"teacher_features": np.ones((8, 6), int)}, TypeError,
         "teacher_features must have a floating-point dtype, got int"),
        ({"student_features": np.ones(8, np.float32)}, ValueError,
         "student_features must have at least 2 dimensions, got shape (8,)"),
        ({"teacher_features": np.ones(8, np.float32)}, ValueError,
         "teacher_features must have at least 2 dimensions, got shape (8,)"),
        ({"teacher_features": np.ones((8, 7), np.float32)}, ValueError,
         "shapes must be equal, got student_features (8, 2, 1, 3), teacher_features (8, 7)"),
        ({"labels": np.ones(8, np.float32)}, TypeError, "labels must have an integer dtype, got float32"),
        ({"labels": np.ones(7, np.int32)}, ValueError,
         "labels must have shape (8,) to match the batch, got (7,)"),
        ({"student_logits": None}, ValueError, "student_logits and teacher_logits must be given together"),
        ({"teacher_logits": None}, ValueError, "student_logits and teacher_logits must be given together"),
        ({"student_logits": np.ones((8, 8), int)}, TypeError,
         "student_logits must have a floating-point dtype, got int"),
        ({"teacher_logits": np.ones((8, 8), int)}, TypeError,
         "teacher_logits must have a floating-point dtype, got int"),
        ({"student_logits": np.ones(8, np.float32)}, ValueError,
         "student_logits must have 2 dimensions, got shape (8,)"),
        ({"teacher_logits": np.ones((8, 6), np.float32)}, ValueError,
         "shapes must be equal, got student_logits (8, 8), teacher_logits (8, 6)"),
        ({"num_classes": 9}, ValueError, "logits must have shape (8, 9): (batch, num_classes), got (8, 8)"),
        ({"filter_misclassified": True}, ValueError,
         "filter_misclassified and compactness_weight apply only to variant 'reference'"),
        ({"compactness_weight": 0.0}, ValueError,
         "filter_misclassified and compactness_weight apply only to variant 'reference'"),
        ({"variant": "reference", "student_logits": None, "teacher_logits": None}, ValueError,
         "variant 'reference' needs student_logits and teacher_logits, or filter_misclassified=False"),
    ],
)  # fmt: skip
def test_errors(changes, error, text):
    with pytest.raises(error, match=message(text)):
        category_structure_loss(**make_batch() | {"num_classes": NUM_CLASSES, "variant": "paper"} | changes)


# Parts.


def test_index_keeps_labels_where_all_categories_fit():
    index = category_index(jnp.array([2, 0, 2, 2]), num_classes=3)
    assert index.slots.tolist() == [2, 0, 2, 2]
    assert index.counts.tolist() == [1, 0, 3]
    assert index.present.tolist() == [True, False, True]


def test_index_has_no_more_slots_than_samples():
    index = category_index(jnp.array([70, 5, 70, 99]), num_classes=100)
    assert index.slots.tolist() == [0, 1, 0, 3]
    assert index.counts.tolist() == [2, 1, 0, 1]
    assert index.present.tolist() == [True, True, False, True]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_narrow_labels(dtype):
    features = jax.random.normal(jax.random.key(0), (300, 4))
    logits = jax.random.normal(jax.random.key(1), (300, 1000))
    labels = jnp.arange(300) % 100

    def terms(labels):
        arguments = {"num_classes": 1000, "student_logits": logits, "teacher_logits": 2 * logits}
        return category_structure_loss(features, 2 * features, labels, variant="reference", **arguments)[1]

    assert jax.tree.map(float, terms(labels.astype(dtype))) == jax.tree.map(float, terms(labels))


def test_centers():
    index = category_index(jnp.array([0, 2, 0]), num_classes=3)
    centers, counts = category_centers(jnp.array([[1.0, 2.0], [5.0, 6.0], [3.0, 8.0]]), index)
    assert centers.tolist() == [[2, 5], [0, 0], [5, 6]]
    assert counts.tolist() == [2, 0, 1]


def test_masked_centers():
    index = category_index(jnp.array([0, 2, 0]), num_classes=3)
    mask = jnp.array([False, False, True])
    centers, counts = category_centers(jnp.array([[1.0, 2.0], [5.0, 6.0], [3.0, 8.0]]), index, mask=mask)
    assert centers.tolist() == [[3, 8], [0, 0], [0, 0]]
    assert counts.tolist() == [1, 0, 0]


def test_intra_structure():
    features, slots = jnp.array([[1.0], [7.0], [5.0]]), jnp.array([0, 1, 0])
    structure = intra_category_structure(features, jnp.array([[3.0], [0.0]]), jnp.array([2.0, 0.0]), slots)
    assert structure.tolist() == [[-2], [0], [2]]


def test_intra_structure_differentiates_the_sample_only():
    def total(features, centers):
        return jnp.sum(intra_category_structure(features, centers, jnp.array([2.0, 0.0]), jnp.array([0, 1, 0])))

    features, centers = jax.grad(total, argnums=(0, 1))(jnp.array([[1.0], [7.0], [5.0]]), jnp.array([[3.0], [0.0]]))
    assert features.tolist() == [[1], [1], [1]]
    assert not centers.any()


def test_inter_structure():
    cosine = inter_category_structure(jnp.array([[3.0, 4.0], [0.0, 0.0], [2.0, 0.0]]))
    np.testing.assert_allclose(cosine, [[1, 0, 0.6], [0, 0, 0], [0.6, 0, 1]], rtol=1e-6)


def test_inter_structure_has_an_exact_diagonal():
    centers = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    cosine = inter_category_structure(jnp.asarray(centers))
    assert (jnp.diagonal(cosine) == 1).all()


def test_inter_structure_gradient(x64):
    rng = np.random.default_rng(0)
    centers, weights = rng.normal(size=(4, 3)), rng.normal(size=(4, 4))

    def total(centers):
        norms = np.sqrt((centers**2).sum(axis=1))
        return np.sum(weights * (centers @ centers.T) / np.outer(norms, norms))

    gradient = jax.jit(jax.grad(lambda centers: jnp.sum(weights * inter_category_structure(centers))))(centers)
    np.testing.assert_allclose(gradient, finite_differences(total, centers), rtol=1e-6, atol=1e-9)


def test_inter_structure_gradient_of_a_zero_center_is_zero():
    centers = jnp.array([[3.0, 4.0], [0.0, 0.0], [2.0, 1.0]])
    gradient = jax.jit(jax.grad(lambda centers: jnp.sum(inter_category_structure(centers) ** 2)))(centers)
    assert_finite(gradient)
    assert not gradient[1].any()
    assert gradient[0].any()


# Memory.


@pytest.mark.slow
def test_memory_does_not_depend_on_num_classes():
    def temporary_bytes(num_classes):
        gradient = jax.jit(jax.grad(functools.partial(category_structure_loss, num_classes=num_classes), has_aux=True))
        features = jax.ShapeDtypeStruct((32, 64), jnp.float32)
        compiled = gradient.lower(features, features, jax.ShapeDtypeStruct((32,), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # With no more categories than samples the labels need not be sorted: that is a few integers a sample.
    assert temporary_bytes(100_000_000) <= temporary_bytes(32) + 32 * 16


# Several devices.

GLOBAL_BATCH = 16
CLASSES = {"few": 5, "many": 40}
INVARIANCE_CASES = [(setting, classes) for setting in SETTINGS for classes in CLASSES]


def sharded_inputs():
    """(weights, data, labels): the outputs of student and teacher are data @ weights; each case has its own weights."""
    rng = np.random.default_rng(1)
    few = rng.integers(1, 5, GLOBAL_BATCH)  # category 0 is absent
    labels = {"few": few.astype(np.int32), "many": (few * 9).astype(np.int32)}
    data = {name: rng.normal(size=(GLOBAL_BATCH, 6)) for name in ("student", "teacher")}
    weights = {}
    for classes, number in CLASSES.items():
        right = rng.random(GLOBAL_BATCH) < 0.7
        hint = np.zeros((GLOBAL_BATCH, number))
        hint[np.flatnonzero(right), labels[classes][right]] = 4
        data[f"hint_{classes}"] = hint
        shared = {"features": rng.normal(size=(6, 4)), "logits": rng.normal(size=(6, number)) / 3}
        weights |= {(setting, classes): shared for setting in SETTINGS}
    return weights, data, labels


def outputs(case, weights, data, labels):
    """The arrays of a case as `category_structure_loss` takes them."""
    batch = {"labels": labels[case[1]]}
    for name in ("student", "teacher"):
        batch[f"{name}_features"] = data[name] @ weights[case]["features"]
        # `unfiltered` is here without its logit terms, which are those of `reference`: less to compile.
        logits = data[name] @ weights[case]["logits"] + data[f"hint_{case[1]}"]
        batch[f"{name}_logits"] = None if case[0] == "unfiltered" else logits
    return batch


def terms_and_gradients(weights, data, labels, axis_name=None):
    """{case: terms} and {case: gradients of its loss}: all cases in one program, which compiles faster than many."""

    def total(weights):
        terms = {
            case: apply_loss(outputs(case, weights, data, labels), case[0], CLASSES[case[1]], axis_name=axis_name)
            for case in INVARIANCE_CASES
        }
        return sum(values["category"] for values in terms.values()), terms

    gradients, terms = jax.grad(total, has_aux=True)(weights)
    return terms, gradients


@functools.cache
def over_devices(num_devices):
    """`terms_and_gradients` averaged over devices that share the global batch; None: without a mapped axis."""
    with jax.enable_x64(True):
        weights, data, labels = sharded_inputs()
        if num_devices is None:
            return jax.device_get(jax.jit(terms_and_gradients)(weights, data, labels))

        def step(weights, data, labels):
            return jax.lax.pmean(terms_and_gradients(weights, data, labels, "devices"), "devices")

        split = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), (data, labels))
        mapped = jax.pmap(step, "devices", in_axes=(None, 0, 0), out_axes=None, devices=jax.devices()[:num_devices])
        return jax.device_get(jax.block_until_ready(mapped(weights, *split)))


@pytest.mark.slow
@pytest.mark.parametrize("classes", CLASSES)
def test_the_sharded_batch_exercises_the_filter(classes):
    filtered, unfiltered = (over_devices(None)[0][setting, classes] for setting in ("reference", "unfiltered"))
    assert abs(filtered["intra_feature"] - unfiltered["intra_feature"]) > 0.01 * unfiltered["intra_feature"]


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", chosen([8, 1, 2, 4], 1))
@pytest.mark.parametrize("case", INVARIANCE_CASES, ids="-".join)
def test_mean_over_devices_is_the_global_loss(case, num_devices):
    terms, expected = over_devices(num_devices)[0][case], over_devices(None)[0][case]
    assert_terms_close(terms, expected, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", chosen([8, 1, 2, 4], 1))
@pytest.mark.parametrize("case", INVARIANCE_CASES, ids="-".join)
def test_mean_gradient_over_devices_is_the_global_gradient(case, num_devices):
    gradients, expected = over_devices(num_devices)[1][case], over_devices(None)[1][case]
    for name in ("features", "logits") if case[0] == "reference" else ("features",):
        assert expected[name].any()
        atol = 1e-10 * np.abs(expected[name]).max()
        np.testing.assert_allclose(gradients[name], expected[name], rtol=1e-10, atol=atol, err_msg=name)


def test_jit_inside_pmap():
    batch = make_batch()
    split = {name: value.reshape(2, 4, *value.shape[1:]) for name, value in batch.items()}
    loss = jax.jit(functools.partial(category_structure_loss, num_classes=NUM_CLASSES, axis_name="devices"))
    mapped = jax.pmap(lambda batch: loss(**batch)[0], "devices", devices=jax.devices()[:2])
    values = jax.block_until_ready(mapped(split))
    expected, _ = loss_and_gradients(batch, "paper")
    np.testing.assert_allclose(np.mean(values), expected["category"], rtol=1e-5)


# The method that configurations name.


def network_output(channels, size=2):
    rng = np.random.default_rng(channels)
    features = rng.normal(size=(8, size, size, channels)).astype(np.float32)
    logits = rng.normal(size=(8, NUM_CLASSES)).astype(np.float32)
    return types.SimpleNamespace(logits=logits, features=(None, features), embedding=None)


def test_method_projects_the_last_map_of_the_student():
    student, teacher = network_output(3), network_output(4)
    inputs = LossInputs(student, teacher, make_batch()["labels"])
    method = LOSSES["category_structure"](num_classes=NUM_CLASSES, inter_weight=3.0)
    variables = method.init(jax.random.key(0), inputs)
    sigma = variables["params"]["sigma"]
    assert sigma.shape == (3, 4)
    value, terms = method.apply(variables, inputs)
    expected, expected_terms = category_structure_loss(
        student.features[-1] @ sigma, teacher.features[-1], inputs.labels, num_classes=NUM_CLASSES, variant="reference",
        student_logits=student.logits, teacher_logits=teacher.logits, inter_weight=3.0,
    )  # fmt: skip
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_terms_close(terms, expected_terms, rtol=1e-6)


@pytest.mark.parametrize("name", ["category_structure", "multilabel_category_structure"])
@pytest.mark.parametrize(("student_size", "teacher_size"), [(4, 2), (2, 4), (3, 2)])
def test_the_larger_map_is_pooled_to_the_smaller(name, student_size, teacher_size):
    """Pooled by the method or before it makes no difference, nor does pooling before or after sigma."""
    student, teacher = network_output(3, student_size), network_output(4, teacher_size)
    labels = make_batch()["labels"]
    labels = labels if name == "category_structure" else np.eye(NUM_CLASSES, dtype=np.float32)[labels]
    pooled = [
        types.SimpleNamespace(**vars(output) | {"features": (None, pool_by_hand(output.features[-1], 2))})
        for output in (student, teacher)
    ]
    method = LOSSES[name](num_classes=NUM_CLASSES)
    variables = method.init(jax.random.key(0), LossInputs(student, teacher, labels))
    assert variables["params"]["sigma"].shape == (3, 4)

    def loss(variables, student, teacher):
        return method.apply(variables, LossInputs(student, teacher, labels))[0]

    value, gradient = jax.value_and_grad(loss)(variables, student, teacher)
    expected, expected_gradient = jax.value_and_grad(loss)(variables, *pooled)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient["params"]["sigma"], expected_gradient["params"]["sigma"], rtol=1e-4, atol=1e-6)


def pool_by_hand(maps, size):
    """Means of the cells of floor(i H / n) to ceil((i + 1) H / n)."""
    height, width = maps.shape[1:3]
    rows, columns = ([(i * n // size, -(-(i + 1) * n // size)) for i in range(size)] for n in (height, width))
    cells = [[maps[:, a:b, c:d].mean(axis=(1, 2)) for c, d in columns] for a, b in rows]
    return np.stack([np.stack(row, axis=1) for row in cells], axis=1)


def test_only_maps_are_pooled():
    student, teacher = network_output(3), network_output(4)
    student.features = (None, np.zeros((8, 9, 3), np.float32))
    text = "the last features of student (8, 9, 3) and teacher (8, 2, 2, 4) differ in size"
    with pytest.raises(ValueError, match=message(text)):
        CategoryStructure(num_classes=NUM_CLASSES).init(
            jax.random.key(0), LossInputs(student, teacher, make_batch()["labels"])
        )


@pytest.mark.parametrize("scale", [1e-10, 1e-14, 1e-19, 1e-30])
def test_inter_structure_of_tiny_centers_has_finite_gradients(scale):
    centers = scale * np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    value, gradient = jax.value_and_grad(lambda c: jnp.sum(inter_category_structure(c) ** 2))(centers)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
