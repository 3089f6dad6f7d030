"""Contrastive distillation against plain loops, its memory, degenerate inputs, and several devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, ContrastMemory, contrastive_loss
from cskd_jax.losses.crd import draw_negatives, new_contrast_memory, remember
from cskd_jax.training.checkpoint import Checkpoints
from cskd_jax.training.saved import Record
from tests.method_checks import (
    BATCH,
    NUM_CLASSES,
    NUM_EXAMPLES,
    any_number_of_devices,
    assert_close,
    assert_finite,
    assert_same_on_devices,
    create,
    evaluate,
    finite_differences,
    make_inputs,
    train,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEMPERATURE = 0.3
SIZE = 3
LOSSES_OF_TRAINING = {"cross_entropy": {"weight": 1.0}, "crd": {"weight": 0.8, "embedding_size": 5}}


@functools.cache
def on_one_device():
    """States and metrics of four steps."""
    return train(LOSSES_OF_TRAINING, steps=4)


@jax.jit
def loss_and_gradients(student, teacher, *arguments):
    def loss(student, teacher):
        value, terms, normalizers = contrastive_loss(student, teacher, *arguments, temperature=TEMPERATURE)
        return value, (terms, normalizers)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(student, teacher)


def nce(anchor, bank, log_normalizer, index, label, labels, negatives):
    """Sum over one sample's positive and negatives, with probabilities that are normalized over the N examples."""
    num_examples = len(bank)

    noise = len(negatives) / num_examples

    def posteriors(j):
        probability = np.exp(np.sum(anchor * bank[j]) / TEMPERATURE) / (np.exp(log_normalizer) * num_examples)
        return np.array([probability, noise]) / (probability + noise + 1e-7)

    allowed = [j for j in negatives if labels[j] != label and j != index]
    value = -np.log(posteriors(index)[0])
    for j in allowed:
        value -= len(negatives) / len(allowed) * np.log(posteriors(j)[1])
    return value


def normalizer(anchors, bank, labels_of_batch, indices, labels, negatives):
    """ln of the mean of exp(score / T): each sample's mean over its positive and K draws from the allowed negatives."""
    means = []
    for i, anchor in enumerate(anchors):
        scores = np.exp(bank @ anchor / TEMPERATURE)
        allowed = [j for j in negatives[i] if labels[j] != labels_of_batch[i] and j != indices[i]]
        num = len(negatives[i]) if allowed else 0
        total = scores[indices[i]] + (num * np.mean([scores[j] for j in allowed]) if allowed else 0)
        means.append(total / (1 + num))
    return np.log(np.mean(means))


def oracle(student, teacher, memory, labels, indices, negatives):
    """(value, terms, log_normalizers)."""
    terms, normalizers = {}, []
    for i, (name, anchors, bank) in enumerate(
        (("student", student, memory.teacher), ("teacher", teacher, memory.student))
    ):
        known = memory.log_normalizers[i]
        if np.isneginf(known):
            known = normalizer(anchors, bank, labels, indices, memory.labels, negatives)
        normalizers.append(known)
        samples = zip(anchors, indices, labels, negatives, strict=True)
        terms[name] = np.mean([nce(a, bank, known, j, y, memory.labels, n) for a, j, y, n in samples])
    return terms["student"] + terms["teacher"], terms, np.array(normalizers)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_arguments(dtype=np.float64, log_normalizers=(0.4, -0.3)):
    """Some examples have not been seen yet; a category is drawn often for a sample of its own."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 4).astype(np.int32)
    indices = np.array([5, 0, 7, 2], np.int32)
    memory_labels = rng.integers(-1, 3, 10).astype(np.int32)
    memory_labels[indices] = labels
    banks = unit(rng.normal(size=(2, 10, SIZE))).astype(dtype)
    memory = ContrastMemory(*banks, memory_labels, np.array(log_normalizers, dtype))
    embeddings = unit(rng.normal(size=(2, 4, SIZE))).astype(dtype)
    negatives = rng.integers(0, 10, (4, 6)).astype(np.int32)
    return *embeddings, memory, labels, indices, negatives


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("log_normalizers", [(0.4, -0.3), (-np.inf, -np.inf)], ids=["known", "estimated"])
def test_values_and_gradients(log_normalizers):
    arguments = make_arguments(log_normalizers=log_normalizers)
    expected, expected_terms, normalizers = oracle(*arguments)
    (value, (terms, actual_normalizers)), gradients = loss_and_gradients(*arguments)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert_close((terms, actual_normalizers), (expected_terms, normalizers), 1e-12)
    # The normalizers are constants even in the step that estimates them.
    fixed = arguments[2]._replace(log_normalizers=normalizers), *arguments[3:]
    student, teacher = arguments[:2]
    assert_close(gradients[0], finite_differences(lambda x: oracle(x, teacher, *fixed)[0], student), 1e-6)
    assert_close(gradients[1], finite_differences(lambda x: oracle(student, x, *fixed)[0], teacher), 1e-6)


def test_the_arguments_exercise_the_exclusion():
    *_, memory, labels, indices, negatives = make_arguments()
    known = memory.labels[negatives]
    assert (known == labels[:, None]).any()
    assert (known == -1).any()
    assert (negatives == indices[:, None]).any()


def test_excluded_negatives_do_not_matter():
    student, teacher, memory, labels, indices, negatives = make_arguments(np.float32)
    excluded = memory.labels == labels[0]
    excluded[indices[0]] = False
    bank = np.where(excluded[:, None], -memory.teacher, memory.teacher)
    changed = memory._replace(teacher=bank)
    first = [
        loss_and_gradients(student[:1], teacher[:1], m, labels[:1], indices[:1], negatives[:1])[0][0]
        for m in (memory, changed)
    ]
    assert first[0] == first[1]


def test_no_negative_is_allowed():
    student, teacher, memory, labels, indices, negatives = make_arguments(np.float32, (-np.inf, -np.inf))
    memory = memory._replace(labels=np.zeros_like(memory.labels))
    assert_finite(loss_and_gradients(student, teacher, memory, np.zeros_like(labels), indices, negatives))


def test_zero_embeddings_are_finite():
    student, teacher, *rest = make_arguments(np.float32, (-np.inf, -np.inf))
    assert_finite(loss_and_gradients(np.zeros_like(student), np.zeros_like(teacher), *rest))


def test_low_temperature_is_finite():
    loss = jax.jit(functools.partial(contrastive_loss, temperature=1e-3))
    assert_finite(loss(*make_arguments(np.float32, (-np.inf, -np.inf))))


@pytest.mark.usefixtures("x64")
def test_remember():
    student, teacher, memory, _, indices, _ = make_arguments()
    new = remember(memory, student, teacher, indices, momentum=0.25)
    for bank, old, embedding in ((new.student, memory.student, student), (new.teacher, memory.teacher, teacher)):
        expected = old.copy()
        for i, j in enumerate(indices):
            expected[j] = unit(0.25 * old[j] + 0.75 * embedding[i])
        np.testing.assert_allclose(bank, expected, rtol=1e-12)


def test_negatives_are_uniform_and_belong_to_their_position():
    key = jax.random.PRNGKey(0)
    negatives = np.asarray(draw_negatives(key, jnp.arange(4), 5000, 10))
    assert negatives.shape == (4, 5000)
    counts = np.bincount(negatives.ravel(), minlength=10)
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
    np.testing.assert_array_equal(draw_negatives(key, jnp.array([2, 0]), 5000, 10), negatives[[2, 0]])
    assert (negatives[0] != negatives[1]).mean() > 0.8


def test_new_memory():
    memory = new_contrast_memory(jax.random.PRNGKey(0), 50, 8)
    for bank in memory[:2]:
        np.testing.assert_allclose(np.linalg.norm(bank, axis=1), 1, rtol=1e-6)
        assert np.abs(bank.mean(0)).max() < 0.2
    assert (memory.labels == -1).all()
    assert np.isneginf(memory.log_normalizers).all()


# The method.


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_method():
    inputs = make_inputs()
    method, variables = create(LOSSES["crd"], inputs, embedding_size=SIZE, temperature=TEMPERATURE, num_negatives=9)
    old = ContrastMemory(**variables["memory"]["contrast"])
    result, _, new = evaluate(method, variables, inputs)
    new = ContrastMemory(**new["contrast"])

    params = variables["params"]
    student, teacher = (
        unit(x @ params[name]["kernel"] + params[name]["bias"])
        for name, x in (("student", inputs.student.embedding), ("teacher", inputs.teacher.embedding))
    )
    labels = np.full(NUM_EXAMPLES, -1)
    labels[inputs.indices] = inputs.labels
    negatives = np.asarray(draw_negatives(inputs.key, jnp.arange(BATCH), 9, NUM_EXAMPLES))
    old = ContrastMemory(*(np.asarray(x) for x in old))._replace(labels=labels)
    expected, _, normalizers = oracle(student, teacher, old, inputs.labels, inputs.indices, negatives)
    np.testing.assert_allclose(result["value"], expected, rtol=1e-10)
    np.testing.assert_array_equal(new.labels, labels)
    np.testing.assert_allclose(new.log_normalizers, normalizers, rtol=1e-10)
    remembered = remember(old, student, teacher, inputs.indices, momentum=0.5)
    assert_close(new[:2], remembered[:2])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@any_number_of_devices
def test_any_number_of_devices(devices):
    inputs = make_inputs()
    method, variables = create(LOSSES["crd"], inputs, embedding_size=SIZE)
    assert_same_on_devices(method, variables, inputs, devices)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_training_on_several_devices():
    (*states, _), (*metrics, _) = on_one_device()
    other_states, other_metrics = train(LOSSES_OF_TRAINING, num_devices=4)
    assert_close(other_states[-1].memory, states[-1].memory)
    assert_close((other_states[-1].params, other_metrics), (states[-1].params, metrics))
    for leaf in jax.tree.leaves(other_states[-1].memory):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 4
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_training_step_updates_the_memory():
    states, metrics = on_one_device()
    memories = [ContrastMemory(**state.memory["crd"]["contrast"]) for state in states]
    assert memories[0].student.shape == memories[0].teacher.shape == (NUM_EXAMPLES, 5)
    seen = [int((memory.labels >= 0).sum()) for memory in memories]
    assert seen == [0, 8, 16, 24, 24]
    for before, after in itertools.pairwise(memories):
        changed = (np.asarray(before.student) != after.student).any(1)
        assert changed.sum() == BATCH
        np.testing.assert_array_equal(changed, (np.asarray(before.teacher) != after.teacher).any(1))
    assert np.isneginf(memories[0].log_normalizers).all()
    assert np.isfinite(memories[1].log_normalizers).all()
    np.testing.assert_array_equal(memories[4].log_normalizers, memories[1].log_normalizers)
    assert_finite(metrics)
    params = [state.params["losses"]["crd"] for state in states]
    for name in ("student", "teacher"):
        assert (np.asarray(params[0][name]["kernel"]) != params[1][name]["kernel"]).any()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_memory_is_saved_with_the_state(tmp_path):
    state = on_one_device()[0][-1]
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(4, state, Record({"name": "small"}, channels=2))
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        restored, _ = checkpoints.restore(lambda step: jax.eval_shape(lambda: state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.slow
def test_a_method_without_memory_leaves_none():
    states, _ = train({"cross_entropy": {"weight": 1.0}}, steps=1, dtype=jnp.float32)
    assert [state.memory for state in states] == [{}, {}]


def test_method_needs_indices_and_key():
    inputs = make_inputs(dtype=np.float32)
    for missing in ("indices", "key"):
        with pytest.raises(ValueError, match="it needs their indices and a key"):
            create(LOSSES["crd"], inputs._replace(**{missing: None}))


def test_batches_without_positions():
    with pytest.raises(ValueError, match="it cannot use batches made by a function: give train as arrays"):
        new_contrast_memory(jax.random.PRNGKey(0), 0, 4)


def test_split_of_one_example():
    with pytest.raises(ValueError, match="it needs at least 2, got 1"):
        LOSSES["crd"](num_classes=NUM_CLASSES, num_examples=1).init(jax.random.key(0), make_inputs(dtype=np.float32))


def test_wrong_values():
    student, teacher, memory, labels, indices, negatives = make_arguments(np.float32)
    with pytest.raises(
        ValueError, match=r"shapes must be equal, got student_embedding \(4, 3\), teacher_em.* \(4, 2\)"
    ):
        contrastive_loss(student, teacher[:, :2], memory, labels, indices, negatives)
    with pytest.raises(ValueError, match=r"must be equal, got .*negatives \(3, 6\)"):
        contrastive_loss(student, teacher, memory, labels, indices, negatives[:3])
    with pytest.raises(ValueError, match="temperature must be greater than 0, got 0"):
        contrastive_loss(student, teacher, memory, labels, indices, negatives, temperature=0)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        remember(memory, student, teacher, indices, momentum=1)
    with pytest.raises(TypeError, match="labels must have an integer dtype, got float32"):
        contrastive_loss(student, teacher, memory, labels.astype(np.float32), indices, negatives)
