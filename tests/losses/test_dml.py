"""Deep mutual learning: values, runs with peers, and what is left of them afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import cskd_jax
from cskd_jax.data.arrays import from_arrays
from cskd_jax.errors import UserError
from cskd_jax.losses import dml_loss
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.peers import Cohort, without_peers
from tests.tiers import chosen

RNG = np.random.default_rng(0)
PIXELS, LABELS = RNG.integers(0, 256, (24, 4, 4, 1), np.uint8), (np.arange(24) % 3).astype(np.int32)
INPUTS = jnp.asarray((PIXELS / 255 - 0.5) / 0.25, jnp.float32)
DATA = {"train": (PIXELS, LABELS), "test": (PIXELS, LABELS), "mean": (0.5,), "std": (0.25,)}


class Net(nn.Module):
    """A network with batch statistics and dropout."""

    rate: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6)(x.reshape(len(x), -1))
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x))
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(x))


def train(losses=None, epochs=2, **settings):
    losses = {"cross_entropy": 1.0, "dml": {"weight": 0.5, "peers": 2}} if losses is None else losses
    settings = {"batch_size": 8, "devices": 1, "student": Net(), "optimizer": optax.sgd(0.1)} | DATA | settings
    student = settings.pop("student")
    return cskd_jax.distill(student, losses=losses, epochs=epochs, callbacks=(), **settings)


def assert_close(found, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected)


def test_values():
    logits = RNG.normal(size=(3, 4, 5))
    log_p = logits / 2 - np.log(np.exp(logits / 2).sum(axis=2, keepdims=True))
    terms = [4 * np.mean(np.sum(np.exp(log_p[j]) * (log_p[j] - log_p[i]), axis=1)) for i in range(3) for j in range(3)]
    np.testing.assert_allclose(dml_loss(tuple(logits), temperature=2.0), sum(terms) / 2, rtol=1e-6)
    assert dml_loss((logits[0], logits[0])) < 1e-6
    with pytest.raises(ValueError, match="needs the logits of at least two networks, got 1"):
        dml_loss((logits[0],))


@pytest.mark.slow
def test_two_networks_by_hand():
    """A step of the student and of its peer is that of two losses, each of which moves its own network."""
    found = train({"cross_entropy": 1.0, "dml": 1.0}, epochs=1, batch_size=24)
    key = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(0), 1))[0]
    start, _ = Cohort(LinenNetwork(Net()), 1).init(jax.random.split(key)[0], (4, 4, 1))
    own, peer = without_peers(start), {name: x["+peers"]["1"] for name, x in start.items()}

    def loss(params, variables, target):
        logits, _ = Net().apply({**variables, "params": params}, INPUTS, True, mutable=["batch_stats"])
        log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(target)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
        return entropy + jnp.mean(jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=1))

    target, _ = Net().apply(peer, INPUTS, True, mutable=["batch_stats"])
    gradients = jax.grad(loss)(own["params"], own, target)
    assert_close(found.variables["params"], jax.tree.map(lambda x, g: x - 0.1 * g, own["params"], gradients))
    assert jax.tree.structure(found.variables) == jax.tree.structure(own)


@pytest.mark.slow
def test_the_student_starts_as_without_peers():
    with_peers = train(optimizer=optax.sgd(0.0), epochs=1).variables["params"]
    alone = train({"cross_entropy": 1.0}, optimizer=optax.sgd(0.0), epochs=1).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, with_peers, alone)


def test_peers_differ():
    variables, output = Cohort(LinenNetwork(Net()), 2).init(jax.random.key(0), (4, 4, 1))
    kernels = [variables["params"]["Dense_0"]["kernel"]]
    kernels += [variables["params"]["+peers"][number]["Dense_0"]["kernel"] for number in ("1", "2")]
    assert all(np.abs(kernels[i] - kernels[j]).max() > 0.1 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert len(output.members) == 3


@pytest.mark.slow
@pytest.mark.parametrize("settings", chosen([{"devices": 2}, {"devices": 4, "ema": 0.8}, {"ema": 0.5}], 1))
def test_devices_and_averages(settings):
    settings = settings | ({} if settings.get("devices") else {"accumulation_steps": 2})
    expected = train(**{name: value for name, value in settings.items() if name != "devices"})
    assert_close(train(**settings).variables, expected.variables)


@pytest.mark.slow
def test_resumes_bit_for_bit(tmp_path):
    """With dropout, an average of the weights, and what a checkpoint holds for others."""
    settings = {"student": Net(rate=0.3), "ema": 0.8, "losses": {"cross_entropy": 1.0, "dml": 1.0}}
    expected = train(epochs=3, **settings)
    train(epochs=1, workdir=tmp_path / "run", **settings)
    (tmp_path / "run" / "results.json").unlink()
    found = train(epochs=3, workdir=tmp_path / "run", **settings)
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
    loaded = cskd_jax.load_run(tmp_path / "run", student=Net(rate=0.3))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected.variables)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": {"dml": {"peers": 0}}}, "peers"),
        ({"student_variables": {"params": {}}}, "a student with peers must start from new weights"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises((UserError, ValueError), match=message):
        train(**settings)


@pytest.mark.slow
def test_phases_name_parameters_of_the_student_and_of_its_peers_alike():
    """What does not train stays as it is in all networks."""
    phase = cskd_jax.Phase(1, trainable=lambda path: path[0] == "Dense_1", evaluate_frozen=True)
    trainer = cskd_jax.Trainer(
        {"net": cskd_jax.Student(Net(), {"cross_entropy": 1.0, "dml": 1.0}, optax.sgd(0.1))},
        data=from_arrays((INPUTS, LABELS), (INPUTS, LABELS)),
        phases=[phase],
        batch_size=8,
        devices=1,
        callbacks=(),
    )
    trainer.fit()
    state = trainer.state["net"]
    key = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(0), 1))[0]
    fresh = Cohort(LinenNetwork(Net()), 1).init(jax.random.split(key)[0], (4, 4, 1))
    for part in (lambda tree: tree, lambda tree: tree["+peers"]["1"]):
        moved, first = part(state.params["network"]), part(fresh[0]["params"])
        np.testing.assert_array_equal(moved["Dense_0"]["kernel"], first["Dense_0"]["kernel"])
        assert np.any(moved["Dense_1"]["kernel"] != first["Dense_1"]["kernel"])


def test_a_number_of_peers_for_each_phase():
    few, many = ({"cross_entropy": 1.0, "dml": {"weight": 1.0, "peers": number}} for number in (1, 2))
    student = cskd_jax.Student(Net(), many, optax.sgd(0.1))
    trainer = cskd_jax.Trainer(
        {"net": student},
        data=from_arrays((INPUTS, LABELS), (INPUTS, LABELS)),
        phases=[cskd_jax.Phase(1, losses=few), cskd_jax.Phase(1)],
        batch_size=8,
        devices=1,
        callbacks=(),
    )
    assert len(trainer.programs("net").states[0].params["network"]["+peers"]) == 2


@pytest.mark.slow
def test_mixed_images():
    mixed, plain = (train(mix=mix, epochs=1).variables for mix in (cskd_jax.Mix(mixup=0.5), None))
    assert np.any(mixed["params"]["Dense_1"]["kernel"] != plain["params"]["Dense_1"]["kernel"])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_recipe(start, small_run, tmp_path):
    """The word on the command line: no teacher, peers in training alone, a student that others can use."""
    recipe = [word.replace("digits.py", "digits.py:dml") for word in small_run]
    process = start([*recipe, "--config.epochs=1", f"--workdir={tmp_path / 'run'}"])
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert "teacher" not in output
    run = cskd_jax.load_run(tmp_path / "run")
    assert "+peers" not in run.variables["params"]
    assert run.results["student"]["parameters"] == sum(x.size for x in jax.tree.leaves(run.variables["params"]))
