"""ResNets, and the layers of all networks against formulas written out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cskd_jax.errors import UserError
from cskd_jax.models import BasicBlock, Bottleneck, ResNet, count_parameters, create_model
from cskd_jax.models.layers import BatchNorm, Classifier, ConvBatchNorm, average_pool, convolve, max_pool, scale_width
from tests.tiers import chosen

# name -> width -> trainable parameters with 10, 100, 200 categories
PARAMETER_COUNTS = {
    "resnet18": {
        0.25: (701466, 713076, 725976),
        0.5: (2797610, 2820740, 2846440),
        1.0: (11173962, 11220132, 11271432),
    },
    "resnet34": {
        0.25: (1334618, 1346228, 1359128),
        0.5: (5326506, 5349636, 5375336),
        1.0: (21282122, 21328292, 21379592),
    },
    "resnet50": {
        0.25: (1484186, 1530356, 1581656),
        0.5: (5899050, 5991300, 6093800),
        1.0: (23520842, 23705252, 23910152),
    },
    "resnet101": {
        0.25: (2680986, 2727156, 2778456),
        0.5: (10660138, 10752388, 10854888),
        1.0: (42512970, 42697380, 42902280),
    },
    "resnet152": {
        0.25: (3667354, 3713524, 3764824),
        0.5: (14582570, 14674820, 14777320),
        1.0: (58156618, 58341028, 58545928),
    },
}
NUM_CLASSES = (10, 100, 200)


@functools.cache
def variable_shapes(model):
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 8, 8, 3)), train=False), jax.random.key(0))


def output_shapes(model, images, train=False):
    """(output, updated statistics) as shapes and dtypes; nothing is computed."""

    def apply(variables):
        return model.apply(variables, jnp.zeros(images), train=train, mutable=["batch_stats"])

    return jax.eval_shape(apply, variable_shapes(model))


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


# Every width and number of categories.
WIDTHS = [(name, width) for name, widths in PARAMETER_COUNTS.items() for width in widths]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), chosen(WIDTHS, WIDTHS[::3]))
def test_parameter_counts(name, width):
    counts = tuple(
        count_parameters(variable_shapes(create_model(name, num_classes=number, width=width))["params"])
        for number in NUM_CLASSES
    )
    assert counts == PARAMETER_COUNTS[name][width]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_bfloat16_leaves_logits_and_variables_in_float32(name):
    model = create_model(name, num_classes=7, width=0.25, dtype=jnp.bfloat16)
    variables = variable_shapes(model)
    output, updated = output_shapes(model, (2, 8, 8, 3), train=True)
    assert dtypes((output.features, output.embedding, output.preactivations)) == {jnp.dtype(jnp.bfloat16)}
    assert dtypes((output.logits, variables, updated)) == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("resnet19", r"did you mean resnet18 or resnet14 or resnet101\?$"),
        ("ResNet18", r"did you mean resnet18\?$"),
        ("", "known: .*resnet18, resnet18_224, resnet18_crd, resnet20"),
        ("__init__", "known: .*resnet18, resnet18_224, resnet18_crd, resnet20"),
    ],
)
def test_unknown_name(name, advice):
    with pytest.raises(UserError, match=f"^unknown network {name!r}; {advice}"):
        create_model(name, num_classes=10)


# ResNet.


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", (16, 32, 64, 128)), ("resnet34", (16, 32, 64, 128)), ("resnet50", (64, 128, 256, 512))],
)
def test_resnet_stages(name, channels):
    output, _ = output_shapes(create_model(name, num_classes=10, width=0.25), (2, 32, 32, 3))
    sizes = (32, 16, 8, 4)
    assert [feature.shape for feature in output.features] == [
        (2, size, size, number) for size, number in zip(sizes, channels, strict=True)
    ]


def test_resnet_takes_images_that_are_not_square_or_even():
    output, _ = output_shapes(create_model("resnet50", num_classes=10, width=0.25), (2, 9, 14, 3))
    assert [feature.shape[1:3] for feature in output.features] == [(9, 14), (5, 7), (3, 4), (2, 2)]


def test_bottleneck_strides_in_its_3x3_convolution():
    block, x = Bottleneck(4, 2, ConvBatchNorm), jnp.zeros((1, 6, 6, 8))

    def intermediates(key):
        return block.init(key, x, train=False, capture_intermediates=True, mutable=True)["intermediates"]

    outputs = jax.eval_shape(intermediates, jax.random.key(0))
    sizes = [outputs[name]["__call__"][0].shape[1] for name in ("conv1", "conv2", "conv3", "downsample")]
    assert sizes == [6, 3, 3, 3]


def small_resnet(**settings):
    settings = {"stage_sizes": (1, 1), "block": BasicBlock, "stage_widths": (4, 6)} | settings
    return ResNet(num_classes=3, **settings)


def random_inputs(model):
    """(variables, images), drawn by numpy: compiling the draws of jax takes longer than all the rest."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = rng.uniform(0.5, 1.5, leaf.shape) if path[-1].key == "var" else rng.normal(0, 0.3, leaf.shape)
        return values.astype(np.float32)

    images = rng.normal(size=(4, 8, 8, 3)).astype(np.float32)
    return jax.tree.map_with_path(draw, variable_shapes(model)), images


@functools.cache
def small_case(train):
    """(variables, images, output, updated statistics) of a small ResNet."""
    model = small_resnet()
    variables, images = random_inputs(model)
    output, updated = jax.jit(functools.partial(model.apply, train=train, mutable=["batch_stats"]))(variables, images)
    return variables, images, output, updated


def test_embedding_is_the_mean_of_the_last_map():
    _, _, output, _ = small_case(train=False)
    np.testing.assert_allclose(output.embedding, output.features[-1].mean(axis=(1, 2)), rtol=1e-6)


def test_features_are_the_positive_part_of_the_preactivations():
    _, _, output, _ = small_case(train=True)
    for feature, preactivation in zip(output.features, output.preactivations, strict=True):
        np.testing.assert_array_equal(feature, np.maximum(preactivation, 0))
        assert preactivation.min() < 0


def test_logits_are_linear_in_the_embedding():
    variables, _, output, _ = small_case(train=False)
    classifier = variables["params"]["classifier"]
    expected = output.embedding @ classifier["kernel"] + classifier["bias"]
    np.testing.assert_allclose(output.logits, expected, rtol=1e-5, atol=1e-6)


def test_training_updates_every_statistic():
    variables, _, _, updated = small_case(train=True)
    for old, new in zip(*map(jax.tree.leaves, (variables["batch_stats"], updated["batch_stats"])), strict=True):
        assert (old != new).any()


def test_evaluation_updates_no_statistic():
    variables, _, _, updated = small_case(train=False)
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], updated["batch_stats"])


def test_projection_changes_the_last_map_alone():
    model = small_resnet(projection_features=5)
    variables, images, output, _ = small_case(train=False)
    kernel = np.random.default_rng(1).normal(size=(1, 1, 6, 5)).astype(np.float32)
    params = variables["params"] | {"projection": kernel}
    projected = jax.jit(functools.partial(model.apply, train=False))(variables | {"params": params}, images)
    np.testing.assert_allclose(projected.features[-1], output.features[-1] @ kernel[0, 0], rtol=1e-5, atol=1e-6)
    for one, other in zip(projected.features[:-1], output.features[:-1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(projected.logits, output.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_one_gradient_step_is_finite_and_moves_everything(block):
    model = small_resnet(block=block)
    variables, images = random_inputs(model)

    @jax.jit
    @jax.grad
    def gradient_of(params):
        output, _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(output.logits)[:, 1])

    for path, gradient in jax.tree.leaves_with_path(gradient_of(variables["params"])):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient), path


def test_convolutions_start_kaiming_normal_fan_out():
    module = ConvBatchNorm(64, 3)
    kernel = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)), train=False)["params"]["kernel"]
    deviation = math.sqrt(2 / (64 * 3 * 3))
    # 9216 draws: a standard error of 0.7 %. A normal distribution cut at two deviations has none beyond 2.3.
    np.testing.assert_allclose(kernel.std(), deviation, rtol=0.03)
    assert np.abs(kernel).max() > 3 * deviation


def started(name, *path):
    """Returns a part of the initial parameters of a network; nothing else is computed."""
    module, images = create_model(name, num_classes=100), jnp.zeros((1, 32, 32, 3))

    @jax.jit
    def init(key):
        return functools.reduce(dict.__getitem__, path, module.init(key, images, train=False)["params"])

    return init(jax.random.key(0))


@pytest.mark.parametrize("name", ["shufflenet_v1", "shufflenet_v2"])
def test_shuffle_nets_start_as_torch_convolutions(name):
    kernel = started(name, "stage3_block2", "depthwise", "kernel")
    assert np.abs(kernel).max() <= 1 / 3
    np.testing.assert_allclose(kernel.std(), 1 / math.sqrt(3 * 9), rtol=0.05)


@pytest.mark.parametrize("name", ["vgg8", "mobilenet_v2_crd"])
def test_classifiers_that_start_small(name):
    found = started(name, "classifier")
    assert not np.any(found["bias"])
    np.testing.assert_allclose(found["kernel"].std(), 0.01, rtol=0.02)


def test_wide_resnet_starts_without_a_bias():
    found = started("wrn_16_2", "classifier")
    assert not np.any(found["bias"])
    np.testing.assert_allclose(found["kernel"].std(), 1 / math.sqrt(3 * 128), rtol=0.05)


@pytest.mark.parametrize(("side", "sides"), [(32, (16, 8, 4, 4)), (48, (24, 12, 6, 6)), (64, (32, 16, 8, 4))])
def test_vgg_pools_images_of_height_64_once_more(side, sides):
    module, images = create_model("vgg8", num_classes=3), jnp.zeros((1, side, side, 3))
    output = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), images, train=False)[0])
    assert tuple(feature.shape[1] for feature in output.features) == sides


def test_classifier_starts_as_torch_linear():
    params = Classifier(500).init(jax.random.key(0), jnp.zeros((1, 16)))["params"]
    for value in params.values():
        assert np.abs(value).max() <= 0.25
        assert np.abs(value).max() > 0.24
        np.testing.assert_allclose(value.mean(), 0, atol=0.03)


# Convolution.


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_1x1_convolution_is_that_of_lax(stride, size, x64):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, size, size, 3)), rng.normal(size=(1, 1, 3, 4))
    expected = lax.conv_general_dilated(
        x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(convolve(x, kernel, stride, 0), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stride", [1, 2])
def test_3x3_convolution(stride, x64):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 7, 3)), rng.normal(size=(3, 3, 3, 4))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [[padded[:, i : i + 6, j : j + 7] @ kernel[i, j] for j in range(3)] for i in range(3)]
    expected = np.sum(shifted, axis=(0, 1))[:, ::stride, ::stride]
    np.testing.assert_allclose(convolve(x, kernel, stride, 1), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_convolution_is_one_convolution_per_group(stride, x64):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 7, 6)), rng.normal(size=(3, 3, 2, 9))
    groups = [convolve(x[..., 2 * i : 2 * i + 2], kernel[..., 3 * i : 3 * i + 3], stride, 1) for i in range(3)]
    found = convolve(x, kernel, stride, 1, groups=3)
    np.testing.assert_allclose(found, np.concatenate(groups, axis=-1), rtol=1e-12, atol=1e-14)


def test_1x1_convolution_in_groups_is_not_a_matrix_product(x64):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 5, 4)), rng.normal(size=(1, 1, 2, 6))
    expected = np.concatenate([x[..., :2] @ kernel[0, 0, :, :3], x[..., 2:] @ kernel[0, 0, :, 3:]], axis=-1)
    np.testing.assert_allclose(convolve(x, kernel, 1, 0, groups=2), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("height", "width"), [(1, 7), (7, 1)])
def test_convolution_that_is_not_square(height, width, x64):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 6, 3)), rng.normal(size=(height, width, 3, 4))
    rows, columns = height // 2, width // 2
    padded = np.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    shifted = [padded[:, i : i + 5, j : j + 6] @ kernel[i, j] for i in range(height) for j in range(width)]
    np.testing.assert_allclose(convolve(x, kernel, 1, (rows, columns)), np.sum(shifted, axis=0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stride", [1, 2])
def test_pools(stride, x64):
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3))

    def windows(fill):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill)
        return np.stack([padded[:, i : i + 6 : stride, j : j + 7 : stride] for i in range(3) for j in range(3)])

    np.testing.assert_array_equal(max_pool(x, stride), windows(-np.inf).max(axis=0))
    np.testing.assert_allclose(average_pool(x, stride), windows(0).mean(axis=0), rtol=1e-12, atol=1e-14)


def test_scaled_widths():
    assert [scale_width(64, width) for width in (0.25, 0.5, 1, 2)] == [16, 32, 64, 128]
    assert [scale_width(240, width, 3) for width in (0.01, 0.25, 1)] == [3, 60, 240]
    with pytest.raises(ValueError, match=r"width 0\.001 leaves a stage without channels"):
        scale_width(64, 0.001)


# Batch normalization.


def batch_norm_case(kernel_size=1):
    """(variables, x) in 64 bits: random statistics, scale and bias; a 1x1 kernel is the identity."""
    rng = np.random.default_rng(0)
    kernel = np.eye(3)[None, None] if kernel_size == 1 else rng.normal(size=(kernel_size, kernel_size, 3, 3))
    variables = {
        "params": {"kernel": kernel, "scale": rng.normal(size=3), "bias": rng.normal(size=3)},
        "batch_stats": {"mean": rng.normal(size=3), "var": rng.uniform(0.5, 2, size=3)},
    }
    return variables, rng.normal(2, 3, size=(8, 2, 2, 3))


def apply_batch_norm(variables, x, train, kernel_size=1, axis_name=None, **settings):
    module = ConvBatchNorm(3, kernel_size, dtype=x.dtype, axis_name=axis_name, **settings)
    output, updated = module.apply(variables, x, train=train, mutable=["batch_stats"])
    return output, updated["batch_stats"]


def test_training_normalizes_with_the_biased_variance(x64):
    variables, x = batch_norm_case()
    output, _ = apply_batch_norm(variables, x, train=True)
    mean = x.mean(axis=(0, 1, 2))
    variance = ((x - mean) ** 2).mean(axis=(0, 1, 2))
    params = variables["params"]
    expected = (x - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-12)


def test_running_mean(x64):
    variables, x = batch_norm_case()
    _, stats = apply_batch_norm(variables, x, train=True)
    expected = 0.9 * variables["batch_stats"]["mean"] + 0.1 * x.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-12)


def test_running_variance_is_unbiased(x64):
    variables, x = batch_norm_case()
    _, stats = apply_batch_norm(variables, x, train=True)
    expected = 0.9 * variables["batch_stats"]["var"] + 0.1 * x.reshape(-1, 3).var(axis=0, ddof=1)
    np.testing.assert_allclose(stats["var"], expected, rtol=1e-12)


def test_momentum_and_epsilon_are_used(x64):
    variables, x = batch_norm_case()
    output, stats = apply_batch_norm(variables, x, train=True, momentum=0.25, epsilon=3.0)
    flat, params = x.reshape(-1, 3), variables["params"]
    expected = (x - flat.mean(axis=0)) / np.sqrt(flat.var(axis=0) + 3) * params["scale"] + params["bias"]
    np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-12)
    expected = 0.25 * variables["batch_stats"]["mean"] + 0.75 * flat.mean(axis=0)
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-12)


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_evaluation_folded_into_the_kernel_is_the_plain_formula(kernel_size, stride, x64):
    variables, x = batch_norm_case(kernel_size)
    output, stats = apply_batch_norm(variables, x, train=False, kernel_size=kernel_size, stride=stride)
    params, running = variables["params"], variables["batch_stats"]
    pads = [(kernel_size // 2, kernel_size // 2)] * 2
    plain = lax.conv_general_dilated(
        x, params["kernel"], (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = (plain - running["mean"]) / np.sqrt(running["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, stats, running)


@pytest.mark.parametrize(("groups", "use_bias", "kernel_size"), [(3, True, 3), (3, False, (1, 3)), (1, True, (3, 1))])
def test_evaluation_is_training_with_the_same_statistics(groups, use_bias, kernel_size, x64):
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, size=(8, 4, 4, 3))
    module = ConvBatchNorm(6, kernel_size, groups=groups, use_bias=use_bias, dtype=x.dtype, momentum=0.0)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), module.init(jax.random.key(0), x, train=True))
    assert ("conv_bias" in variables["params"]) == use_bias
    expected, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
    stats = updated["batch_stats"]
    # Of 8 * 4 * 4 values: training normalizes by the biased variance and remembers the unbiased one.
    variables |= {"batch_stats": {"mean": stats["mean"], "var": stats["var"] * (127 / 128)}}
    np.testing.assert_allclose(module.apply(variables, x, train=False), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("train", [False, True])
def test_normalization_by_itself_is_that_after_a_convolution(train, x64):
    variables, x = batch_norm_case()
    expected, stats = apply_batch_norm(variables, x, train=train)
    params = {name: variables["params"][name] for name in ("scale", "bias")}
    output, updated = BatchNorm(dtype=x.dtype).apply(
        variables | {"params": params}, x, train=train, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-12)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), updated["batch_stats"], stats)


def test_initialization_leaves_the_statistics_alone():
    _, x = batch_norm_case()
    stats = ConvBatchNorm(3, 1).init(jax.random.key(0), jnp.asarray(x), train=True)["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], np.zeros(3))
    np.testing.assert_array_equal(stats["var"], np.ones(3))


def test_one_value_per_channel_is_finite():
    variables, _ = batch_norm_case()
    variables = jax.tree.map(np.float32, variables)
    output, stats = apply_batch_norm(variables, np.full((1, 1, 1, 3), 7, np.float32), train=True)
    np.testing.assert_allclose(output[0, 0, 0], variables["params"]["bias"], atol=1e-3)
    assert np.isfinite(stats["var"]).all()


def test_variance_keeps_its_digits_where_the_mean_is_large():
    variables, x = batch_norm_case()
    variables = jax.tree.map(np.float32, variables)
    shifted = (np.sign(x) + 4096).astype(np.float32)
    _, stats = apply_batch_norm(variables, shifted, train=True, momentum=0.0)
    np.testing.assert_allclose(stats["var"], shifted.astype(np.float64).reshape(-1, 3).var(axis=0, ddof=1), rtol=1e-4)


def test_bfloat16_statistics_are_computed_in_float32():
    variables, x = batch_norm_case()
    variables = jax.tree.map(np.float32, variables)
    half = jnp.asarray(x, jnp.bfloat16)
    output, stats = apply_batch_norm(variables, half, train=True)
    _, expected = apply_batch_norm(variables, half.astype(jnp.float32), train=True)
    assert output.dtype == jnp.bfloat16
    for name, value in expected.items():
        assert stats[name].dtype == jnp.float32
        np.testing.assert_allclose(stats[name], value, rtol=1e-6)


def test_four_devices_normalize_like_one(x64):
    variables, x = batch_norm_case()
    weights = np.random.default_rng(1).normal(size=x.shape)

    def step(params, x, weights, axis_name=None):
        """(output, statistics), gradients of a loss that is a mean over the batch."""

        def loss(params):
            changed = variables | {"params": params}
            output, stats = apply_batch_norm(changed, x, True, axis_name=axis_name)
            return jnp.mean(weights * output**2), (output, stats)

        gradients, (output, stats) = jax.grad(loss, has_aux=True)(params)
        return output, stats, gradients if axis_name is None else lax.pmean(gradients, axis_name)

    expected = jax.jit(step)(variables["params"], x, weights)
    split = [array.reshape(4, 2, *array.shape[1:]) for array in (x, weights)]
    mapped = jax.pmap(
        functools.partial(step, axis_name="devices"), "devices", in_axes=(None, 0, 0), out_axes=(0, 0, 0),
        devices=jax.devices()[:4],
    )  # fmt: skip
    output, stats, gradients = jax.block_until_ready(mapped(variables["params"], *split))
    np.testing.assert_allclose(output.reshape(x.shape), expected[0], rtol=1e-11, atol=1e-12)
    for found, wanted in zip((stats, gradients), expected[1:], strict=True):
        for name, value in wanted.items():
            # On every device.
            np.testing.assert_allclose(found[name], [value] * 4, rtol=1e-10, atol=1e-11, err_msg=name)
