"""Modules of flax.nnx and plain functions as networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cskd_jax
from cskd_jax.data.arrays import from_arrays
from cskd_jax.errors import InterruptedRun, UserError
from cskd_jax.training.adapters import as_network
from cskd_jax.training.networks import draws_random_numbers
from tests.conftest import Stop

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.normal(size=(24, 4, 4, 2)).astype(np.float32), np.arange(24) % 3
QUIET = {
    "train": (IMAGES[:16], LABELS[:16]), "test": (IMAGES[16:], LABELS[16:]), "losses": {"cross_entropy": 1.0},
    "optimizer": optax.adamw(1e-2), "batch_size": 8, "epochs": 2, "callbacks": (), "devices": 1, "log_every": 1,
}  # fmt: skip


class Module(nnx.Module):
    def __init__(self, rngs, dropout=0.5):
        self.convs = nnx.List([nnx.Conv(2, 4, (3, 3), rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = conv(x)
        return self.head(self.dropout(nnx.relu(self.norm(x)).mean((1, 2))))


class Linen(nn.Module):
    """The same as `Module`, in linen."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


def function(variables, images, train, rngs):
    """A network with a running mean and dropout."""
    mean = variables["state"]["mean"]
    params, x = variables["params"], images.reshape(len(images), -1)
    if not train:
        return jnp.tanh((x - mean) @ params["first"]) @ params["second"], {}
    hidden = jnp.tanh((x - mean) @ params["first"])
    kept = jax.random.bernoulli(rngs["dropout"], 0.5, hidden.shape)
    updates = {"state": {"mean": 0.9 * mean + 0.1 * x.mean(0)}}
    return (hidden * kept.astype(hidden.dtype)) @ params["second"], updates


SHAPES = {"first": (32, 8), "second": (8, 3)}
VARIABLES = {
    "params": {name: RNG.normal(scale=0.1, size=shape).astype(np.float32) for name, shape in SHAPES.items()},
    "state": {"mean": np.zeros(32, np.float32)},
}


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_an_nnx_module_is_called_as_it_is():
    module = Module(nnx.Rngs(0))
    network = as_network(module)
    variables, output = network.init(jax.random.PRNGKey(7), (4, 4, 2))
    assert variables["params"].keys() == {"convs", "norm", "head"}
    assert variables["batch_stats"].keys() == {"norm"}
    assert output.logits.shape == (2, 3)
    key = jax.random.PRNGKey(1)
    trained, updated = network.apply(variables, IMAGES, train=True, key=key)
    again, _ = network.apply(variables, IMAGES, train=True, key=key)
    other, _ = network.apply(variables, IMAGES, train=True, key=jax.random.PRNGKey(2))
    assert_equal(trained.logits, again.logits)
    assert not np.array_equal(trained.logits, other.logits)
    module.eval()
    np.testing.assert_allclose(network.apply(variables, IMAGES, train=False)[0].logits, module(IMAGES), rtol=1e-6)
    module.train()
    module(IMAGES)
    np.testing.assert_allclose(updated["batch_stats"]["norm"]["mean"], module.norm.mean[...], rtol=1e-6)
    # The network has taken a copy: what the module does later does not reach it.
    np.testing.assert_array_equal(network.variables["batch_stats"]["norm"]["mean"], np.zeros(4))


@pytest.mark.slow
def test_nnx_trains_as_linen_does():
    module = Module(nnx.Rngs(0), dropout=0.0)
    first = as_network(module).variables
    params = {"conv": first["params"]["convs"]["0"], "norm": first["params"]["norm"], "head": first["params"]["head"]}
    theirs = cskd_jax.distill(
        Linen(), student_variables={"params": params, "batch_stats": first["batch_stats"]}, **QUIET
    )
    ours = cskd_jax.distill(module, **QUIET)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        ours.variables["params"]["head"], theirs.variables["params"]["head"],
    )  # fmt: skip
    np.testing.assert_allclose(ours.history[-1]["loss"], theirs.history[-1]["loss"], rtol=1e-5)
    trained = cskd_jax.NnxNetwork(module).with_variables(ours.variables)
    logits = Linen().apply(theirs.variables, IMAGES, train=False)
    np.testing.assert_allclose(trained(IMAGES), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "function"])
def test_resumes_bit_for_bit(kind, tmp_path):
    student = {"nnx": Module(nnx.Rngs(0)), "function": function}[kind]
    settings = QUIET | {"student_variables": VARIABLES if kind == "function" else None}
    expected = cskd_jax.distill(student, **settings)
    network = as_network(student)
    start = network.variables if settings["student_variables"] is None else VARIABLES
    trainer = cskd_jax.Trainer(
        {"student": cskd_jax.Student(student, {"cross_entropy": 1.0}, optax.adamw(1e-2), variables=start)},
        data=from_arrays(settings["train"], settings["test"]),
        phases=[cskd_jax.Phase(2)], batch_size=8, callbacks=(), devices=1, log_every=1, workdir=tmp_path,
    )  # fmt: skip
    with pytest.raises(InterruptedRun):
        trainer.fit(Stop(1))
    resumed = trainer.fit()["student"]
    assert_equal(resumed.variables, expected.variables)
    assert resumed.history == expected.history


@pytest.mark.slow
def test_on_two_devices_it_is_said_what_depends_on_them(capsys):
    settings = QUIET | {"callbacks": None, "devices": 2, "epochs": 1}
    cskd_jax.distill(Module(nnx.Rngs(0)), **settings)
    line = "results depend on the number of devices, 2: its batch_stats are computed on each device's part of a batch"
    assert f"{line}, and it draws random numbers on each device" in capsys.readouterr().out
    result = cskd_jax.distill(function, student_variables=VARIABLES, **settings)
    assert "draws random numbers on each device" in capsys.readouterr().out
    # A mean of parts of one size is the mean of the whole: the running mean does not depend on the devices.
    alone = cskd_jax.distill(function, student_variables=VARIABLES, **settings | {"devices": 1})
    np.testing.assert_allclose(
        result.variables["state"]["mean"], alone.variables["state"]["mean"], rtol=1e-5, atol=1e-7
    )


@pytest.mark.slow
def test_teachers():
    module = Module(nnx.Rngs(0))
    kd = QUIET | {"losses": {"kd": 1.0}}
    results = [
        cskd_jax.distill(Linen(), teacher=module, **kd),
        cskd_jax.distill(Linen(), teacher=module, teacher_variables=as_network(module).variables, **kd),
    ]
    assert_equal(results[0].variables, results[1].variables)
    taught = cskd_jax.distill(Linen(), teacher=function, teacher_variables=VARIABLES, **kd)
    assert np.isfinite(taught.metrics["test"]["loss"])
    with pytest.raises(UserError, match="a teacher needs teacher_variables"):
        cskd_jax.distill(Linen(), teacher=function, **kd)


def test_random_numbers_are_noticed():
    images = jax.ShapeDtypeStruct((2, 4, 4, 2), jnp.float32)
    for dropout in (0.0, 0.5):
        network = as_network(Module(nnx.Rngs(0), dropout))
        assert draws_random_numbers(network, network.variables, images) == bool(dropout)
    assert draws_random_numbers(as_network(function), VARIABLES, images)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (function, "a function creates no variables of its own: give it student_variables"),
        (lambda variables, images, train, rngs: images.mean((1, 2)), r"must return \(outputs, updates\)"),
        (lambda variables, images, train, rngs: (images[:, 0, :, 0][:, :3], {"other": 1}), "returns updates of other"),
        (lambda variables, images, train, rngs: (images.mean((1, 2)), {}), r"logits of two images have shape \(2, 2\)"),
    ],
)
def test_functions_that_are_no_networks(student, message):
    variables = None if student is function else VARIABLES
    with pytest.raises(UserError, match=message):
        cskd_jax.distill(student, student_variables=variables, **QUIET)


def test_what_has_no_paths():
    with pytest.raises(
        TypeError, match=r"only in a flax.linen.Module; got Module: instead, have it return .*'features'"
    ):
        as_network(Module(nnx.Rngs(0)), features=("convs/0",))
    for paths in ({}, {"features": ("convs/0",)}):
        with pytest.raises(TypeError, match="a network must be an instance; got the class Module"):
            as_network(Module, **paths)
