"""The options of a training: each against a loop of optax written by hand, resumed, and on two devices."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import cskd_jax
from cskd_jax.data import ImageDataset, Split
from cskd_jax.data.samplers import UniformSampler
from cskd_jax.data.types import hold_out
from cskd_jax.errors import InterruptedRun, UserError
from cskd_jax.runs import schema
from cskd_jax.runs.optimization import make_optimizer
from cskd_jax.training.checkpoint import load_variables
from cskd_jax.training.optimizers import ConstantSchedule, CosineSchedule, StepSchedule
from tests.conftest import Stop
from tests.tiers import chosen

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.normal(size=(30, 4, 4, 1)).astype(np.float32), (np.arange(30) % 3).astype(np.int32)
# An epoch has batches of 8, 8 and 6 images: the last has a rest where it is divided into micro-batches of 4.
DATA = ImageDataset("arrays", Split(IMAGES[:22], LABELS[:22]), Split(IMAGES[22:], LABELS[22:]), ("a", "b", "c"))
EPOCHS, STEPS_PER_EPOCH, BATCH = 3, 3, 8
STEPS = EPOCHS * STEPS_PER_EPOCH


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(5)(x.reshape(len(x), -1))))


def spread(inputs):
    """A loss that relates the images of a batch."""
    logits = inputs.student.logits
    return jnp.mean(jnp.square(logits[:, None] - logits))


LOSSES = {"cross_entropy": 1.0, "spread": {"loss": spread, "weight": 0.1}}


def kernels(params):
    return jax.tree.map(lambda x: x.ndim == 2, params)


# Settings of `config.optimizer`, and what optax has for them.
OPTIONS = {
    "nesterov": (
        {"nesterov": True},
        optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    ),
    "adamw, warm-up and cosine": (
        {"name": "adamw", "learning_rate": 0.02, "schedule": "cosine", "warmup_epochs": 1, "beta2": 0.99},
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.02, STEPS_PER_EPOCH, STEPS), b2=0.99, weight_decay=1e-4),
    ),
    "clipping": (
        {"clip_norm": 0.5, "weight_decay": 0.1, "momentum": 0.0},
        optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    ),
    "constant, decay of kernels alone": (
        {"name": "adamw", "learning_rate": 0.02, "schedule": "constant", "weight_decay": 0.5, "decay_all": False},
        optax.adamw(0.02, weight_decay=0.5, mask=kernels),
    ),
    "warm-up and steps": (
        {"warmup_epochs": 1, "milestones": (2,), "momentum": 0.0, "weight_decay": 0.0},
        optax.sgd(lambda count: 0.1 * jnp.minimum(1, count / 3) * jnp.where(count < 6, 1, 0.1)),
    ),
    "accumulation": ({"accumulation_steps": 2}, None),
    "moving average": ({"ema_decay": 0.8}, None),
    "accumulation and moving average": ({"accumulation_steps": 4, "ema_decay": 0.8}, None),
}
DEFAULT = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))


def make_trainer(settings, data=DATA, workdir=None, devices=1):
    optimizer = ml_collections.ConfigDict(schema.defaults().optimizer.to_dict() | settings)
    schedule, transformation = make_optimizer(optimizer, EPOCHS, STEPS_PER_EPOCH)
    return cskd_jax.Trainer(
        {"net": cskd_jax.Student(Net(), LOSSES, transformation, schedule, optimizer.ema_decay)},
        data=data,
        phases=[cskd_jax.Phase(EPOCHS)],
        batch_size=BATCH,
        accumulation_steps=optimizer.accumulation_steps,
        workdir=workdir,
        devices=devices,
        callbacks=(),
        log_every=1,
    )


def by_hand(optimizer, start, micro_batches=1, ema=None):
    """Returns the parameters, or their moving average, after a loop that anyone would write."""

    @jax.jit
    def gradient(params, images, labels):
        def loss(params):
            logits = Net().apply({"params": params}, images)
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return entropy + 0.1 * jnp.mean(jnp.square(logits[:, None] - logits))

        return jax.grad(loss)(params)

    params, average, state, size = start, start, optimizer.init(start), BATCH // micro_batches
    sampler = UniformSampler(22, BATCH, seed=0)
    for step in range(STEPS):
        index = sampler.indices(step)
        parts = [index[i : i + size] for i in range(0, len(index), size)]
        gradients = [gradient(params, IMAGES[part], LABELS[part]) for part in parts]
        shares = np.array([len(part) / len(index) for part in parts], np.float32)
        total = jax.tree.map(lambda *leaves, shares=shares: np.tensordot(shares, np.stack(leaves), 1), *gradients)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(total, state, params)
            params = optax.apply_updates(params, updates)
        if ema is not None:
            average = jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, average, params)
    return params if ema is None else average


def initial_parameters():
    """The parameters that the trainer starts from: after an epoch without learning they are the same."""
    student = cskd_jax.Student(Net(), {"cross_entropy": 1.0}, optax.sgd(0.0))
    trainer = cskd_jax.Trainer(
        {"net": student}, data=DATA, phases=[cskd_jax.Phase(1)], batch_size=BATCH, callbacks=(), devices=1
    )
    return trainer.fit()["net"].variables["params"]


@pytest.fixture(scope="module")
def start_parameters():
    return initial_parameters()


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_against_optax(name, start_parameters):
    settings, optimizer = OPTIONS[name]
    result = make_trainer(settings).fit()["net"]
    expected = by_hand(
        optimizer or DEFAULT, start_parameters, settings.get("accumulation_steps", 1), settings.get("ema_decay")
    )
    assert_close(result.variables["params"], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", chosen(["clipping", "adamw, warm-up and cosine", "accumulation and moving average"], 2)
)
def test_two_devices(name):
    settings, _ = OPTIONS[name]
    settings = settings | {"accumulation_steps": min(2, settings.get("accumulation_steps", 1))}
    one, two = (make_trainer(settings, devices=count).fit()["net"] for count in (1, 2))
    assert_close(two.variables, one.variables)


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen([*OPTIONS], ("adamw, warm-up and cosine", "accumulation and moving average")))
def test_resumes_bit_for_bit(name, tmp_path):
    settings, _ = OPTIONS[name]
    data = hold_out(DATA, 6, seed=0)
    settings = settings | {"accumulation_steps": min(2, settings.get("accumulation_steps", 1))}
    expected = make_trainer(settings, data).fit()["net"]
    with pytest.raises(InterruptedRun):
        make_trainer(settings, data, tmp_path).fit(Stop(3))
    actual = make_trainer(settings, data, tmp_path).fit()["net"]
    jax.tree.map(np.testing.assert_array_equal, actual.variables, expected.variables)
    assert actual.history == expected.history
    assert actual.best == expected.best
    # What other programs read is what was evaluated.
    saved = load_variables(str(tmp_path / "net")).variables
    jax.tree.map(np.testing.assert_array_equal, saved, expected.variables)


@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSchedule(0.3),
        StepSchedule(0.1, (3, 7), 0.2, warmup_steps=4),
        CosineSchedule(0.2, 20, warmup_steps=5),
        CosineSchedule(0.2, 20),
    ],
)
def test_a_schedule_is_the_same_on_the_host_and_on_the_device(schedule):
    for count in range(25):
        np.testing.assert_allclose(schedule(jnp.asarray(count)), schedule.on_host(count), rtol=1e-6, atol=1e-9)


def test_cosine_is_that_of_optax():
    ours = CosineSchedule(0.2, 20, warmup_steps=5)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.2, 5, 20)
    for count in range(25):
        np.testing.assert_allclose(ours.on_host(count), theirs(count), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_log_has_the_learning_rate_of_the_update():
    schedule = CosineSchedule(0.02, STEPS, warmup_steps=STEPS_PER_EPOCH)
    result = make_trainer({"name": "adamw", "learning_rate": 0.02, "schedule": "cosine", "warmup_epochs": 1}).fit()
    rows = [row for row in result["net"].history if row["split"] == "train"]
    assert [row["learning_rate"] for row in rows] == [schedule.on_host(step) for step in range(STEPS)]


@pytest.mark.slow
def test_validation_chooses_and_the_test_split_is_measured_twice(tmp_path):
    data = hold_out(DATA, 6, seed=0)
    assert sorted(data.validation.labels) == [0, 0, 1, 1, 2, 2]
    assert len(data.train.labels) == 16
    both = np.concatenate([data.train.images, data.validation.images])
    np.testing.assert_array_equal(np.sort(both, axis=None), np.sort(DATA.train.images, axis=None))
    results = [make_trainer({"learning_rate": 3.0}, data, workdir).fit()["net"] for workdir in (None, tmp_path)]
    for result in results:
        rows = [(row["split"], row["epoch"]) for row in result.history if row["split"] != "train"]
        best = result.validation["best"]["epoch"]
        tests = [("test", best), ("test", EPOCHS)] if best != EPOCHS else [("test", EPOCHS)]
        assert rows[-len(tests) :] == tests
        assert rows[: -len(tests)] == [("validation", epoch) for epoch in range(1, EPOCHS + 1)]
        assert result.best["epoch"] == best
        assert result.last["epoch"] == EPOCHS
        scores = [row["top1"] for row in result.history if row["split"] == "validation"]
        assert scores[best - 1] == max(scores)
        assert result.metrics["test"]["top1"] == result.last["top1"]
    assert results[0].history == results[1].history
    assert results[0].best == results[1].best


def test_validation_is_the_same_for_every_seed_but_its_own():
    splits = [hold_out(DATA, 6, seed).validation.images for seed in (0, 0, 1)]
    np.testing.assert_array_equal(splits[0], splits[1])
    assert not np.array_equal(splits[0], splits[2])
    with pytest.raises(UserError, match="validation_examples=2 is less than the number of classes, 3"):
        hold_out(DATA, 2, 0)


@pytest.mark.parametrize(
    ("settings", "devices", "message"),
    [
        ({"accumulation_steps": 3}, 1, "batch_size is 8, which is not divisible by accumulation_steps, 3"),
        ({"accumulation_steps": 4}, 4, "a micro-batch .* does not split evenly across the 4 devices"),
        ({"accumulation_steps": 8}, 1, "a micro-batch holds one image"),
        ({"accumulation_steps": 0}, 1, "accumulation_steps is 0; it must be an integer, at least 1"),
        ({"ema_decay": 1.5}, 1, r"ema is 1.5; it must be a number in \[0, 1\)"),
    ],
)
def test_what_cannot_be(settings, devices, message):
    data = dataclasses.replace(DATA, train=Split(IMAGES[:24], LABELS[:24]))
    with pytest.raises(UserError, match=message):
        make_trainer(settings, data, devices=devices)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer.name": "adamw", "optimizer.nesterov": True},
            "optimizer.nesterov is True, but it applies only to sgd",
        ),
        ({"optimizer.warmup_epochs": 5, "epochs": 5}, "optimizer.warmup_epochs is 5; it must be less than epochs, 5"),
        ({"optimizer.accumulation_steps": 3}, "is not divisible by optimizer.accumulation_steps, 3"),
        ({"optimizer.clip_norm": 0.0}, "optimizer.clip_norm is 0.0; it must be a number greater than 0, or None"),
    ],
)
def test_what_a_configuration_cannot_say(changes, message):
    config = cskd_jax.get_config("digits:ce")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        schema.validate(config)


def test_a_cosine_schedule_is_not_extended():
    old = schema.plain(schema.defaults()) | {"optimizer.schedule": "cosine", "epochs": 2}
    assert "cosine schedule" in schema.why_not_extend(old)
    assert schema.why_not_extend(old | {"optimizer.schedule": "step"}) is None
