"""`category_structure_loss` and the objective around it against values and gradients of the released code."""

import jax
import numpy as np
import pytest

from cskd_jax.losses import category_structure_loss, cross_entropy_loss, mse_logits_loss

TERMS = (
    "intra_feature",
    "intra_logits",
    "compactness",
    "inter_feature",
    "inter_logits",
    "intra",
    "inter",
    "category",
)


def total_loss(student_features, student_logits, case):
    """The released code's objective: SPEC of variant `reference` with cross-entropy and MSE of logits."""
    category, terms = category_structure_loss(
        student_features,
        case["teacher_features"],
        case["labels"],
        num_classes=int(case["num_classes"]),
        student_logits=student_logits,
        teacher_logits=case["teacher_logits"],
        variant="reference",
        filter_misclassified=bool(case["filter_misclassified"]),
    )
    terms["cross_entropy"] = cross_entropy_loss(student_logits, case["labels"])
    terms["kd"] = 1e-5 * mse_logits_loss(student_logits, case["teacher_logits"])
    terms["total"] = 0.9 * terms["cross_entropy"] + category + 0.1 * terms["kd"]
    return terms


@pytest.fixture(
    params=[
        pytest.param(False, id="eager", marks=[pytest.mark.slow, pytest.mark.exhaustive]),
        pytest.param(True, id="jit"),
    ]
)
def gradients(request):
    """Function from (case, name of a term) to (terms, gradients), jitted and not."""

    def compute(case, of):
        def scalar(features, logits):
            terms = total_loss(features, logits, case)
            return terms[of], terms

        function = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)
        if request.param:
            function = jax.jit(function)
            (_, terms), grads = function(case["student_features"], case["student_logits"])
        else:
            with jax.disable_jit():
                (_, terms), grads = function(case["student_features"], case["student_logits"])
        return terms, grads

    return compute


def load(path):
    with np.load(path) as file:
        return dict(file)


@pytest.mark.slow
def test_terms(loss_file, gradients):
    case = load(loss_file)
    terms, _ = gradients(case, "total")
    for name in (*TERMS, "cross_entropy", "kd", "total"):
        # A squared difference of cosines that should be 0 is the square of float32's rounding in the golden file.
        np.testing.assert_allclose(terms[name], case[name], rtol=1e-5, atol=1e-13, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["category", "total"])
def test_gradients(loss_file, gradients, of):
    case = load(loss_file)
    _, grads = gradients(case, of)
    for grad, name in zip(grads, ("student_features", "student_logits"), strict=True):
        expected = case[f"grad_{of}_{name}"]
        # Relative to the largest element: single elements near 0 hold no digits in float32.
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(), err_msg=name)


def test_there_are_files(golden_dir):
    assert list((golden_dir / "loss").glob("*.npz")), f"no golden files in {golden_dir}"
