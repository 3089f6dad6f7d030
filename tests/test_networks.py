"""Networks that this package has not written: how they are called, what they return, what is taken from within."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.models import BasicBlock, ModelOutput, ResNet, create_model
from cskd_jax.models.layers import BatchNorm
from cskd_jax.training.adapters import LinenNetwork, as_network
from cskd_jax.training.networks import as_output, draws_random_numbers
from cskd_jax.training.state import init_network

IMAGES = jnp.linspace(0, 1, 2 * 4 * 4 * 1, dtype=jnp.float32).reshape(2, 4, 4, 1)


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1)))


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, *, training=False):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not training)(x.reshape(len(x), -1)))


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, is_training):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not is_training)(x.reshape(len(x), -1)))


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=deterministic)(x.reshape(len(x), -1)))


class NoFlag(nn.Module):
    """Draws from a stream of its own name, if it has one."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        if self.has_rng("noise"):
            x += jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dense(3)(x)


class Plain(nn.Module):
    """Two collections besides the parameters, a list as a field, submodules to be taken by path."""

    widths: list

    @nn.compact
    def __call__(self, x, train):
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        count = self.variable("counters", "calls", jnp.zeros, (), jnp.int32)
        mean = self.variable("averages", "mean", jnp.zeros, (), jnp.float32)
        if train:
            count.value += 1
            mean.value = x.mean()
        self.sow("intermediates", "map", x)
        return {"logits": nn.Dense(3, name="head")(x.mean((1, 2))), "embedding": x.mean((1, 2))}


def created(module, **paths):
    network = as_network(module, **paths)
    variables, output = network.init(jax.random.PRNGKey(0), IMAGES.shape[1:])
    return network, variables, output


class PositionOnly(nn.Module):
    @nn.compact
    def __call__(self, x, train, /):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1)))


class RunningAverage(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average=True):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=use_running_average)(x.reshape(len(x), -1)))


Remat = nn.remat(Train, static_argnums=(2,))


@pytest.mark.parametrize("module", [Train, Training, IsTraining, Deterministic, PositionOnly, RunningAverage, Remat])
def test_training_mode_is_asked_for_by_its_name(module):
    network, variables, _ = created(module())
    evaluated = [network.apply(variables, IMAGES, train=False)[0].logits for _ in range(2)]
    np.testing.assert_array_equal(*evaluated)
    trained = [network.apply(variables, IMAGES, train=True, key=jax.random.PRNGKey(i))[0].logits for i in range(2)]
    assert not np.array_equal(*trained)
    assert draws_random_numbers(network, variables, jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_a_network_that_passes_a_key_on_does_not_draw(name):
    """The jitted blocks of a ResNet are given the key of the step, though they have no use for it."""
    network = as_network(create_model(name, num_classes=3))
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(lambda key: init_network(network, key, images.shape[1:])[0], jax.random.PRNGKey(0))
    assert not draws_random_numbers(network, variables, images)


def test_a_module_without_a_flag_and_a_stream_of_its_own():
    network, variables, _ = created(LinenNetwork(NoFlag(), streams=("noise",)))
    assert not network.has_training_mode
    trained = [network.apply(variables, IMAGES, train=True, key=jax.random.PRNGKey(i))[0].logits for i in range(2)]
    assert not np.array_equal(*trained)


def test_weights_are_those_of_the_module_itself():
    """An adapter that wrapped the module in another would change the paths, and with them the draws."""
    key = jax.random.PRNGKey(0)
    expected = Train().init(key, jnp.zeros((2, 4, 4, 1)), False)
    jax.tree.map(np.testing.assert_array_equal, init_network(as_network(Train()), key, (4, 4, 1))[0], expected)


def test_any_collections_are_updated_in_training_only():
    network, variables, _ = created(Plain([2]))
    assert variables.keys() == {"params", "counters", "averages"}
    output, updated = network.apply(variables, IMAGES, train=True)
    assert updated.keys() == {"counters", "averages"}
    assert updated["counters"]["calls"] == 1
    assert output.embedding.shape == (2, 2)
    assert network.apply(variables, IMAGES, train=False)[1] == {}


def test_features_by_path():
    network, variables, output = created(Plain([2, 4]), features=("Conv_0", "Conv_1", "map"), embedding="head")
    assert [x.shape for x in output.features] == [(2, 4, 4, 2), (2, 4, 4, 4), (2, 4, 4, 4)]
    assert output.embedding.shape == (2, 3)
    output, updated = network.apply(variables, IMAGES, train=True)
    assert updated.keys() == {"counters", "averages"}
    np.testing.assert_array_equal(output.features[2], nn.relu(output.features[1]))


@pytest.mark.slow
def test_features_of_jitted_blocks_by_path():
    module = ResNet(num_classes=3, stage_sizes=(1, 3), block=BasicBlock, stage_widths=(4, 6))
    _, variables, output = created(module, features=("stage1_block1", "stage2_block3"))
    inside = module.apply(variables, jnp.zeros((2, 4, 4, 1)), train=False)
    for found, expected in zip(output.features, inside.preactivations, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_missing_path_names_the_nearest():
    with pytest.raises(ValueError, match=r"Plain has no output at path 'Conv_2'; the nearest are .*Conv_1"):
        created(Plain([2, 4]), features=("Conv_2",))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"logit": jnp.zeros((2, 3))}, "dictionary with 'logit'; it must hold 'logits'"),
        ((jnp.zeros((2, 3)),), "returns a tuple; it must return logits"),
        ({"logits": jnp.zeros((2, 3)), "features": jnp.zeros((2, 3))}, "returns features as ArrayImpl, not as a tuple"),
        ({"logits": jnp.zeros((2, 3)), "features": {"a": 1}}, "returns features as dict, not as a tuple"),
    ],
)
def test_outputs_that_are_none(outputs, message):
    with pytest.raises(ValueError, match=message):
        as_output(outputs)


def test_logits_are_at_least_float32():
    assert as_output(jnp.zeros((2, 3), jnp.bfloat16)).logits.dtype == jnp.float32
    assert as_output(ModelOutput(jnp.zeros((2, 3)))).features == ()


def test_what_is_no_network():
    with pytest.raises(TypeError, match="must be an instance; got the class Train"):
        as_network(Train)
    with pytest.raises(TypeError, match="got int"):
        as_network(3)


def test_networks_of_this_package_follow_the_axis():
    module = ResNet(num_classes=3, stage_sizes=(1,), block=BasicBlock, stage_widths=(4,))
    network = as_network(module)
    assert network.synchronized
    assert network.on_axis("batch").module.axis_name == "batch"
    assert network.on_axis("batch").on_axis(None) == LinenNetwork(module)
    assert not as_network(Train()).synchronized


def test_modules_that_do_not_train_are_in_evaluation_mode():
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            first = BatchNorm(name="first")(images, train=train)
            return BatchNorm(name="second")(2 * first, train=train).mean((1, 2))

    images = jnp.asarray(np.random.default_rng(0).normal(3, 2, (4, 2, 2, 3)).astype(np.float32))
    network = LinenNetwork(Normalized())
    variables, _ = network.init(jax.random.key(0), images.shape[1:])
    whole, part, none = (
        LinenNetwork(Normalized(), trainable=trainable).apply(variables, images, train=True)
        for trainable in (lambda path: True, lambda path: path[0] == "first", lambda path: False)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, network.apply(variables, images, train=True))
    first, second = (part[1]["batch_stats"][name]["mean"] for name in ("first", "second"))
    assert first.any()
    assert not second.any()
    evaluated = BatchNorm().apply(
        {name: collection["second"] for name, collection in variables.items()},
        2 * (images - images.mean((0, 1, 2))) / np.sqrt(images.var((0, 1, 2)) + 1e-5),
        train=False,
    )
    np.testing.assert_allclose(part[0].logits, evaluated.mean((1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(none[0].logits, network.apply(variables, images, train=False)[0].logits)
    assert none[1] == {}
