"""Vision Transformers: values of timm's, tokens, interpolation, random draws, and what a configuration sets."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.errors import UserError
from cskd_jax.interop.matching import match
from cskd_jax.interop.names import to_torch
from cskd_jax.losses import LossInputs, attention_transfer_loss
from cskd_jax.models import ModelOutput, TokenGrid, count_parameters, create_model
from cskd_jax.models.transformer_layers import Dropout, StochasticDepth
from cskd_jax.training.objective import Objective
from tests.torch_files import assert_same_variables

TINY = {"patch_size": 4, "image_size": (8, 12), "depth": 2}
WIDTH = 1 / 16
KEY = jax.random.key(0)


def tiny(num_classes=5, width=WIDTH, dtype=jnp.float32, **settings):
    """A network of tokens of 12 numbers, in 2 blocks, for images of 2 x 3 patches."""
    return create_model("deit_tiny", num_classes=num_classes, width=width, dtype=dtype, settings=TINY | settings)


def random_variables(module, channels=3, seed=0):
    """Variables of about the size of trained ones, so that every part of the network matters."""
    image = (2, *(module.image_size or (8, 12)), channels)
    rng, init = np.random.default_rng(seed), functools.partial(module.init, train=False)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), jnp.zeros(image)))
    return jax.tree.map(lambda x: rng.normal(0.1, 0.3, x.shape).astype(x.dtype), shapes)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_vit_golden_values(vit_file, dtype, tolerance, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    golden = np.load(vit_file)
    state = {name.removeprefix("state/"): golden[name] for name in golden.files if name.startswith("state/")}
    size = state["patch_embed.proj.weight"].shape[0]
    build = functools.partial(
        create_model, "deit_tiny", num_classes=len(state.get("head.weight", ())), width=size / 192, dtype=dtype
    )
    settings = {"num_heads": int(golden["num_heads"])}
    images = golden["images_nhwc"].astype(dtype)
    found = match(build(settings=settings), images.shape[-1], state, image_size=images.shape[1:3])
    module = build(settings=settings | found.settings)
    assert module.patch_size == golden["patch_size"]
    output = jax.jit(functools.partial(module.clone(num_stages=module.depth).apply, train=False))(
        found.variables, images
    )
    values = {"logits": output.logits, "tokens_after_norm": output.features[-1]}
    values |= {f"block{number}": tokens for number, tokens in enumerate(output.stages, start=1)}
    expected = {name: golden[name] for name in golden.files if name.startswith(("block", "logits", "tokens"))}
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert value.dtype == dtype
        error = np.abs(np.asarray(value, np.float64) - expected[name]).max()
        assert error <= tolerance * np.abs(expected[name]).max(), name
    back = to_torch(module, found.variables, batches=1)
    assert back.keys() | set(found.unused) == state.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def erf(x):
    return np.vectorize(math.erf)(x)


def normalize(state, name, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def silu(x):
    return x / (1 + np.exp(-x))


def reference_block(state, block, x, heads):
    """A block as timm computes it, written out for one image x [T, D]."""

    def norm(name, x):
        return normalize(state, f"{block}.{name}", x) if f"{block}.{name}.weight" in state else x

    def dense(name, x):
        return linear(state, f"{block}.{name}", x)

    mixed, y = [], dense("attn.qkv", norm("norm1", x))
    size = x.shape[-1] // heads
    for head in range(heads):
        query, key, value = (y[:, part * heads * size + head * size :][:, :size] for part in range(3))
        query, key = norm("attn.q_norm", query), norm("attn.k_norm", key)
        scores = np.exp(query @ key.T / np.sqrt(size))
        mixed.append(scores / scores.sum(-1, keepdims=True) @ value)
    x = x + dense("attn.proj", np.concatenate(mixed, -1)) * state.get(f"{block}.ls1.gamma", 1)
    y = norm("norm2", x)
    if f"{block}.mlp.fc1_g.weight" in state:
        y = silu(dense("mlp.fc1_g", y)) * dense("mlp.fc1_x", y)
    else:
        y = dense("mlp.fc1", y)
        if state[f"{block}.mlp.fc2.weight"].shape[1] < y.shape[-1]:
            gate, y = np.split(y, 2, -1)
            y = silu(gate) * y
        else:
            y = y * (1 + erf(y / np.sqrt(2))) / 2
    return x + dense("mlp.fc2", norm("mlp.norm", y)) * state.get(f"{block}.ls2.gamma", 1)


def reference(state, image, heads, depth, patch_size=4):
    """Tokens after each block and logits for one image, from a state dict of timm."""
    height, width, _ = image.shape
    kernel = state["patch_embed.proj.weight"]
    patches = [
        np.einsum("yxc,dcyx->d", image[y : y + patch_size, x : x + patch_size], kernel)
        + state.get("patch_embed.proj.bias", 0)
        for y in range(0, height, patch_size)
        for x in range(0, width, patch_size)
    ]
    first = [state[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in state]
    position = state["pos_embed"][0]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    before = sum(map(len, first))
    if len(position) == len(patches):
        x = np.concatenate([*first, patches + position])
    elif len(position) == len(patches) + before:
        x = np.concatenate([*first, patches]) + position
    else:  # As in DINOv2: registers come between after the positions were added.
        x = np.concatenate([*(first[:-1] if registers else first), patches]) + position
        x = np.concatenate([x[: before - registers], first[-1], x[before - registers :]])
    x, blocks = normalize(state, "norm_pre", x) if "norm_pre.weight" in state else x, []
    for index in range(depth):
        x = reference_block(state, f"blocks.{index}", x, heads)
        blocks.append(x)
    x = normalize(state, "norm", x) if "norm.weight" in state else x
    average = "fc_norm.weight" in state or "cls_token" not in state
    pooled = x[before:].mean(0) if average else x[0]
    pooled = normalize(state, "fc_norm", pooled) if "fc_norm.weight" in state else pooled
    if "head.weight" not in state:
        return blocks, pooled
    logits = linear(state, "head", pooled)
    return blocks, (logits + linear(state, "head_dist", x[1])) / 2 if "dist_token" in state else logits


VARIANTS = {
    "registers without positions, SwiGLU": {
        "register_tokens": 2, "position_tokens": "none", "layer_scale": 1.0, "mlp": "swiglu", "qk_norm": True,
    },
    "registers as in DINOv2": {"register_tokens": 2, "position_tokens": "class", "num_heads": 2, "depth": 3},
    "average, no class token": {
        "pool": "average", "class_token": False, "qkv_bias": False, "pre_norm": True, "patch_bias": False,
        "mlp": "swiglu_split", "mlp_norm": True, "mlp_ratio": 1.5,
    },
    "average beside a class token, normalized before": {"pool": "average", "last_norm": "tokens", "class_token": False},
    "distillation token": {"distillation_token": True, "register_tokens": 1, "proj_bias": False},
}  # fmt: skip


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=() if "SwiGLU" in name else pytest.mark.slow) for name in VARIANTS]
)
def test_settings_compute_and_read_as_in_timm(variant, x64):
    settings = TINY | VARIANTS[variant]
    module = tiny(dtype=jnp.float64, **VARIANTS[variant]).clone(num_stages=settings["depth"])
    variables = random_variables(module)
    state = to_torch(module, variables, batches=1)
    images = np.random.default_rng(1).normal(size=(2, *TINY["image_size"], 3))
    output = jax.jit(functools.partial(module.apply, train=False))(variables, images)
    for index, image in enumerate(images):
        blocks, logits = reference(state, image, module.num_heads, module.depth)
        for ours, expected in zip(output.stages, blocks, strict=True):
            np.testing.assert_allclose(ours[index], expected, rtol=1e-10, atol=1e-11)
        np.testing.assert_allclose(output.logits[index], logits, rtol=1e-10, atol=1e-11)

    # All but the number of heads is read from the tensors.
    heads = {"num_heads": module.num_heads}
    plain = create_model("deit_tiny", num_classes=5, width=WIDTH, dtype=jnp.float64, settings=heads)
    found = match(plain, 3, state, image_size=TINY["image_size"])
    assert_same_variables(found.variables, variables)
    read = plain.clone(**found.settings, num_stages=module.num_stages)
    assert read == module.clone(layer_scale=read.layer_scale)
    np.testing.assert_array_equal(
        jax.jit(functools.partial(read.apply, train=False))(found.variables, images).logits, output.logits
    )


def test_names_of_dinov2():
    module = tiny(num_classes=0, register_tokens=2, position_tokens="class", layer_scale=1e-5, mlp="swiglu")
    variables = random_variables(module)
    state = {}
    for name, array in to_torch(module, variables, batches=1).items():
        for ours, theirs in (("reg_token", "register_tokens"), ("mlp.fc1", "mlp.w12"), ("mlp.fc2", "mlp.w3")):
            name = name.replace(ours, theirs)
        state[name] = array
    found = match(
        create_model("deit_tiny", num_classes=0, width=WIDTH), 3, state | {"mask_token": np.zeros((1, 12), np.float32)},
        image_size=TINY["image_size"],
    )  # fmt: skip
    assert found.unused == ["mask_token"]
    assert_same_variables(found.variables, variables)
    output = jax.eval_shape(functools.partial(module.apply, train=False), variables, jnp.zeros((2, 8, 12, 3)))
    assert output.logits.shape == output.embedding.shape == (2, 12)


@pytest.mark.parametrize(
    ("size", "expected"),
    [  # torch.nn.functional.interpolate(mode="bicubic", antialias=True)
        ((2, 2), [[10.174869, 12.749249], [16.838245, 9.265368]]),
        (
            (3, 5),
            [
                [4.668687, 6.821727, 11.474971, 11.701239, 5.531883],
                [7.958775, 11.841486, 20.439071, 20.220854, 7.530494],
                [17.834965, 26.321784, 14.01845, 0.199231, 5.836296],
            ],
        ),
    ],
)
def test_position_embedding_is_interpolated_as_in_torch(size, expected):
    module = tiny(image_size=(16, 16), register_tokens=1, depth=1)
    variables = jax.tree.map(np.zeros_like, random_variables(module))
    position = np.concatenate([[50.0, 60.0], (np.arange(16.0) % 7) ** 2])
    variables["params"]["pos_embed"] += np.float32(position[None, :, None])
    images = np.zeros((1, 4 * size[0], 4 * size[1], 3), np.float32)
    stem = jax.jit(lambda variables, images: module.apply(variables, images, train=False).stem)(variables, images)
    np.testing.assert_allclose(stem[0, :, 5], [50, 60, *np.ravel(expected)], atol=2e-5)


def test_shapes_and_parameters():
    # Numbers of parameters in timm: deit_tiny_patch16_224 and its distilled form, deit_small and deit_base.
    for name, settings, expected in [
        ("deit_tiny", {}, 5717416),
        ("deit_tiny", {"distillation_token": True}, 5910800),
        ("deit_small", {}, 22050664),
        ("deit_base", {}, 86567656),
    ]:
        module = create_model(name, num_classes=1000, settings=settings)
        init = functools.partial(module.init_with_output, train=False)
        output, variables = jax.eval_shape(lambda key, init=init: init(key, jnp.zeros((2, 224, 224, 3))), KEY)
        assert count_parameters(variables["params"]) == expected
        tokens = (2, 197 + len(settings), module.embed_dim)
        assert [x.shape for x in output.features] == [x.shape for x in output.stages] == [tokens] * 4
        assert output.stem.shape == tokens
        assert output.logits.shape == (2, 1000)
        assert output.grid.to_map(jnp.zeros(tokens)).shape == (2, 14, 14, module.embed_dim)


def test_bfloat16_leaves_logits_and_parameters_in_float32():
    module = tiny(dtype=jnp.bfloat16, layer_scale=0.1, dropout=0.1, stochastic_depth=0.1, qk_norm=True)
    init = functools.partial(module.init_with_output, train=False)
    output, variables = jax.eval_shape(lambda key: init(key, jnp.zeros((2, 8, 12, 3))), KEY)
    halves = (output.features, output.maps, output.embedding)
    assert {x.dtype for x in jax.tree.leaves(halves)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((output.logits, variables))} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_initial_weights_are_small_normal_numbers_and_zeros():
    module = tiny(width=0.25, depth=1, patch_size=2, image_size=(8, 8), distillation_token=True, register_tokens=3)
    params = jax.jit(functools.partial(module.init, train=False))(KEY, jnp.zeros((2, 8, 8, 3)))["params"]
    for path, array in jax.tree.leaves_with_path(params):
        name = path[-1].key
        if path[0].key == "patch_embed" or name in ("kernel", "pos_embed", "dist_token"):
            deviation = 12**-0.5 / 3**0.5 if path[0].key == "patch_embed" else 0.02
            assert np.std(array) == pytest.approx(deviation, rel=0.3), path
        else:
            assert np.abs(array - float(name == "scale")).max() < 1e-5, path


@pytest.mark.slow
def test_random_draws_do_not_depend_on_the_number_of_devices():
    module = tiny(depth=1, dropout=0.3, stochastic_depth=0.5)
    variables = random_variables(module)
    images = np.random.default_rng(2).normal(size=(8, 8, 12, 3)).astype(np.float32)

    def apply(module, images):
        return module.apply(variables, images, train=True, rngs={"dropout": KEY}).features[-1]

    whole = jax.jit(functools.partial(apply, module))(images)
    parts = images.reshape(4, 2, *images.shape[1:])
    split = jax.jit(jax.vmap(functools.partial(apply, module.clone(axis_name="batch")), axis_name="batch"))(parts)
    np.testing.assert_allclose(split.reshape(whole.shape), whole, rtol=1e-4, atol=1e-5)
    # Every image has draws of its own, even if all images are equal.
    same = jax.jit(functools.partial(apply, module))(np.repeat(images[:1], 8, 0))
    assert len(np.unique(np.asarray(same).reshape(8, -1)[:, 0])) == 8


def test_random_draws_keep_the_mean():
    x = jnp.ones((2000, 3))
    y = jax.jit(functools.partial(Dropout(0.25).apply, {}, train=True, rngs={"dropout": KEY}))(x)
    assert set(np.unique(y)) == {0, np.float32(4 / 3)}
    assert y.mean() == pytest.approx(1, abs=0.03)
    factors = jax.jit(lambda: StochasticDepth(0.5, 3).apply({}, 2000, jnp.float32, rngs={"dropout": KEY}))()
    np.testing.assert_array_equal(factors[:, 0], 1)
    for index, rate in ((1, 0.25), (2, 0.5)):
        assert set(np.unique(factors[:, index])) == {0, np.float32(1 / (1 - rate))}
        np.testing.assert_allclose(factors[:, index].mean(0), 1, atol=0.07)
    # The two branches of a block are dropped independently.
    assert np.mean(factors[:, 2, 0] == factors[:, 2, 1]) == pytest.approx(0.5, abs=0.05)


def test_losses_get_tokens_as_maps():
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    tokens = draw(2, 10, 12), draw(2, 10, 12)
    student = ModelOutput(draw(2, 5), tokens, grid=TokenGrid(2, 2, 4))
    maps = draw(2, 8, 4, 6), draw(2, 4, 2, 6)
    teacher = ModelOutput(student.logits, maps)
    inputs = LossInputs(student, teacher, jnp.zeros(2, jnp.int32))
    step = jnp.zeros((), jnp.int32)
    objective = Objective.create({"at": 1.0}, num_classes=5)
    total, _, _ = jax.jit(lambda inputs, step: objective({}, {}, inputs, step))(inputs, step)
    # Two of the tokens are no patches; the teacher's maps are pooled to the 2 x 4 patches.
    loss = jax.jit(lambda student, teacher: sum(map(attention_transfer_loss, student, teacher)))
    np.testing.assert_allclose(total, loss([x[:, 2:].reshape(2, 2, 4, 12) for x in tokens], maps), rtol=1e-6)
    reads, _ = objective.find_reads({}, {}, inputs)
    assert reads.features == (True, True)
    ab = Objective.create({"ab": 1.0}, num_classes=5)
    with pytest.raises(ValueError, match="no ReLU follows the tokens of the student"):
        jax.eval_shape(ab.init, KEY, inputs)


@pytest.mark.parametrize(
    ("settings", "images", "message"),
    [
        ({}, (9, 12), "images of 9x12 cannot be divided into patches of 4x4"),
        ({"class_token": False}, (8, 12), "without a class token, pool must be average"),
        ({"pool": "average", "distillation_token": True}, (8, 12), "with a distillation token, pool must be token"),
    ],
)
def test_impossible_networks(settings, images, message):
    init = functools.partial(tiny(**settings).init, train=False)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: init(KEY, jnp.zeros((1, *images, 3))))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet8", {"patch_size": 4}, "patch_size is 4; resnet8 has no such setting, nor any other"),
        ("deit_tiny", {"patches": 4}, "patches is 4; deit_tiny has no such setting, only patch_size, image_size"),
        ("deit_tiny", {"patch_size": True}, "patch_size is True; it must be an integer from 1 to 1024"),
        ("deit_tiny", {"pool": "max"}, "pool is 'max'; it must be one of token, average"),
        ("deit_tiny", {"depth": 10**6}, "depth is 1000000; it must be an integer from 1 to 200"),
    ],
)
def test_settings_that_a_network_does_not_have(name, settings, message):
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=5, settings=settings)


def test_only_vision_transformers_may_have_no_head():
    with pytest.raises(UserError, match="resnet8 needs a number of classes"):
        create_model("resnet8", num_classes=0)


def test_weights_start_normal():
    """timm's truncation is a hundred deviations away."""
    module = create_model("deit_tiny", num_classes=10)

    @jax.jit
    def init(key):
        return module.init(key, jnp.zeros((1, 224, 224, 3)), train=False)["params"]["classifier"]["kernel"]

    kernel = init(jax.random.key(0))
    np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
    assert np.abs(kernel).max() > 2.5 * 0.02
