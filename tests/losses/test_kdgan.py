"""KDGAN against plain loops, who descends and who ascends, degenerate inputs, and several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.losses import LOSSES, kdgan_loss
from cskd_jax.losses.kdgan import reverse_gradient, sample_category
from tests.method_checks import (
    BATCH,
    NUM_CLASSES,
    any_number_of_devices,
    assert_close,
    assert_finite,
    assert_same_on_devices,
    create,
    evaluate,
    finite_differences,
    make_inputs,
    make_output,
    train,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
WEIGHTS = {"student_share": 0.3, "student_distillation": 0.7, "teacher_distillation": 0.2, "temperature": 2.0}
LOSSES_OF_TRAINING = {"cross_entropy": {"weight": 1.0}, "kdgan": {"weight": 1.0, "hidden_size": 7}}


def softmax(logits, temperature=1.0):
    exponentials = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def divergence(target, logits, temperature):
    p, q = softmax(target, temperature), softmax(logits, temperature)
    return temperature**2 * np.mean([sum(a * np.log(a / b)) for a, b in zip(p, q, strict=True)])


def game(scores_true, scores_student, scores_teacher, share):
    total = 0.0
    for true, student, teacher in zip(scores_true, scores_student, scores_teacher, strict=True):
        probability = [1 / (1 + np.exp(-score)) for score in (true, student, teacher)]
        total += np.log(probability[0])
        total += share * np.log(1 - probability[1]) + (1 - share) * np.log(1 - probability[2])
    return total / len(scores_true)


def noise(key, shape):
    """Gumbel noise of student and teacher, sample by sample."""
    keys = jax.random.split(key)
    draws = [
        [jax.random.gumbel(jax.random.fold_in(k, i), shape[1:], jnp.float64) for i in range(shape[0])] for k in keys
    ]
    return np.asarray(draws)


def one_hot(categories):
    return np.eye(NUM_CLASSES)[categories]


def scores(params, embedding, category):
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    hidden = unit @ params["discriminator_embedding"] + category @ params["discriminator_category"]
    hidden = np.maximum(hidden + params["discriminator_bias"], 0)
    return (hidden @ params["discriminator_output"] + params["discriminator_output_bias"])[:, 0]


def jacobian_of_relaxed(noisy, temperature=1.0):
    """d softmax(noisy / temperature) / d noisy, [B, C, C]."""
    p = softmax(noisy, temperature)
    return (np.einsum("bi,ij->bij", p, np.eye(p.shape[1])) - p[:, :, None] * p[:, None, :]) / temperature


class Case:
    """A method on made-up inputs, and the same in numpy."""

    def __init__(self, **fields):
        self.inputs = make_inputs()
        self.method, self.variables = create(LOSSES["kdgan"], self.inputs, hidden_size=6, **WEIGHTS, **fields)
        self.params = jax.tree.map(np.asarray, self.variables["params"])
        self.embedding = self.inputs.teacher.embedding
        self.student_logits = self.inputs.student.logits
        self.teacher_logits = self.logits_of_teacher(self.params["teacher_head"])
        self.noise = noise(self.inputs.key, self.student_logits.shape)

    def logits_of_teacher(self, head):
        return self.inputs.teacher.logits + self.embedding @ head["kernel"] + head["bias"]

    def samples(self):
        logits = self.student_logits, self.teacher_logits
        return [one_hot(np.argmax(z + g, axis=1)) for z, g in zip(logits, self.noise, strict=True)]

    def game(self, params=None, samples=None):
        categories = one_hot(self.inputs.labels), *(samples or self.samples())
        return game(*(scores(params or self.params, self.embedding, y) for y in categories), WEIGHTS["student_share"])

    def divergences(self, student_logits=None, teacher_logits=None):
        """What the student learns (of student_logits), what the teacher learns (of teacher_logits)."""
        student = self.student_logits if student_logits is None else student_logits
        teacher = self.teacher_logits if teacher_logits is None else teacher_logits
        temperature = WEIGHTS["temperature"]
        learned_by_student = divergence(self.teacher_logits, student, temperature)
        return learned_by_student, divergence(self.student_logits, teacher, temperature)

    def gradient_of_logits(self, player):
        """Straight through the sample, and through what the player learns from the other."""
        samples = self.samples()

        def of_sample(sample):
            return self.game(samples=[sample if i == player else samples[i] for i in range(2)])

        logits = (self.student_logits, self.teacher_logits)[player]
        jacobian = jacobian_of_relaxed(logits + self.noise[player])
        gradient = np.einsum("bi,bij->bj", finite_differences(of_sample, samples[player]), jacobian)
        name = ("student_distillation", "teacher_distillation")[player]

        def learned(z):
            return WEIGHTS[name] * self.divergences(**{("student_logits", "teacher_logits")[player]: z})[player]

        return gradient + finite_differences(learned, logits)


@pytest.mark.usefixtures("x64")
def test_values_and_gradients():
    case = Case()
    result, (of_params, of_student, of_teacher), memory = evaluate(case.method, case.variables, case.inputs)
    adversarial, (by_student, by_teacher) = case.game(), case.divergences()
    expected = adversarial + 0.7 * by_student + 0.2 * by_teacher
    terms = {"student_distillation": by_student, "teacher_distillation": by_teacher, "adversarial": adversarial}
    assert_close(result, {"value": expected, "terms": terms})
    assert memory == {}

    # The student descends: its gradient is that of the loss.
    assert_close(of_student.logits, case.gradient_of_logits(0), 1e-6)
    assert not of_student.embedding.any()
    # The head of the teacher descends as well; what it reads is given.
    of_head = case.gradient_of_logits(1)
    assert_close(of_params["teacher_head"]["kernel"], case.embedding.T @ of_head, 1e-6)
    assert_close(of_params["teacher_head"]["bias"], of_head.sum(axis=0), 1e-6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_teacher))
    # The discriminator ascends: its gradient has the other sign.
    for name, gradient in of_params.items():
        if name.startswith("discriminator"):
            other = {key: value for key, value in case.params.items() if key != name}
            ascent = finite_differences(
                lambda x, name=name, other=other: case.game(other | {name: x}), case.params[name]
            )
            assert_close(gradient, -ascent, 1e-6)


def test_reverse_gradient():
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(reverse_gradient(x))))(jnp.array([0.3, -2.0]))
    np.testing.assert_allclose(value, np.sin(0.3) + np.sin(-2.0), rtol=1e-6)
    np.testing.assert_allclose(gradient, -np.cos([0.3, -2.0]), rtol=1e-6)


def test_samples_follow_the_probabilities():
    logits = jnp.tile(jnp.array([[0.0, 1.0, -1.0, 0.5]]), (4000, 1))
    samples = np.asarray(sample_category(jax.random.PRNGKey(0), jnp.arange(4000), logits))
    np.testing.assert_allclose(samples, np.eye(4)[samples.argmax(1)], atol=1e-6)
    np.testing.assert_allclose(samples.mean(0), jax.nn.softmax(logits[0]), atol=0.03)


def test_a_sample_belongs_to_its_position():
    logits, key = jnp.asarray(make_output(1, dtype=np.float32).logits), jax.random.PRNGKey(0)
    samples = sample_category(key, jnp.arange(BATCH), logits)
    swapped = sample_category(key, jnp.array([6, 1]), logits[jnp.array([6, 1])])
    np.testing.assert_array_equal(swapped, samples[jnp.array([6, 1])])


def test_gradient_of_a_sample_is_that_of_the_relaxed_one():
    logits = jnp.asarray(make_output(1, dtype=np.float32).logits)
    key, temperature = jax.random.PRNGKey(0), 0.7
    draws = jnp.stack([jax.random.gumbel(jax.random.fold_in(key, i), (NUM_CLASSES,)) for i in range(BATCH)])
    weights = jnp.asarray(make_output(2, dtype=np.float32).logits)
    gradients = [
        jax.grad(lambda z, f=f: jnp.sum(weights * f(z)))(logits)
        for f in (
            lambda z: sample_category(key, jnp.arange(BATCH), z, temperature=temperature),
            lambda z: jax.nn.softmax((z + draws) / temperature),
        )
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_the_teacher_starts_as_the_given_network():
    inputs = make_inputs(dtype=np.float32)
    method = LOSSES["kdgan"](num_classes=NUM_CLASSES, student_distillation=1.0)
    variables = jax.jit(method.init)(jax.random.PRNGKey(0), inputs)
    _, terms = jax.jit(method.apply)(variables, inputs)
    expected = divergence(inputs.teacher.logits.astype(np.float64), inputs.student.logits.astype(np.float64), 4.0)
    np.testing.assert_allclose(terms["student_distillation"], expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@any_number_of_devices
def test_any_number_of_devices(devices):
    inputs = make_inputs()
    method, variables = create(LOSSES["kdgan"], inputs, hidden_size=6)
    assert_same_on_devices(method, variables, inputs, devices)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_training():
    states, metrics = train(LOSSES_OF_TRAINING, steps=30)
    assert_finite((states[-1], metrics))
    before, after = states[0].params["losses"]["kdgan"], states[-1].params["losses"]["kdgan"]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a != b).any()), before, after))
    other_states, other_metrics = train(LOSSES_OF_TRAINING, steps=3, num_devices=4)
    assert_close((other_states[-1].params, other_metrics), (states[3].params, metrics[:3]))
    # At first the discriminator cannot tell: three coins, of weights 1, 1/2 and 1/2.
    np.testing.assert_allclose(metrics[0]["kdgan/adversarial"], 2 * np.log(0.5), atol=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_degenerate_inputs_are_finite(scale):
    inputs = make_inputs(dtype=np.float32)
    inputs = inputs._replace(
        student=jax.tree.map(lambda x: scale * x, inputs.student),
        teacher=jax.tree.map(lambda x: scale * x, inputs.teacher),
    )
    method, variables = create(LOSSES["kdgan"], inputs)
    assert_finite(evaluate(method, variables, inputs))


def test_method_needs_a_key():
    with pytest.raises(ValueError, match="kdgan draws pseudo labels: it needs a key"):
        create(LOSSES["kdgan"], make_inputs(dtype=np.float32)._replace(key=None))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"student_share": 1.5}, r"student_share must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"teacher_logits": np.ones((4, 2), np.float32)}, r"shapes must be equal, .*teacher_logits \(4, 2\)"),
        ({"labels": np.zeros(3, np.int32)}, r"labels must have shape \(4,\)"),
    ],
)
def test_wrong_values(options, text):
    logits = np.ones((4, 3), np.float32)
    names = ("student_logits", "teacher_logits", "student_sample", "teacher_sample")
    arguments = dict.fromkeys(names, logits) | {"labels": np.zeros(4, np.int32)} | options
    with pytest.raises(ValueError, match=text):
        kdgan_loss(**arguments, discriminate=lambda category: category[:, 0])


def test_wrong_sample_temperature():
    with pytest.raises(ValueError, match="temperature must be greater than 0, got 0"):
        sample_category(jax.random.PRNGKey(0), jnp.arange(2), jnp.ones((2, 3)), temperature=0)
