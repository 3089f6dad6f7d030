"""Every network that a configuration may name: parameters, shapes, one gradient step."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.models import MODELS, count_parameters, create_model
from cskd_jax.models.shufflenet import shuffle_channels
from cskd_jax.models.vision_transformer import VISION_TRANSFORMERS
from tests.tiers import chosen


class Row(NamedTuple):
    """What a network of width `width` is: `stages` are (side, channels) of the maps of an image of side `side`."""

    parameters: int
    stages: tuple[tuple[int, int], ...]
    num_classes: int = 100
    width: float = 1.0
    side: int = 32
    # Number of cells of the last map whose means are the embedding.
    cells: int = 1
    # Of the network that takes a gradient step.
    step_width: float = 0.125


def small(parameters, expansion=1):
    channels = [expansion * width for width in (64, 128, 256, 512)]
    return Row(parameters, tuple(zip((32, 16, 8, 4), channels, strict=True)), step_width=0.0625)


def imagenet(parameters, expansion=1):
    channels = [expansion * width for width in (64, 128, 256, 512)]
    stages = tuple(zip((56, 28, 14, 7), channels, strict=True))
    return Row(parameters, stages, num_classes=1000, side=224, step_width=0.0625)


def cifar(parameters, widening=1):
    channels = [widening * width for width in (16, 32, 64)]
    return Row(parameters, tuple(zip((32, 16, 8), channels, strict=True)), step_width=0.25)


def stem64(parameters):
    return cifar(parameters)._replace(cells=4)


def vgg(parameters):
    return Row(parameters, ((16, 128), (8, 256), (4, 512), (4, 512)), step_width=0.0625)


# One more block in each of three stages of 16, 32, 64 channels: two 3x3 kernels with normalization.
BLOCK_OF_EACH_STAGE = sum(2 * (9 * width * width + 2 * width) for width in (16, 32, 64))
# Two 1x1 kernels with normalization, from 16 to 32 and from 32 to 64 channels.
SHORTCUTS = sum(width * width // 2 + 2 * width for width in (32, 64))
# What 100 categories rather than 1000 take off a linear layer.
FEWER_CATEGORIES = {channels: 900 * (channels + 1) for channels in (1280, 2048)}


def vgg_parameters(*widths):
    """3x3 kernels with bias, scale and shift from the image through `widths`, and a linear layer with 100 outputs."""
    pairs = zip((3, *widths[:-1]), widths, strict=True)
    return sum(9 * before * after + 3 * after for before, after in pairs) + (widths[-1] + 1) * 100


# Numbers are those of torchvision (224) and of the comparison tables of the field (MobileNetV2 of width 0.5); what
# "follows" is derived in test_numbers_that_follow_from_others.
TABLE = {
    "resnet18": small(11220132),
    "resnet34": small(21328292),
    "resnet50": small(23705252, 4),
    "resnet101": small(42697380, 4),
    "resnet152": small(58341028, 4),
    "resnet18_crd": small(11220132),
    "resnet34_crd": small(21328292),
    "resnet50_crd": small(23705252, 4),
    "resnet101_crd": small(42697380, 4),
    "resnet152_crd": small(58341028, 4),
    "resnet18_224": imagenet(11689512),
    "resnet34_224": imagenet(21797672),
    "resnet50_224": imagenet(25557032, 4),
    "resnet101_224": imagenet(44549160, 4),
    "resnet152_224": imagenet(60192808, 4),
    "resnet8": cifar(83892),
    "resnet14": cifar(181108),  # follows
    "resnet20": cifar(278324),
    "resnet32": cifar(472756),
    "resnet44": cifar(667188),  # follows
    "resnet56": cifar(861620),
    "resnet110": cifar(1736564),
    "resnet8x4": cifar(1233540, 4),
    "resnet32x4": cifar(7433860, 4),
    "resnet20_option_a": cifar(275572),  # follows
    "resnet32_option_a": cifar(470004),  # follows
    "resnet44_option_a": cifar(664436),  # follows
    "resnet56_option_a": cifar(858868),  # follows
    "resnet110_option_a": cifar(1733812),  # follows
    "resnet8_stem64": stem64(112452),  # follows
    "resnet14_stem64": stem64(209668),  # follows
    "resnet20_stem64": stem64(306884),  # follows
    "resnet26_stem64": stem64(404100),  # follows
    "resnet32_stem64": stem64(501316),  # follows
    "wrn_16_1": cifar(180916),  # follows
    "wrn_16_2": cifar(703284, 2),
    "wrn_40_1": cifar(569780),
    "wrn_40_2": cifar(2255156, 2),
    "vgg8": vgg(3965028),
    "vgg11": vgg(9277284),  # follows
    "vgg13": vgg(9462180),
    "vgg16": vgg(14774436),  # follows
    "vgg19": vgg(20086692),  # follows
    "mobilenet_v2": Row(2353060, ((32, 24), (16, 32), (8, 96), (4, 1280))),  # follows
    "mobilenet_v2_crd": Row(812836, ((16, 12), (8, 16), (4, 48), (2, 1280)), width=0.5),
    "shufflenet_v1": Row(949258, ((16, 240), (8, 480), (4, 960))),
    "shufflenet_v2": Row(1355528, ((16, 116), (8, 232), (4, 1024))),
    "inception_v3": Row(21990468, ((32, 64), (16, 288), (8, 768), (4, 2048))),  # follows
}
# Their gradient step compiles in seconds.
FAST = ("resnet8",)
KINDS = ("wrn_16_1", "vgg8", "shufflenet_v1")
# More of the same blocks as a network that takes its gradient step: theirs is traced, not compiled.
DEEP = tuple(
    name
    for name in TABLE
    if name.removesuffix("_224") in ("resnet34", "resnet101", "resnet152") or name.endswith(("_crd", "_option_a"))
    if name != "mobilenet_v2_crd"
) + (
    "resnet14_stem64",
    "resnet20_stem64",
    "resnet26_stem64",
    "resnet32_stem64",
    "resnet50_224",
    "resnet50_crd",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resnet8x4",
    "resnet32x4",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
)


def test_every_model_has_a_row():
    assert TABLE.keys() | VISION_TRANSFORMERS.keys() == MODELS.keys()


def test_numbers_that_follow_from_others():
    rows = {name: row.parameters for name, row in TABLE.items()}
    assert rows["resnet14"] == rows["resnet8"] + BLOCK_OF_EACH_STAGE
    assert rows["resnet44"] == rows["resnet32"] + 2 * BLOCK_OF_EACH_STAGE
    for depth in (20, 32, 44, 56, 110):
        assert rows[f"resnet{depth}_option_a"] == rows[f"resnet{depth}"] - SHORTCUTS
    # The repository's 89322, and what 90 more categories add.
    assert rows["resnet8_stem64"] == 89322 + 90 * 257
    for blocks, depth in enumerate((8, 14, 20, 26, 32)):
        assert rows[f"resnet{depth}_stem64"] == rows["resnet8_stem64"] + blocks * BLOCK_OF_EACH_STAGE
    assert rows["wrn_16_1"] == rows["wrn_40_1"] - 4 * BLOCK_OF_EACH_STAGE
    for name, sizes in {
        "vgg8": (1, 1, 1, 1, 1),
        "vgg11": (1, 1, 2, 2, 2),
        "vgg13": (2, 2, 2, 2, 2),
        "vgg16": (2, 2, 3, 3, 3),
        "vgg19": (2, 2, 4, 4, 4),
    }.items():
        widths = np.repeat((64, 128, 256, 512, 512), sizes).tolist()
        assert rows[name] == vgg_parameters(*widths)
    # torchvision's, and the expansion of the first block from 32 to 32 channels that it leaves out.
    assert rows["mobilenet_v2"] == 3504872 + (32 * 32 + 2 * 32) - FEWER_CATEGORIES[1280]
    # torchvision's without the auxiliary classifier.
    assert rows["inception_v3"] == 27161264 - 3326696 - FEWER_CATEGORIES[2048]


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen([*TABLE], [*TABLE][::3]))
def test_parameters_and_shapes(name):
    row = TABLE[name]
    model = create_model(name, num_classes=row.num_classes, width=row.width)
    images = jnp.zeros((2, row.side, row.side, 3))
    init = functools.partial(model.init_with_output, train=False)
    output, variables = jax.eval_shape(lambda key: init(key, images), jax.random.key(0))
    assert count_parameters(variables["params"]) == row.parameters
    assert output.logits.shape == (2, row.num_classes)
    assert [x.shape for x in output.features] == [(2, side, side, channels) for side, channels in row.stages]
    assert [x.shape for x in output.preactivations] == [x.shape for x in output.stages]
    assert [x.shape[1:3] for x in output.stages] == [x.shape[1:3] for x in output.features]
    assert output.embedding.shape == (2, row.stages[-1][1] * row.cells)
    assert {leaf.dtype for leaf in jax.tree.leaves((output, variables))} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrn_16_2", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2", "inception_v3"])
def test_narrow_networks_in_bfloat16(name):
    model = create_model(name, num_classes=7, width=0.125, dtype=jnp.bfloat16)
    images = jnp.zeros((2, 9, 14, 3))
    init = functools.partial(model.init_with_output, train=True)
    output, variables = jax.eval_shape(lambda key: init(key, images), jax.random.key(0))
    halves = (output.features, output.embedding, output.preactivations)
    assert {leaf.dtype for leaf in jax.tree.leaves(halves)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves((output.logits, variables))} == {jnp.dtype(jnp.float32)}


def compile_fast(function, *arguments):
    """Compiled with few optimizations: a step is taken once."""
    options = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


@pytest.mark.slow
@pytest.mark.parametrize("name", chosen(DEEP, DEEP[::6]))
def test_gradient_of_a_deep_network_traces(name):
    model = create_model(name, num_classes=3, width=TABLE[name].step_width)
    images = jnp.zeros((4, 8, 8, 3))
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))

    def loss(params, batch_stats):
        output, updated = model.apply({"params": params, "batch_stats": batch_stats}, images, train=True, mutable=True)
        return jnp.mean(output.logits), updated["batch_stats"]

    gradients, updated = jax.eval_shape(jax.grad(loss, has_aux=True), shapes["params"], shapes["batch_stats"])
    assert (gradients, updated) == (shapes["params"], shapes["batch_stats"])


def marks_of(name):
    """FAST networks are quick; one more of each kind takes its step in CI."""
    if name in FAST:
        return []
    return [pytest.mark.slow] if name in KINDS else [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in TABLE if name not in DEEP])
def test_one_gradient_step(name):
    model = create_model(name, num_classes=3, width=TABLE[name].step_width)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = rng.normal(0, (2 / math.prod(leaf.shape[:-1])) ** 0.5, leaf.shape)
        return values.astype(np.float32)

    images = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    variables = jax.tree.map_with_path(draw, shapes)

    def loss(params, images):
        state = variables | {"params": params}
        output, updated = model.apply(state, images, train=True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(output.logits)[:, 1]), (output, updated)

    step = compile_fast(jax.grad(loss, has_aux=True), variables["params"], images)
    gradients, (output, updated) = step(variables["params"], images)

    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        if path[-1].key == "conv_bias":
            np.testing.assert_allclose(gradient, 0, atol=1e-4, err_msg=str(path))
        else:
            assert np.any(gradient), path
    for (path, old), new in zip(
        jax.tree.leaves_with_path(variables["batch_stats"]), jax.tree.leaves(updated["batch_stats"]), strict=True
    ):
        assert np.isfinite(new).all(), path
        assert np.any(old != new), path
    check_stages(name, output)


def check_stages(name, output):
    """Maps are the activation of the pre-activations, the embedding the mean of the last map."""
    maps = output.features if name.startswith("wrn") else output.stages
    for stage, preactivation in zip(maps, output.preactivations, strict=True):
        assert preactivation.min() < 0
        expected = preactivation if name.startswith("mobilenet") else np.maximum(preactivation, 0)
        np.testing.assert_allclose(stage, expected, rtol=1e-6, atol=1e-6)
    has_head = name.startswith("mobilenet") or name == "shufflenet_v2"
    for stage, feature in list(zip(output.stages, output.features, strict=True))[: -1 if has_head else None]:
        assert np.array_equal(stage, feature) != name.startswith("wrn")
    if has_head:
        assert output.features[-1].min() == 0 > output.preactivations[-1].min()
    maps = output.features[-1]
    expected = maps.mean(axis=(1, 2))
    if TABLE[name].cells == 4:
        half = maps.shape[1] // 2
        quarters = [maps[:, y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
        expected = np.stack([quarter.mean(axis=(1, 2)) for quarter in quarters], axis=-1).reshape(len(maps), -1)
    np.testing.assert_allclose(output.embedding, expected, rtol=1e-5, atol=1e-6)


def test_shuffled_channels_come_from_every_group_in_turn():
    np.testing.assert_array_equal(
        shuffle_channels(jnp.arange(12).reshape(1, 12), 3)[0], np.arange(12).reshape(3, 4).T.flatten()
    )


def test_shortcut_without_parameters_subsamples_and_pads_channels():
    model = create_model("resnet20_option_a", num_classes=3, width=0.25)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))
    assert not any("downsample" in block for block in shapes["params"])

    def draw(path, leaf):
        # Without the branches of the blocks only the shortcuts are left.
        silent = path[0].key == "params" and path[1].key.startswith("stage")
        return np.zeros(leaf.shape, np.float32) if silent else rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    output = model.apply(jax.tree.map_with_path(draw, shapes), images, train=False)
    stem, second, third = output.features
    assert np.any(stem)
    np.testing.assert_allclose(second[..., 2:6], stem[:, ::2, ::2], rtol=1e-6)
    assert not np.any(second[..., [0, 1, 6, 7]])
    np.testing.assert_allclose(third[..., 4:12], second[:, ::2, ::2], rtol=1e-6)


def test_relu_at_the_end_of_a_stage_only():
    model = create_model("resnet14_stem64", num_classes=3, width=0.25)
    images = jnp.ones((2, 8, 8, 3))
    shapes = jax.eval_shape(lambda key: model.init(key, images, train=False), jax.random.key(0))

    def draw(path, leaf):
        names = [part.key for part in path]
        if names[-1] == "var":
            return np.ones(leaf.shape, np.float32)
        # The first block of the first stage gives -1, the second adds 3 to it.
        values = {("stage1_block1", "conv2"): -1.0, ("stage1_block2", "conv2"): 3.0}
        value = values.get(tuple(names[1:3]), 0.0) if names[-1] == "bias" else 0.0
        return np.full(leaf.shape, value, np.float32)

    output = model.apply(jax.tree.map_with_path(draw, shapes), images, train=False)
    np.testing.assert_allclose(output.features[0], 2.0)


def test_maps_that_do_not_divide_into_cells():
    model = create_model("resnet8_stem64", num_classes=3, width=0.25)
    with pytest.raises(ValueError, match="maps of 3x3 cannot be divided into 2x2 cells"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 12, 12, 3)), train=False))
