"""A teacher that was trained with another mean and deviation gets its images as it needs them."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cskd_jax
from cskd_jax.data import load_dataset
from cskd_jax.data.augment import Normalize
from cskd_jax.distributed.devices import Devices
from cskd_jax.errors import UserError
from cskd_jax.models import create_model
from cskd_jax.runs.build import build, load_trained, make_evaluation
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.runs.trained import Given, check_fits, identity_of_teachers
from cskd_jax.training.adapters import as_network
from cskd_jax.training.checkpoint import load_variables
from cskd_jax.training.normalization import RenormalizedNetwork, renormalize

OURS, THEIRS = Normalize((0.3, 0.4, 0.5), (0.2, 0.25, 0.3)), Normalize((0.5,), (0.25,))
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (24, 4, 4, 3), np.uint8), np.arange(24) % 3


class Net(nn.Module):
    """A linear classifier of pixels."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_images_come_in_the_normalization_of_the_network():
    network = as_network(Net())
    variables, _ = network.init(jax.random.PRNGKey(0), (4, 4, 3))
    expected = network.apply(variables, THEIRS(IMAGES), train=False)[0].logits
    within = renormalize(network, OURS, THEIRS)
    found = within.on_axis(None).apply(variables, OURS(IMAGES), train=False)[0].logits
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(network.apply(variables, OURS(IMAGES), train=False)[0].logits, expected, rtol=0.01)
    jax.tree.map(np.testing.assert_array_equal, within.init(jax.random.PRNGKey(0), (4, 4, 3))[0], variables)


def test_what_a_training_asks_of_a_network_is_that_of_the_network_itself():
    for module, synchronized in ((Net(), False), (create_model("resnet8", num_classes=3), True)):
        network = as_network(module)
        within = renormalize(network, OURS, THEIRS)
        assert within.synchronized is synchronized
        assert within.variables is None
        assert within.on_axis("batch") == renormalize(network.on_axis("batch"), OURS, THEIRS)
        assert hash(within) == hash(renormalize(network, OURS, THEIRS))


@pytest.mark.parametrize("own", [None, OURS, Normalize((0.3, 0.4, 0.5), (0.2, 0.25, 0.3))])
def test_nothing_changes_for_an_equal_normalization(own):
    network = as_network(Net())
    assert renormalize(network, OURS, own) is network
    assert renormalize(network, Normalize((0.5,) * 3, (0.25,) * 3), THEIRS) is network


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_precision_of_the_images_is_kept(dtype, x64):
    taken = []

    def look(variables, images, train, rngs):
        taken.append(images.dtype)
        return images.reshape(len(images), -1), {}

    network = renormalize(as_network(look), OURS, THEIRS)
    found = network.apply({}, OURS(jnp.asarray(IMAGES)).astype(dtype), train=False)[0].logits
    assert taken == [dtype]
    tolerance = 0.05 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(found, THEIRS(IMAGES).reshape(len(IMAGES), -1), rtol=tolerance, atol=tolerance)


def teacher_mean_logit(**settings):
    """Returns what a loss sees of the teacher: the mean of its first logit over the training split."""
    network = as_network(Net())
    variables, _ = network.init(jax.random.PRNGKey(1), (4, 4, 3))

    def see(inputs):
        return 0 * jnp.mean(inputs.student.logits), {"seen": jnp.mean(inputs.teacher.logits[:, 0])}

    result = cskd_jax.distill(
        Net(),
        teacher=Net(),
        teacher_variables=variables,
        losses={"cross_entropy": 1.0, "mine": see},
        optimizer=optax.sgd(0.1),
        train=(IMAGES, LABELS),
        test=(IMAGES, LABELS),
        batch_size=24,
        epochs=1,
        mean=OURS.mean,
        std=OURS.std,
        callbacks=(),
        devices=1,
        log_every=1,
        **settings,
    )
    (seen,) = (value for name, value in result.metrics["train"].items() if name.endswith("seen"))
    return seen, {
        own: np.mean(network.apply(variables, own(IMAGES), train=False)[0].logits[:, 0]) for own in (OURS, THEIRS)
    }


@pytest.mark.slow
def test_distill_with_a_teacher_of_another_normalization():
    seen, expected = teacher_mean_logit()
    np.testing.assert_allclose(seen, expected[OURS], rtol=1e-4)
    seen, expected = teacher_mean_logit(teacher_mean=THEIRS.mean, teacher_std=THEIRS.std)
    np.testing.assert_allclose(seen, expected[THEIRS], rtol=1e-4)
    assert abs(expected[OURS] - expected[THEIRS]) > 0.01 * abs(expected[OURS])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_mean": (0.1, 0.2)}, "teacher_mean has 2 values, but the images have 3 channels"),
        ({"teacher_std": (0.0,)}, "teacher_std is (0.0,); its values must be finite numbers above 0"),
        ({"std": (0.1, float("inf"), 1)}, "std is (0.1, inf, 1.0); its values must be finite numbers above 0"),
        (
            {"teacher_mean": (0.5,), "train": (IMAGES / np.float32(255), LABELS)},
            "teacher_mean and teacher_std need uint8",
        ),
    ],
)
def test_wrong_normalizations(settings, message):
    images = settings.get("train", (IMAGES, LABELS))
    defaults = {"losses": {"cross_entropy": 1.0}, "optimizer": optax.sgd(0.1), "train": images, "test": images}
    with pytest.raises(UserError, match=re.escape(message)):
        cskd_jax.distill(Net(), **defaults | settings)


@pytest.mark.slow
def test_run_with_a_teacher_of_another_normalization(done, digits_dir, tmp_path):
    """The teacher of a finished run has its accuracy in a run that normalizes otherwise."""
    dataset = load_dataset("digits", data_dir=str(digits_dir))
    config = load_recipe("digits:kd", [])
    for network in (config.teacher, config.student):
        network.update(name="resnet8", width=0.25)
    config.dataset.data_dir = str(digits_dir)
    devices, path = Devices(1), done / "teacher"
    scores, kinds = [], []
    for mean, std in (((0.3055,), (0.3766,)), ((0.5,), (0.2,))):
        config.dataset.update(mean=mean, std=std)
        trained = load_trained(path, config, dataset)
        evaluation = make_evaluation(trained.network, config, dataset, devices)
        scores.append(evaluation(devices.replicate(trained.saved.variables)))
        given = [Given("teacher.checkpoint", str(path), load_variables(str(path)))]
        kinds.append(type(build(config, tmp_path, devices, dataset, given).teachers[0].network))
    assert scores[0]["top1"] == scores[1]["top1"]
    np.testing.assert_allclose(scores[0]["loss"], scores[1]["loss"], rtol=1e-4)
    assert kinds[0] is not RenormalizedNetwork
    assert kinds[1] is RenormalizedNetwork


@pytest.mark.slow
def test_another_normalization_is_another_teacher(done):
    """A run does not go on with the same weights imported with another mean."""
    saved, config = load_variables(str(done / "teacher")), load_recipe("digits:kd", [])

    def identity(**images):
        record = dataclasses.replace(saved.record, images=images)
        return identity_of_teachers(
            [Given("teacher.checkpoint", "runs/teacher", saved._replace(record=record))], config
        )

    # Earlier versions could only use a teacher with the normalization of the run, or an unknown one.
    assert identity() == identity(mean=[0.3055], std=[0.3766]) == saved.digest
    assert identity(mean=[0.5], std=[0.25]) == f"{saved.digest} with mean [0.5], std [0.25]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"mean": "0", "std": [1.0]}, "are not lists of numbers"),
        ({"mean": ["0"], "std": [1.0]}, "mean is ('0',); its values must be finite numbers"),
        ({"mean": [0.0], "std": [0.0]}, "std is (0.0,); its values must be finite numbers above 0"),
        ({"mean": [0.0, 0.0], "std": [1.0]}, "mean has 2 values, but the images have 1 channels"),
    ],
)
def test_checkpoint_with_a_wrong_normalization(images, message, done, digits_dir):
    saved = load_variables(str(done / "teacher"))
    wrong = saved._replace(record=dataclasses.replace(saved.record, images=images))
    with pytest.raises(UserError, match=re.escape(message)):
        check_fits("runs/teacher", wrong, load_dataset("digits", data_dir=str(digits_dir)))
