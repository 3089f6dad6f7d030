"""Further views of the images: the augmentation that makes them, and training with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import cskd_jax
from cskd_jax.data import ImageDataset, Split
from cskd_jax.data.strong import strong_augment
from cskd_jax.errors import InterruptedRun, UserError
from cskd_jax.losses import LOSSES
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.objective import Objective
from cskd_jax.training.state import init_state
from cskd_jax.training.step import make_teacher_pass, make_train_step
from tests.conftest import Stop
from tests.test_together import assert_same
from tests.tiers import chosen

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 6, 6, 3)).astype(np.uint8)
LABELS = np.arange(40, dtype=np.int32) % 5
DATA = ImageDataset("noise", Split(IMAGES[:32], LABELS[:32]), Split(IMAGES[32:], LABELS[32:]), tuple("abcde"))
MLKD = {"mlkd": 0.9, "cross_entropy": {"weight": 0.1, "all_views": True}}
STUDENTS = {"kd": {"kd": 1.0, "cross_entropy": 1.0}, "both": MLKD | {"ctkd": 1.0}}


class Net(nn.Module):
    width: int = 5

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(self.width, (3, 3), param_dtype=images.dtype)(images)).mean((1, 2))
        x = nn.BatchNorm(use_running_average=not train, axis_name=None, param_dtype=images.dtype)(x)
        return {"logits": nn.Dense(5, param_dtype=images.dtype)(x), "embedding": x}


def normalize(images):
    return images.astype(jnp.result_type(float)) / 255


def make_trainer(losses, data=DATA, **settings):
    """A trainer of batches of 16, two an epoch."""
    teacher = Net(7)
    return cskd_jax.Trainer(
        {name: cskd_jax.Student(Net(), entry, optax.sgd(0.1, momentum=0.9)) for name, entry in losses.items()},
        [cskd_jax.Teacher(teacher, teacher.init(jax.random.PRNGKey(9), normalize(IMAGES[:2])))],
        data=data,
        phases=[cskd_jax.Phase(3)],
        batch_size=16,
        normalize=normalize,
        callbacks=(),
        log_every=1,
        **{"devices": 1} | settings,
    )


@pytest.mark.slow
def test_strong_augmentation_depends_on_key_and_position_alone():
    augment, key = jax.jit(strong_augment), jax.random.PRNGKey(0)
    positions = np.arange(40, dtype=np.int32)
    found = augment(IMAGES, key, positions)
    assert (found.dtype, found.shape) == (np.uint8, IMAGES.shape)
    halves = [augment(IMAGES[rows], key, positions[rows]) for rows in (slice(0, 20), slice(20, 40))]
    np.testing.assert_array_equal(found, np.concatenate(halves))
    assert np.mean(found != augment(IMAGES, jax.random.PRNGKey(1), positions)) > 0.5
    same = augment(np.tile(IMAGES[:1], (40, 1, 1, 1)), key, positions)
    assert len(np.unique(np.asarray(same).reshape(40, -1), axis=0)) > 30


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_strong_augmentation_of_other_images(channels):
    images = np.full((16, 5, 9, channels), 200, np.uint8)
    found = np.asarray(jax.jit(strong_augment)(images, jax.random.PRNGKey(2), np.arange(16, dtype=np.int32)))
    assert found.shape == images.shape
    assert len(np.unique(found)) > 2


def test_the_pass_returns_the_views_that_are_asked_for():
    def preprocess(images, key, positions):
        return images + jax.random.uniform(key, (len(positions), 1, 1, 1))

    images, key = np.zeros((4, 2, 2, 1), np.float32), jax.random.PRNGKey(0)
    plain, two = (
        jax.jit(make_teacher_pass(None, preprocess=preprocess, views=views, preprocess_view=preprocess))
        for views in (0, 2)
    )
    alone, found = plain(None, images, key, np.int32(3)), two(None, images, key, np.int32(3))
    assert alone.keys() == {"image", "teacher"}
    np.testing.assert_array_equal(found["image"], alone["image"])
    drawn = [found["image"], *(view["image"] for view in found["views"])]
    assert len(np.unique(np.asarray(drawn))) == 12


@pytest.mark.slow
def test_the_network_sees_one_view_after_the_other():
    network, optimizer = LinenNetwork(Net()), optax.sgd(0.1)
    objective = Objective.create({"cross_entropy": {"all_views": True}}, num_classes=5)
    state = init_state(jax.random.PRNGKey(0), network, objective, optimizer, IMAGES.shape[1:])
    views = normalize(IMAGES[:8]), normalize(IMAGES[8:16])
    batch = {"image": views[0], "teacher": None, "label": LABELS[:8], "index": LABELS[:8]}
    step = jax.jit(make_train_step(network, objective, optimizer))
    new, metrics = step(state, {**batch, "views": ({"image": views[1], "teacher": None},)}, jax.random.PRNGKey(1))
    variables, total = state.variables, 0.0
    for images in views:
        output, moved = network.apply(variables, images, train=True)
        variables = {**variables, **moved}
        total += optax.softmax_cross_entropy_with_integer_labels(output.logits, LABELS[:8]).mean()
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), new.collections, {"batch_stats": moved["batch_stats"]}
    )


@functools.cache
def trained_alone(name):
    return make_trainer({name: STUDENTS[name]}).fit()[name]


@pytest.mark.slow
def test_company_changes_no_bit():
    for name, result in make_trainer(STUDENTS).fit().items():
        assert_same(result, trained_alone(name))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_temperature_and_views(tmp_path):
    losses = {"both": STUDENTS["both"]}
    with pytest.raises(InterruptedRun):
        make_trainer(losses, workdir=tmp_path).fit(Stop(3))
    trainer = make_trainer(losses, workdir=tmp_path)
    assert_same(trainer.fit()["both"], trained_alone("both"))
    temperature = trainer.state["both"].params["losses"]["ctkd"]["temperature"]
    assert temperature.shape == ()
    assert temperature != 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", chosen([{"devices": 4}, {"accumulation_steps": 2}], 1), ids=["devices", "micro-batches"]
)
def test_devices_and_micro_batches(settings):
    (result,) = make_trainer({"mlkd": MLKD}, **settings).fit().values()
    assert np.isfinite(result.last["loss"])


def test_all_views_need_a_loss_that_has_some():
    with pytest.raises(UserError, match=r"losses.cross_entropy.all_views is True, but no loss uses further views"):
        make_trainer({"student": {"kd": 0.9, "cross_entropy": MLKD["cross_entropy"]}})


def test_images_of_floats_are_refused_in_words():
    split = Split(np.asarray(normalize(IMAGES)), LABELS)
    with pytest.raises(UserError, match="losses.mlkd uses strongly augmented images, .* uint8 images; got float32"):
        make_trainer({"mlkd": MLKD}, ImageDataset("floats", split, split, tuple("abcde")))


@pytest.mark.slow
def test_methods_say_how_many_views_they_need():
    assert {name for name, loss in LOSSES.items() if loss.views} == {"mlkd"}
