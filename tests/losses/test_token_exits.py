"""The exits of OFA from stages of tokens: against a block of models/, merging by hand, several devices, and a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import cskd_jax
from cskd_jax.losses import LOSSES
from cskd_jax.losses._token_exits import TokenExit, _Block, _PatchMerging
from cskd_jax.models import create_model
from cskd_jax.models import transformer_layers as layers
from cskd_jax.models.outputs import ModelOutput, TokenGrid
from tests.method_checks import any_number_of_devices, assert_same_on_devices, create, make_inputs

RNG = np.random.default_rng(0)


def random_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


@pytest.mark.slow
def test_block_is_that_of_a_vision_transformer(x64):
    tokens = jnp.asarray(RNG.normal(size=(2, 5, 8)))
    params = random_like(_Block().init(jax.random.key(0), tokens)["params"])
    dense, norm = functools.partial(nn.Dense, dtype=jnp.float64), functools.partial(layers.LayerNorm, 1e-5, jnp.float64)
    attention = functools.partial(layers.Attention, 4, dense, norm, qkv_bias=False, proj_bias=True, qk_norm=False)
    dropout = functools.partial(layers.Dropout, 0.0)
    mlp = functools.partial(layers.MLP, "gelu", 32, dense, norm, use_norm=False, use_bias=True, dropout=dropout)
    block = layers.Block(attention, mlp, norm, dropout, None)
    theirs = {"attn": {name: params[name] for name in ("qkv", "proj")}}
    theirs |= {name: params[name] for name in ("norm1", "norm2")} | {"mlp": {n: params[n] for n in ("fc1", "fc2")}}
    expected = block.apply({"params": theirs}, tokens, None, train=False)
    np.testing.assert_allclose(_Block().apply({"params": params}, tokens), expected, rtol=1e-12)


def test_merging(x64):
    patches = RNG.normal(size=(2, 4, 6, 3))
    params = random_like(_PatchMerging(True).init(jax.random.key(0), patches)["params"])
    found = _PatchMerging(False).apply({"params": params}, patches)
    square = patches[1, 2:4, 4:6]
    four = np.concatenate([square[0, 0], square[1, 0], square[0, 1], square[1, 1]])
    four = (four - four.mean()) / np.sqrt(four.var() + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    assert found.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(found[1, 1, 2], four @ params["reduction"]["kernel"], rtol=1e-10)
    active = _PatchMerging(True).apply({"params": params}, patches)
    np.testing.assert_allclose(active, jax.nn.gelu(found, approximate=False), rtol=1e-10)


@pytest.mark.parametrize(("side", "merges"), [(2, 0), (13, 0), (14, 1), (28, 2), (56, 3)])
def test_patches_are_merged_down_to_seven(side, merges):
    tokens = jnp.zeros((1, 1 + side * side, 8))
    leave = TokenExit(num_classes=3, blocks=2)
    params = jax.eval_shape(lambda: leave.init(jax.random.key(0), tokens, TokenGrid(1, side, side)))["params"]
    assert sorted(name for name in params if name.startswith("merging")) == [f"merging{n + 1}" for n in range(merges)]
    assert {"block1", "block2", "classifier"} <= params.keys()


@pytest.mark.parametrize("first", [0, 1, 3])
def test_which_tokens_are_classified(first):
    tokens = jnp.asarray(RNG.normal(size=(2, first + 4, 8)), jnp.float32)
    leave = TokenExit(num_classes=3, blocks=0)
    variables = leave.init(jax.random.key(0), tokens, TokenGrid(first, 2, 2))
    feature = tokens[:, 0] if first else tokens.mean(axis=1)
    found = leave.apply(variables, tokens, TokenGrid(first, 2, 2))
    np.testing.assert_allclose(found, feature @ variables["params"]["classifier"]["kernel"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((1, 4, 6), TokenGrid(0, 2, 2), "but the token size 6 is not divisible by that"),
        ((1, 15 * 14, 8), TokenGrid(0, 15, 14), "patches, but one is odd"),
    ],
)
def test_impossible_tokens(shape, grid, message):
    with pytest.raises(ValueError, match=message):
        TokenExit(num_classes=3, blocks=1).init(jax.random.key(0), jnp.zeros(shape), grid)


def token_inputs():
    """Inputs whose student has three stages of a class token and 2x2 patches."""
    inputs = make_inputs()
    tokens = tuple(RNG.normal(size=(len(inputs.labels), 5, 8)) for _ in range(3))
    student = ModelOutput(inputs.student.logits, tokens, tokens[-1][:, 0], grid=TokenGrid(1, 2, 2))
    return inputs._replace(student=student)


@any_number_of_devices
@pytest.mark.slow
def test_devices_share_one_global_batch(devices, x64):
    inputs = token_inputs()
    method, variables = create(LOSSES["ofa"], inputs)
    params = variables["params"]
    assert [sum(name.startswith("block") for name in params[f"exit{n}"]) for n in (1, 2, 3)] == [2, 1, 1]
    assert_same_on_devices(method, variables, inputs, devices)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_transformer_learns_from_a_convolutional_network():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, 8, 8, 3), np.uint8), (np.arange(16) % 3).astype(np.int32)
    settings = {"patch_size": 4, "image_size": (8, 8), "depth": 2}
    teacher = create_model("resnet8", num_classes=3, width=0.25)
    result = cskd_jax.distill(
        create_model("deit_tiny", num_classes=3, width=1 / 16, settings=settings),
        teacher=teacher,
        teacher_variables=teacher.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False),
        losses={"cross_entropy": 1.0, "ofa": 1.0},
        optimizer=optax.adam(3e-3),
        train=(images, labels),
        test=(images, labels),
        epochs=4,
        batch_size=16,
        devices=1,
        callbacks=(),
    )
    rows = [row for row in result.history if row["split"] == "train"]
    assert rows[-1]["ofa/exits"] < rows[0]["ofa/exits"]
