"""mixup and CutMix: values, several devices, what losses make of mixed labels, and whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cskd_jax
from cskd_jax import Mix
from cskd_jax.data import ImageDataset, Split
from cskd_jax.errors import UserError
from cskd_jax.losses import cross_entropy_loss
from cskd_jax.models import create_model
from cskd_jax.runs import schema
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training.checks import check_losses
from cskd_jax.training.mixing import partners
from cskd_jax.training.objective import Objective
from tests.tiers import chosen
from tests.torch_files import assert_same_variables

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 6, 10, 3)).astype(np.float32)


def shares_of(mix, count=200):
    keys = jax.random.split(jax.random.key(1), count)
    return np.asarray(jax.vmap(lambda key: mix(IMAGES[:2], key, None)[1][0])(keys))


def test_mixup_adds_the_image_from_the_other_end():
    mixed, share = Mix(mixup=1.0)(IMAGES, jax.random.key(0), None)
    assert np.all(share == share[0])
    assert 0 < share[0] < 1
    np.testing.assert_allclose(mixed, share[0] * IMAGES + (1 - share[0]) * IMAGES[::-1], rtol=1e-5, atol=1e-6)


def test_cutmix_puts_in_a_rectangle():
    mixed, share = Mix(cutmix=1.0)(IMAGES, jax.random.key(3), None)
    is_own, is_other = (mixed == IMAGES).all(axis=(0, 3)), (mixed == IMAGES[::-1]).all(axis=(0, 3))
    assert np.all(is_own ^ is_other)
    assert is_other.any()
    rows, columns = np.nonzero(is_other)
    assert is_other[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    np.testing.assert_allclose(share, is_own.mean(), rtol=1e-6)


@pytest.mark.slow
def test_draws():
    assert 0.4 < shares_of(Mix(mixup=1.0)).mean() < 0.6
    # A small parameter leaves most images almost as they are, or puts the other in their place.
    small = shares_of(Mix(mixup=0.1))
    assert np.mean((small < 0.1) | (small > 0.9)) > 0.6
    # Shares of CutMix are numbers of pixels.
    whole = [np.isclose(60 * shares_of(mix) % 1, 0, atol=1e-4).mean() for mix in (Mix(1.0), Mix(1.0, 1.0), Mix(0, 1.0))]
    assert whole[0] < 0.1
    assert 0.3 < whole[1] < 0.7
    assert whole[2] == 1


@pytest.mark.slow
@pytest.mark.parametrize("devices", chosen([8, 1, 2], 1))
def test_devices_mix_the_global_batch(devices):
    def split(x):
        return x.reshape(devices, -1, *x.shape[1:])

    key, mix = jax.random.key(3), Mix(0.4, 1.0)
    mixed = jax.pmap(lambda x: mix(x, key, "batch"), "batch", devices=jax.devices()[:devices])(split(IMAGES))
    whole = jax.jit(lambda x: mix(x, key, None))(IMAGES)
    jax.tree.map(np.testing.assert_array_equal, mixed, jax.tree.map(split, whole))
    labels = np.arange(8, dtype=np.int32)
    other = jax.pmap(lambda x: partners(x, "batch"), "batch", devices=jax.devices()[:devices])(split(labels))
    np.testing.assert_array_equal(other, split(labels[::-1]))


def test_cross_entropy_of_two_labels():
    logits, labels, others = RNG.normal(size=(4, 5)), np.array([0, 1, 2, 3]), np.array([4, 4, 0, 3])
    share = np.array([1.0, 0.75, 0.5, 0.0], np.float32)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = 0.8 * (share[:, None] * np.eye(5)[labels] + (1 - share[:, None]) * np.eye(5)[others]) + 0.2 / 5
    value = cross_entropy_loss(logits, labels, other_labels=others, share=jnp.asarray(share), label_smoothing=0.2)
    np.testing.assert_allclose(value, -np.mean(np.sum(target * log_p, axis=1)), rtol=1e-6)


@pytest.mark.parametrize("settings", [{"mixup": -0.1}, {"cutmix": 101}, {"mixup": "on"}, {"cutmix": float("nan")}])
def test_wrong_settings(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} is .*; it must be a number from 0 to 100"):
        Mix(**settings)


def test_integers_are_not_mixed():
    with pytest.raises(ValueError, match="need floating-point network inputs; got uint8"):
        Mix(1.0)(jnp.zeros((2, 4, 4, 3), jnp.uint8), jax.random.key(0), None)


def test_configuration():
    config = load_recipe("digits:kd", ["--config.augment.mixup=0.2"])
    schema.validate(config)
    assert (config.augment.mixup, config.augment.cutmix) == (0.2, 0.0)


TEACHER = create_model("resnet8", num_classes=3, width=0.25)
LABELS = RNG.integers(0, 3, 24).astype(np.int32)
PIXELS = RNG.integers(0, 256, (24, 8, 8, 3), np.uint8)


def train(losses, epochs=2, mix=None, **settings):
    variables = TEACHER.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    return cskd_jax.distill(
        create_model("resnet8", num_classes=3, width=0.125),
        teacher=TEACHER,
        teacher_variables=variables,
        losses={"cross_entropy": 1.0} | losses,
        optimizer=optax.sgd(0.1),
        train=(PIXELS, LABELS),
        test=(PIXELS, LABELS),
        mean=(0.5,),
        std=(0.25,),
        epochs=epochs,
        batch_size=8,
        mix=mix,
        callbacks=(),
        **{"devices": 1} | settings,
    )


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        ("dkd", "losses.dkd reads only one: leave it out"),
        ("category_structure", "reads only one"),
    ],
)
def test_losses_of_one_label_are_refused(loss, text):
    with pytest.raises(UserError, match=f"mixup and cutmix give an image two labels, but .*{text}"):
        train({loss: 1.0}, mix=Mix(0.2))


def test_losses_of_multilabel_data_are_refused():
    objective = Objective.create({"binary_cross_entropy": 1.0}, num_classes=3)
    split = Split(PIXELS, np.eye(3, dtype=np.float32)[LABELS])
    with pytest.raises(UserError, match=r"losses that read multi-label data, such as losses.binary_cross_entropy: set"):
        check_losses(objective, ImageDataset("none", split, split, ("a", "b", "c")), mixes=True)


def test_losses_of_several_views_are_refused():
    with pytest.raises(UserError, match="losses.mlkd uses further views of the images, which are not mixed"):
        train({"mlkd": 1.0}, mix=Mix(0.2))


def test_losses_of_the_predictions_of_a_teacher_take_mixed_images():
    for name, own in (("deit", {}), ("ctkd", {"variant": "kd"})):
        objective = Objective.create({name: {"weight": 1.0, **own}}, num_classes=3)
        split = Split(PIXELS, LABELS)
        check_losses(objective, ImageDataset("none", split, split, ("a", "b", "c")), mixes=True)
    with pytest.raises(UserError, match="losses.ctkd reads only one"):
        train({"ctkd": {"weight": 1.0, "variant": "dkd"}}, mix=Mix(0.2))


def compare(actual, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), actual, expected)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_runs(tmp_path):
    """Four devices are one, and a run goes on as if it had not stopped."""
    mix, losses = Mix(0.4, 1.0), {"kd": 1.0}
    whole = train(losses, mix=mix).variables
    compare(train(losses, mix=mix, devices=4).variables, whole)
    train(losses, epochs=1, mix=mix, workdir=tmp_path / "run")
    with pytest.raises(UserError, match="holds another run"):
        train(losses, mix=Mix(0.4), workdir=tmp_path / "run")
    assert_same_variables(train(losses, mix=mix, workdir=tmp_path / "run").variables, whole)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_micro_batches_mix_among_themselves():
    settings = {"mix": Mix(0.4, 1.0), "accumulation_steps": 2}
    parts = train({"kd": 1.0, "at": 10.0}, **settings).variables
    compare(train({"kd": 1.0, "at": 10.0}, devices=4, **settings).variables, parts)
    with pytest.raises(AssertionError):
        compare(train({"kd": 1.0, "at": 10.0}, accumulation_steps=2).variables, parts)
