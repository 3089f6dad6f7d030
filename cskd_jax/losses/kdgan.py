"""KDGAN: student, teacher and discriminator play one game."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import normalize
from cskd_jax.losses._batch import batch_positions
from cskd_jax.losses._checks import at_least_float32, check_float, check_labels, check_same_shape, check_temperature
from cskd_jax.losses.base import Count, LossInputs, Method, Positive, Share
from cskd_jax.losses.logits import kd_loss


def reverse_gradient(x: jax.Array) -> jax.Array:
    """Returns `x` with its gradient multiplied by -1, so the parameters behind it ascend while the others descend."""
    return 2 * lax.stop_gradient(x) - x


def sample_category(key: jax.Array, positions: jax.Array, logits: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """Draws a class from softmax(logits) by the Gumbel-max trick, with a straight-through gradient.

    With independent Gumbel noise G, the sample is onehot(argmax(z + G)). Its derivative is taken to be that of the
    relaxed sample softmax((z + G) / temperature), a draw from the concrete distribution.

    Args:
      key: Key of the noise, the same on all devices.
      positions: Positions of the samples in the global batch, int [B]. A sample's noise depends on `key` and its
        position alone.
      logits: Logits, float [B, C].
      temperature: Temperature of the relaxed sample, greater than 0.

    Returns:
      An array [B, C] of rows that are one-hot up to rounding, in the dtype of the logits.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If the logits do not have 2 dimensions, or if the temperature is not positive.

    References:
      Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017,
      https://arxiv.org/abs/1611.01144.
    """
    check_float("logits", logits, ndim=2)
    check_temperature(temperature)

    def noise(position):
        return jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[1:], logits.dtype)

    noisy = logits + jax.vmap(noise)(positions)
    relaxed = jax.nn.softmax(noisy / temperature)
    hard = jax.nn.one_hot(jnp.argmax(noisy, axis=1), logits.shape[1], dtype=logits.dtype)
    return relaxed + lax.stop_gradient(hard - relaxed)


def kdgan_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    student_sample: jax.Array,
    teacher_sample: jax.Array,
    discriminate: Callable[[jax.Array], jax.Array],
    *,
    student_share: float = 0.5,
    student_distillation: float = 1.0,
    teacher_distillation: float = 0.1,
    temperature: float = 4.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes KDGAN: the value of the game, and the distillation between student and teacher in both directions.

    adversarial = mean ln D(y) + alpha mean ln(1 - D(y~^s)) + (1 - alpha) mean ln(1 - D(y~^t))
    L = adversarial + beta T^2 KL(p^t || p^s) + gamma T^2 KL(p^s || p^t)
    with the true class y, a pseudo label y~ drawn from a network's prediction, the probability D(y) =
    sigmoid(discriminate(y)) that a class is the true one of its sample, and p = softmax(z / T). In the first divergence
    only p^s is differentiated, in the second only p^t. Student and teacher descend L; the discriminator must ascend it,
    which `discriminate` achieves with `reverse_gradient` of its parameters.

    Time and memory are O(B C) beyond `discriminate`, which is called three times.

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C]. They are differentiated, because the teacher is trained
        jointly.
      labels: Labels, int [B], in [0, C).
      student_sample: Pseudo labels of the student from `sample_category`, float [B, C].
      teacher_sample: Pseudo labels of the teacher from `sample_category`, float [B, C].
      discriminate: Function from classes [B, C], one-hot or relaxed, to logits [B] that they are the true ones.
      student_share: Share alpha of the student's pseudo labels, in [0, 1].
      student_distillation: Weight beta of what the student learns from the teacher.
      teacher_distillation: Weight gamma of what the teacher learns from the student.
      temperature: Temperature T, greater than 0.

    Returns:
      A scalar and the unweighted terms `adversarial` (at most 0), `student_distillation` and `teacher_distillation`:
      means over the batch, of at least float32, finite for any finite logits.

    Raises:
      TypeError: If the logits are not floating point, or the labels not integers.
      ValueError: If shapes do not fit, if the temperature is not positive, or if student_share is out of range.

    References:
      Wang, Zhang, Sun, Qi, "KDGAN: Knowledge Distillation with Generative Adversarial Networks", NeurIPS 2018, section
      3. The paper tunes alpha, beta and gamma for each data set, so the defaults are not from it.
    """
    check_float("student_logits", student_logits, ndim=2)
    check_float("teacher_logits", teacher_logits, ndim=2)
    check_same_shape(
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        student_sample=student_sample,
        teacher_sample=teacher_sample,
    )
    check_labels(labels, len(student_logits))
    if not 0 <= student_share <= 1:
        raise ValueError(f"student_share must be in [0, 1], got {student_share}")
    truth = jax.nn.one_hot(labels, student_logits.shape[1], dtype=student_sample.dtype)
    adversarial = (
        _mean_log_sigmoid(discriminate(truth))
        + student_share * _mean_log_sigmoid(-discriminate(student_sample))
        + (1 - student_share) * _mean_log_sigmoid(-discriminate(teacher_sample))
    )
    terms = {
        "adversarial": adversarial,
        # kd_loss does not differentiate its second argument.
        "student_distillation": kd_loss(student_logits, teacher_logits, temperature=temperature),
        "teacher_distillation": kd_loss(teacher_logits, student_logits, temperature=temperature),
    }
    total = adversarial + student_distillation * terms["student_distillation"]
    return total + teacher_distillation * terms["teacher_distillation"], terms


def _mean_log_sigmoid(x):
    return jnp.mean(jax.nn.log_sigmoid(at_least_float32(x)))


class KDGAN(Method):
    """Applies `kdgan_loss` with its teacher and its discriminator, both trained with the student in one step.

    These parts of the paper are kept: the three players, the value function of their game, pseudo labels by the
    Gumbel-max trick with the gradient of the concrete distribution instead of a score-function estimate, and
    distillation in both directions.

    These parts are changed, so that there is one objective and one update per step:
    - The three take their steps at once instead of in turn; the gradient of the discriminator is reversed. They share
      the run's optimizer, its weight decay included.
    - The trained teacher is the given network with a trained linear classifier on its pooled embedding. The classifier
      is added to the given network's logits and is zero at first: the teacher starts as the trained network, just as
      the paper's players start trained. The layers before it stay fixed, and so do the outputs that the other methods
      see.
    - The student starts untrained, so combine this method with a cross-entropy on the labels. The discriminator starts
      untrained too.
    - The discriminator is a network with one hidden layer on the teacher's embedding (divided by its norm; the paper
      calls it the privileged input) and the class. The class enters linearly, so relaxed classes can be used, too.
    - Pseudo labels are one-hot, with the straight-through gradient at a constant temperature; the paper lowers it
      during training.
    - The divergence is KL with a temperature, one of the two forms that the paper compares.

    Attributes:
      student_share: Share of the student's pseudo labels in the adversarial term, in [0, 1]; the rest is the teacher's.
      student_distillation: Weight of what the student learns from the teacher.
      teacher_distillation: Weight of what the teacher learns from the student.
      temperature: Temperature of the softmax in both distillation terms, greater than 0.
      sample_temperature: Temperature of the relaxed samples, greater than 0.
      hidden_size: Number of hidden units of the discriminator.
    """

    student_share: Share = 0.5
    student_distillation: float = 1.0
    teacher_distillation: float = 0.1
    temperature: Positive = 4.0
    sample_temperature: Positive = 1.0
    hidden_size: Count = 128
    multilabel: ClassVar[bool] = False

    @nn.compact
    def __call__(self, inputs: LossInputs):
        if inputs.key is None:
            raise ValueError("kdgan draws pseudo labels: it needs a key")
        embedding, teacher_logits = (
            at_least_float32(lax.stop_gradient(x)) for x in (inputs.teacher.embedding, inputs.teacher.logits)
        )
        student_logits = at_least_float32(inputs.student.logits)
        head = nn.Dense(
            teacher_logits.shape[1],
            param_dtype=embedding.dtype,
            kernel_init=nn.initializers.zeros,
            precision=lax.Precision.HIGHEST,
            name="teacher_head",
        )
        teacher_logits = teacher_logits + head(embedding)
        positions = batch_positions(len(student_logits), self.axis_name)
        student_sample, teacher_sample = (
            sample_category(key, positions, logits, temperature=self.sample_temperature)
            for key, logits in zip(jax.random.split(inputs.key), (student_logits, teacher_logits), strict=True)
        )
        return kdgan_loss(
            student_logits,
            teacher_logits,
            inputs.labels,
            student_sample,
            teacher_sample,
            self._discriminator(normalize(embedding), student_logits.shape[1]),
            student_share=self.student_share,
            student_distillation=self.student_distillation,
            teacher_distillation=self.teacher_distillation,
            temperature=self.temperature,
        )

    def _discriminator(self, embedding, num_classes):
        """Returns `discriminate` for `kdgan_loss`, with parameters that ascend.

        Its input and its hidden layer have a norm of about 1.
        """
        unit_norm = nn.initializers.variance_scaling(1.0, "fan_out", "normal")

        def weights(name, init, *shape):
            return reverse_gradient(self.param(f"discriminator_{name}", init, shape, embedding.dtype))

        def product(x, y):
            return jnp.dot(x, y, precision=lax.Precision.HIGHEST)

        of_embedding = weights("embedding", unit_norm, embedding.shape[1], self.hidden_size)
        of_category = weights("category", unit_norm, num_classes, self.hidden_size)
        bias = weights("bias", nn.initializers.zeros, self.hidden_size)
        output = weights("output", nn.initializers.lecun_normal(), self.hidden_size, 1)
        output_bias = weights("output_bias", nn.initializers.zeros, 1)
        shared = product(embedding, of_embedding) + bias

        def discriminate(category):
            return (product(jax.nn.relu(shared + product(category, of_category)), output) + output_bias)[:, 0]

        return discriminate
