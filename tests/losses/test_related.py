"""The related methods: what the golden values leave open (several devices, degenerate inputs, errors, memory)."""

import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cskd_jax.losses import (
    LOSSES,
    LossInputs,
    activation_boundary_loss,
    attention_transfer_loss,
    correlation_delta_loss,
    dkd_loss,
    factor_transfer_loss,
    fsp_loss,
    hierarchical_context_loss,
    hint_loss,
    nst_loss,
    pkt_loss,
    rkd,
    rkd_loss,
    similarity_preserving_loss,
    vid_loss,
)
from cskd_jax.losses._arrays import average_pool, pool_to_common_size, resize
from cskd_jax.losses._batch import gather_batch
from tests.tiers import chosen

NAMES = ("fitnet", "at", "nst", "fsp", "ab", "cc", "rkd", "sp", "pkt", "vid", "ft", "dkd", "reviewkd")
NUM_CLASSES = 5
SETTINGS = {"cc": {"embedding_size": 4}, "reviewkd": {"mid_channels": 3}}
# (height, width, channels) of each stage: a larger map on either side, with and without a size that divides.
STUDENT_STAGES = ((4, 4, 3), (2, 4, 5))
TEACHER_STAGES = ((6, 6, 3), (3, 2, 4))


class Output(NamedTuple):
    """What networks return, as far as losses read it."""

    logits: jax.Array
    features: tuple[jax.Array, ...]
    embedding: jax.Array
    preactivations: tuple[jax.Array, ...]
    stem: jax.Array | None = None

    @property
    def stages(self):
        return self.features


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nothing here runs long enough to be worth optimizing; the golden tests run what is optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def create(name, **settings):
    return LOSSES[name](num_classes=NUM_CLASSES, **SETTINGS.get(name, {}) | settings)


def make_data(batch=8, dtype=np.float32):
    """Images of both networks: a map for each stage, with 3 channels; int32 labels."""
    rng = np.random.default_rng(0)
    student, teacher = (
        tuple(rng.normal(size=(batch, *shape[:2], 3)).astype(dtype) for shape in stages)
        for stages in (STUDENT_STAGES, TEACHER_STAGES)
    )
    return student, teacher, rng.integers(0, NUM_CLASSES, batch).astype(np.int32)


def make_weights(stages, seed, dtype=np.float32):
    """A linear network: channels of each stage from those of the images, and a classifier."""
    rng = np.random.default_rng(seed)
    kernels = tuple(rng.normal(size=(3, shape[-1])).astype(dtype) for shape in stages)
    return kernels, rng.normal(size=(stages[-1][-1], NUM_CLASSES)).astype(dtype)


def network(weights, images):
    kernels, classifier = weights
    preactivations = tuple(image @ kernel for image, kernel in zip(images, kernels, strict=True))
    features = tuple(jnp.maximum(preactivation, 0) for preactivation in preactivations)
    embedding = jnp.mean(features[-1], axis=(1, 2))
    return Output(embedding @ classifier, features, embedding, preactivations)


@functools.cache
def make_inputs():
    student, teacher, labels = make_data()
    outputs = network(make_weights(STUDENT_STAGES, 1), student), network(make_weights(TEACHER_STAGES, 2), teacher)
    return LossInputs(*jax.tree.map(np.asarray, outputs), labels)


def shapes_of(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype if dtype and x.ndim > 1 else x.dtype), tree)


def make_params(inputs, seed=3):
    """{NAME: parameters} drawn by numpy (compiling jax's draws takes longer than all the rest), as `init` shapes them.

    Biases and log-scales are drawn too, so that no gradient is 0 by chance.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 1.0 if leaf.ndim == 1 else 1 / math.sqrt(math.prod(leaf.shape[:-1]))
        return rng.normal(0, scale, leaf.shape).astype(leaf.dtype)

    params = {}
    for name in NAMES:
        method = create(name)
        variables = jax.eval_shape(lambda method=method: method.lazy_init(jax.random.key(0), shapes_of(inputs)))
        params[name] = jax.tree.map(draw, variables.get("params", {}))
    return params


@functools.cache
def compiled():
    """All methods in one program, which compiles faster than many: gradients by parameters, student, and teacher."""

    def values_and_gradients(params, inputs):
        def of(name):
            def value(params, student, teacher):
                changed = inputs._replace(student=student, teacher=teacher)
                return create(name).apply({"params": params}, changed)

            function = jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)
            return function(params[name], inputs.student, inputs.teacher)

        return {name: of(name) for name in NAMES}

    return jax.jit(values_and_gradients)


@functools.cache
def typical():
    """{NAME: ((value, terms), (gradients by parameters, student, teacher))} of `make_inputs`."""
    return jax.device_get(compiled()(make_params(make_inputs()), make_inputs()))


def assert_finite(tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        assert np.isfinite(leaf).all(), path


def message(text):
    return "^" + re.escape(text)


# Methods.


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_method_gives_finite_value_and_gradients(name):
    (value, terms), gradients = typical()[name]
    assert value.shape == ()
    assert value.dtype == np.float32
    assert all(term.shape == () for term in terms.values())
    assert_finite((value, terms, gradients))


# What each method reads of the student.
READS = {
    "fitnet": ["features[1]"],
    "at": ["features[0]", "features[1]"],
    "nst": ["features[0]", "features[1]"],
    "fsp": ["features[0]", "features[1]"],
    "ab": ["preactivations[0]", "preactivations[1]"],
    "cc": ["embedding"],
    "rkd": ["embedding"],
    "sp": ["features[1]"],
    "pkt": ["embedding"],
    "vid": ["features[0]", "features[1]"],
    "ft": ["features[1]"],
    "dkd": ["logits"],
    "reviewkd": ["embedding", "features[0]", "features[1]"],
}
# Biases before a normalization, which takes them out again: they get no gradient but rounding.
WITHOUT_GRADIENT = re.compile(r"\['(regressor|connector\d)'\]\['bias'\]|\['translator'\]\['bias\d'\]")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_method_moves_what_it_reads_and_all_that_it_trains(name):
    _, (params, student, _) = typical()[name]
    moved = [jax.tree_util.keystr(path)[1:] for path, leaf in jax.tree.leaves_with_path(student) if leaf.any()]
    assert sorted(moved) == READS[name]
    for path, leaf in jax.tree.leaves_with_path(params):
        assert leaf.any() or WITHOUT_GRADIENT.fullmatch(jax.tree_util.keystr(path)), path


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"cc"}))
def test_teacher_gets_no_gradient(name):
    _, (_, _, teacher) = typical()[name]
    assert not any(leaf.any() for leaf in jax.tree.leaves(teacher))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_computed_in_float32(name):
    def apply(inputs):
        method = create(name)
        return method.apply(method.init(jax.random.key(0), inputs), inputs)

    half = LossInputs(*shapes_of(make_inputs()[:2], jnp.bfloat16), make_inputs().labels)
    # Embeddings and maps alike are in the compute dtype.
    assert half.student.embedding.dtype == jnp.bfloat16
    for value in jax.tree.leaves(jax.eval_shape(apply, half)):
        assert value.dtype == jnp.float32


@pytest.mark.parametrize("name", ["at", "nst", "fsp", "vid", "fitnet", "ab", "reviewkd"])
def test_different_numbers_of_stages(name):
    inputs = make_inputs()
    teacher = inputs.teacher
    fewer = teacher._replace(features=teacher.features[1:], preactivations=teacher.preactivations[1:])
    with pytest.raises(ValueError, match=message("student has 2 stages and teacher 1: stages are paired one to one")):
        create(name).lazy_init(jax.random.key(0), inputs._replace(teacher=fewer))


def parameter_shapes(name, **settings):
    method = create(name, **settings)
    variables = jax.eval_shape(lambda: method.lazy_init(jax.random.key(0), shapes_of(make_inputs())))
    return jax.tree.map(lambda leaf: leaf.shape, variables["params"], is_leaf=lambda x: hasattr(x, "shape"))


def test_fsp_projects_the_stages_whose_channels_differ():
    assert parameter_shapes("fsp") == {"projection2": {"kernel": (5, 4)}}


@pytest.mark.parametrize(("stage", "channels"), [(1, (3, 3)), (2, (5, 4))])
def test_fitnet_stage(stage, channels):
    assert parameter_shapes("fitnet", stage=stage)["regressor"]["kernel"] == (1, 1, *channels)


@pytest.mark.parametrize("stage", [0, 3])
def test_fitnet_stage_that_is_not_there(stage):
    with pytest.raises(ValueError, match=message(f"stage must be from 1 to 2, the number of stages, got {stage}")):
        parameter_shapes("fitnet", stage=stage)


def test_factor_has_a_fraction_of_the_channels():
    shapes = parameter_shapes("ft", rate=0.75)
    assert shapes["encoder"]["bias3"] == shapes["translator"]["bias3"] == (3,)
    assert shapes["decoder"]["bias3"] == (4,)


def test_factor_without_channels():
    with pytest.raises(ValueError, match=message("rate 0.2 leaves none of the teacher's 4 channels")):
        parameter_shapes("ft", rate=0.2)


@pytest.mark.parametrize("variance", [5.0, 0.25, 1000.0])
def test_vid_initial_variance(variance):
    features = (np.ones((2, 1, 1, 3), np.float32),)
    output = Output(None, features, None, features)
    method = create("vid", initial_variance=variance)
    params = method.init(jax.random.key(0), LossInputs(output, output, None))["params"]
    np.testing.assert_allclose(jax.nn.softplus(params["log_scale1"]) + 1e-5, np.full(3, variance), rtol=1e-5)


def test_vid_variance_must_be_above_its_minimum():
    with pytest.raises(ValueError, match=message("initial_variance must be greater than 1e-05, got 1e-05")):
        parameter_shapes("vid", initial_variance=1e-5)


@pytest.mark.parametrize(("size", "setting", "zero"), [(1, None, False), (1, True, True), (2, None, False)])
def test_factors_of_single_positions_are_compared_whole(size, setting, zero):
    """A map of one position scaled to norm 1 is 1 whatever the network does."""
    rng = np.random.default_rng(0)
    student, teacher = (
        Output(None, (rng.normal(size=(4, size, size, 4)).astype(np.float32),), None, None) for _ in "st"
    )
    inputs = LossInputs(student, teacher, None)
    method = create("ft", pool_channels=setting)
    _, terms = jax.jit(lambda key: method.apply(method.init(key, inputs), inputs))(jax.random.key(0))
    assert (terms["transfer"] < 1e-6) == zero


def test_review_without_embedding():
    assert set(parameter_shapes("reviewkd")) == {"fusion1", "fusion2", "fusion3"}
    shapes = parameter_shapes("reviewkd", with_embedding=False)
    assert set(shapes) == {"fusion1", "fusion2"}
    assert "attention" in shapes["fusion1"]
    assert "attention" not in shapes["fusion2"]


@pytest.mark.slow
def test_paraphraser_and_transfer_do_not_move_each_other():
    inputs = make_inputs()
    params = make_params(inputs)["ft"]

    @functools.partial(jax.jit, static_argnames="term")
    def gradients(params, student, term):
        def value(params, student):
            return create("ft").apply({"params": params}, inputs._replace(student=student))[1][term]

        return jax.grad(value, argnums=(0, 1))(params, student)

    transfer, _ = gradients(params, inputs.student, term="transfer")
    assert not any(leaf.any() for leaf in jax.tree.leaves((transfer["encoder"], transfer["decoder"])))
    assert all(leaf.any() for leaf in jax.tree.leaves(transfer["translator"]))
    reconstruction, student = gradients(params, inputs.student, term="reconstruction")
    assert not any(leaf.any() for leaf in jax.tree.leaves((reconstruction["translator"], student)))


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        pytest.param("rkd", lambda terms: 25 * terms["distance"] + 50 * terms["angle"], marks=pytest.mark.slow),
        ("dkd", lambda terms: terms["target"] + 8 * terms["non_target"]),
        ("ft", lambda terms: terms["transfer"] + 0.005 * terms["reconstruction"]),
    ],
)
def test_value_is_the_weighted_sum_of_the_terms(name, terms):
    (value, parts), _ = typical()[name]
    np.testing.assert_allclose(value, terms(parts), rtol=1e-6)


# Degenerate inputs.


def zero_student(inputs):
    return inputs._replace(student=jax.tree.map(np.zeros_like, inputs.student))


def zero_teacher(inputs):
    return inputs._replace(teacher=jax.tree.map(np.zeros_like, inputs.teacher))


def zero_networks(inputs):
    return zero_student(zero_teacher(inputs))


def first_for_all(x):
    return np.broadcast_to(x[:1], x.shape).copy()


def identical_samples_for_the_student(inputs):
    return inputs._replace(student=jax.tree.map(first_for_all, inputs.student))


def identical_samples(inputs):
    return jax.tree.map(first_for_all, inputs)


def one_dead_sample(inputs):
    def kill(x):
        x = x.copy()
        x[3] = 0
        return x

    return inputs._replace(student=jax.tree.map(kill, inputs.student), teacher=jax.tree.map(kill, inputs.teacher))


def two_identical_samples(inputs):
    def repeat(x):
        x = x.copy()
        x[5] = x[2]
        return x

    return jax.tree.map(repeat, inputs)


def confident_networks(inputs):
    """Nothing is left of any other category in float32."""
    logits = 1e4 * np.eye(NUM_CLASSES, dtype=np.float32)
    return inputs._replace(
        student=inputs.student._replace(logits=logits[inputs.labels]),
        teacher=inputs.teacher._replace(logits=logits[(inputs.labels + 1) % NUM_CLASSES]),
    )


def scaled_student(scale, inputs):
    return inputs._replace(student=jax.tree.map(lambda x: x * np.float32(scale), inputs.student))


def small_student(inputs):
    """Squares are small, but their inverse is not beyond float32; the same of fourth powers."""
    return scaled_student(1e-7, inputs)


def tiny_student(inputs):
    """Squares are within float32, their inverse to the power of 3/2 is not."""
    return scaled_student(1e-14, inputs)


def vanishing_student(inputs):
    """Squares are zero in float32."""
    return scaled_student(1e-30, inputs)


DEGENERATE = (
    zero_student, zero_teacher, zero_networks, identical_samples_for_the_student, identical_samples, one_dead_sample,
    two_identical_samples, confident_networks, small_student, tiny_student, vanishing_student,
)  # fmt: skip


@functools.cache
def degenerate(change):
    return jax.device_get(compiled()(make_params(make_inputs()), change(make_inputs())))


@pytest.mark.parametrize("change", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_inputs(name, change):
    assert_finite(degenerate(change)[name])


@pytest.mark.parametrize("change", [identical_samples_for_the_student, zero_student])
def test_coinciding_samples_get_no_gradient_from_relations(change):
    _, (_, student, _) = degenerate(change)["rkd"]
    assert not student.embedding.any()


def test_a_dead_sample_gets_no_gradient_from_pkt():
    _, (_, student, _) = degenerate(one_dead_sample)["pkt"]
    assert not student.embedding[3].any()
    assert student.embedding[2].any()


@pytest.mark.parametrize("name", ["at", "nst", "sp", "pkt"])
def test_zero_features_get_no_gradient(name):
    _, (_, student, _) = degenerate(zero_student)[name]
    assert not any(leaf.any() for leaf in jax.tree.leaves(student))


# Several devices.

GLOBAL_BATCH = 16


def losses_and_gradients(arguments, axis_name=None):
    """({NAME: (value, terms)}, gradients by the student's weights and the parameters of each method)."""
    weights, params, data = arguments
    student_images, teacher_images, labels = data

    def loss(name, trained):
        student = network(trained[0], student_images)
        teacher = lax.stop_gradient(network(weights["teacher"], teacher_images))
        method = create(name, axis_name=axis_name)
        return method.apply({"params": trained[1]}, LossInputs(student, teacher, labels))

    results = {
        name: jax.value_and_grad(functools.partial(loss, name), has_aux=True)((weights["student"], params[name]))
        for name in NAMES
    }
    return results if axis_name is None else lax.pmean(results, axis_name)


@functools.cache
def over_devices(num_devices):
    """`losses_and_gradients` averaged over devices that share the global batch; None: without a mapped axis."""
    with jax.enable_x64(True):
        data = make_data(GLOBAL_BATCH, np.float64)
        pairs = (("student", STUDENT_STAGES), ("teacher", TEACHER_STAGES))
        weights = {name: make_weights(stages, seed, np.float64) for seed, (name, stages) in enumerate(pairs)}
        student, teacher, labels = data
        outputs = network(weights["student"], student), network(weights["teacher"], teacher)
        params = make_params(LossInputs(*outputs, labels))
        if num_devices is None:
            return jax.device_get(jax.jit(losses_and_gradients)((weights, params, data)))
        step = functools.partial(losses_and_gradients, axis_name="devices")
        split = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), data)
        devices = jax.devices()[:num_devices]
        mapped = jax.pmap(step, "devices", in_axes=((None, None, 0),), out_axes=None, devices=devices)
        return jax.device_get(jax.block_until_ready(mapped((weights, params, split))))


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", chosen([8, 1, 2], 1))
@pytest.mark.parametrize("name", NAMES)
def test_devices_share_one_global_batch(name, num_devices):
    found, expected = over_devices(num_devices)[name], over_devices(None)[name]
    for path, wanted in jax.tree.leaves_with_path(expected):
        leaf = functools.reduce(lambda tree, key: tree[key.key if hasattr(key, "key") else key.idx], path, found)
        assert wanted.dtype == np.float64
        # A bias before a normalization has a gradient of rounding alone: hence relative to the largest, at least 1e-3.
        atol = 1e-10 * max(np.abs(wanted).max(), 1e-3)
        np.testing.assert_allclose(leaf, wanted, rtol=1e-10, atol=atol, err_msg=jax.tree_util.keystr(path))


RELATIONS = {"cc": correlation_delta_loss, "rkd": rkd_loss, "sp": similarity_preserving_loss, "pkt": pkt_loss}


def test_relations_are_the_same_on_every_device():
    embeddings = np.random.default_rng(0).normal(size=(2, 2, 4, 3)).astype(np.float32)

    def values(student, teacher):
        return {name: loss(student, teacher, axis_name="devices") for name, loss in RELATIONS.items()}

    for value in jax.tree.leaves(jax.block_until_ready(jax.pmap(values, "devices")(*embeddings))):
        assert value[0] == value[1]


def test_gathered_rows_are_in_the_order_of_the_global_batch():
    x = np.arange(12.0, dtype=np.float32).reshape(2, 3, 2)
    gathered = jax.pmap(lambda x: gather_batch(x, "devices"), "devices", devices=jax.devices()[:2])(x)
    np.testing.assert_array_equal(jax.block_until_ready(gathered)[1], x.reshape(6, 2))
    assert gather_batch(x, None) is x


@pytest.mark.parametrize("name", RELATIONS)
def test_relation_of_one_sample(name):
    x = np.ones((1, 3), np.float32)
    text = f"{RELATIONS[name].__name__} relates samples of a batch: it needs at least 2 in the global batch, got 1"
    with pytest.raises(ValueError, match=message(text)):
        RELATIONS[name](x, x)


def test_relation_of_one_sample_on_each_of_two_devices():
    x = np.random.default_rng(0).normal(size=(2, 1, 3)).astype(np.float32)
    value = jax.pmap(lambda x: pkt_loss(x, x + 1, axis_name="devices"), "devices", devices=jax.devices()[:2])(x)
    assert np.isfinite(jax.block_until_ready(value)).all()


# RKD.


def test_rkd_memory_does_not_grow_with_triples():
    batch = 512
    embedding = jax.ShapeDtypeStruct((batch, 64), jnp.float32)
    lowered = jax.jit(jax.value_and_grad(rkd_loss, has_aux=True)).lower(embedding, embedding)
    # One array over the triples takes 512 MiB; a block 16 MiB.
    assert lowered.compile().memory_analysis().temp_size_in_bytes < batch**3 * 4 / 4


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_rkd_in_blocks_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(7, 3)), rng.normal(size=(7, 5))

    def gradient():
        return jax.jit(jax.value_and_grad(lambda x: rkd_loss(x, teacher)[0]))(student)

    expected = gradient()
    # Three anchors, three, one; for the teacher's distances one at a time.
    monkeypatch.setattr(rkd, "_BLOCK_ELEMENTS", 3 * 7 * 7)
    for found, wanted in zip(gradient(), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)


def test_rkd_of_a_shifted_student_is_zero():
    """Large common offsets cost no digits: distances are computed from differences."""
    teacher = np.random.default_rng(0).integers(-8, 8, (6, 4)).astype(np.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: rkd_loss(x, teacher)[0]))(teacher + 4096)
    assert value < 1e-12
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_rkd_of_coinciding_samples():
    """They are no distance apart, and no angle is at one of them toward the other."""
    student = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]], np.float32)
    teacher = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], np.float32)
    _, terms = jax.jit(rkd_loss)(student, teacher)
    distances_s, distances_t = np.array([0, 5, 5]) / (10 / 3), np.array([1, 1, 2**0.5]) / ((2 + 2**0.5) / 3)
    difference = np.abs(distances_s - distances_t)
    expected = 2 * np.sum(np.where(difference < 1, difference**2 / 2, difference - 0.5)) / 9
    np.testing.assert_allclose(terms["distance"], expected, rtol=1e-5)
    # At samples 0 and 1, cos_jj is 1 for the teacher where j is the other, 0 for the student; cos_jk is 0 at sample 0,
    # 1/sqrt(2) at sample 1.
    # At sample 2 the angle is 0 for the student, 45 degrees for the teacher.
    at_0, at_1, at_2 = 0.5, 0.5 + 2 * 0.5**2, 2 * (1 - 0.5**0.5) ** 2 / 2
    np.testing.assert_allclose(terms["angle"], (at_0 + at_1 + at_2) / 27, rtol=1e-5)


# Forms that have no golden values.


def nst_oracle(student, teacher):
    def patterns(features):
        rows = np.moveaxis(features, -1, 1).reshape(len(features), features.shape[-1], -1)
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    def kernel(a, b):
        return np.mean(np.einsum("bcp,bdp->bcd", a, b) ** 2)

    s, t = patterns(student), patterns(teacher)
    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("channels", [(2, 3), (9, 30), (2, 30)])
def test_nst_by_channels_and_by_positions(channels):
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(3, 2, 3, number)) for number in channels)
    np.testing.assert_allclose(nst_loss(student, teacher), nst_oracle(student, teacher), rtol=1e-11)


@pytest.mark.usefixtures("x64")
def test_factors_whole():
    student, teacher = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 4))
    s, t = (x.reshape(3, -1) / np.linalg.norm(x.reshape(3, -1), axis=1, keepdims=True) for x in (student, teacher))
    found = factor_transfer_loss(student, teacher, pool_channels=False)
    np.testing.assert_allclose(found, np.mean(np.abs(s - t)), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_margin_of_activation_boundary():
    student = np.array([-3.0, -1.0, 1.0, 3.0]).reshape(1, 1, 1, 4)
    off = activation_boundary_loss([student], [0 * student], margin=2.0)
    np.testing.assert_allclose(off, 3 / 1000 * (0 + 1 + 9 + 25), rtol=1e-12)
    on = activation_boundary_loss([student], [0 * student + 1e-9], margin=2.0)
    np.testing.assert_allclose(on, 3 / 1000 * (25 + 9 + 1 + 0), rtol=1e-12)


# Maps of different size.


def adaptive_pool_oracle(x, size):
    result = np.empty((len(x), *size, x.shape[-1]))
    for i, j in np.ndindex(size):
        rows, columns = (
            slice(index * length // wanted, math.ceil((index + 1) * length / wanted))
            for index, length, wanted in ((i, x.shape[1], size[0]), (j, x.shape[2], size[1]))
        )
        result[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    return result


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [(6, 7), (3, 7), (4, 3), (2, 1), (5, 4)])
def test_average_pool(size):
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3))
    np.testing.assert_allclose(average_pool(jnp.asarray(x), size), adaptive_pool_oracle(x, size), rtol=1e-12)


def test_pool_to_common_size_takes_the_smaller_of_each_side():
    x, y = pool_to_common_size(jnp.ones((2, 4, 3, 5)), jnp.ones((2, 2, 6, 1)))
    assert (x.shape, y.shape) == ((2, 2, 3, 5), (2, 2, 3, 1))


def test_resize_repeats_the_nearest():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(resize(x, (3, 3))[0, ..., 0], [[0, 1, 2], [0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(resize(x, (1, 6))[0, ..., 0], [[1.5, 1.5, 2.5, 2.5, 3.5, 3.5]])


# Errors.

MAP, EMBEDDING = np.ones((4, 2, 2, 3), np.float32), np.ones((4, 3), np.float32)
LABELS = np.zeros(4, np.int32)


def dkd_of(student, teacher):
    return dkd_loss(student, teacher, LABELS)


def vid_of(mean, teacher):
    return vid_loss(mean, teacher, np.ones(3, np.float32))


def stages_of(loss):
    return lambda student, teacher: loss([student, student], [teacher, teacher])


FUNCTIONS = {
    "at": (attention_transfer_loss, MAP),
    "nst": (nst_loss, MAP),
    "fsp": (stages_of(fsp_loss), MAP),
    "ab": (stages_of(activation_boundary_loss), MAP),
    "fitnet": (hint_loss, MAP),
    "vid": (vid_of, MAP),
    "ft": (factor_transfer_loss, MAP),
    "reviewkd": (hierarchical_context_loss, MAP),
    "dkd": (dkd_of, EMBEDDING),
    "cc": (correlation_delta_loss, EMBEDDING),
    "rkd": (rkd_loss, EMBEDDING),
    "sp": (similarity_preserving_loss, MAP),
    "pkt": (pkt_loss, EMBEDDING),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("position", [0, 1])
def test_integers_are_refused(name, position):
    loss, array = FUNCTIONS[name]
    arguments = [array, array]
    arguments[position] = array.astype(np.int32)
    with pytest.raises(TypeError, match=r"must have a floating-point dtype, got int32$"):
        loss(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_different_batches_are_refused(name):
    loss, array = FUNCTIONS[name]
    with pytest.raises(ValueError, match=r"equal, got \w+ \(4, .*\), \w+ \(3, "):
        loss(array, array[:3])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: dkd_of(EMBEDDING[:, :2], EMBEDDING[:, :2]),
         "dkd_loss needs at least 3 classes, got logits of shape (4, 2)"),
        (lambda: dkd_loss(EMBEDDING, EMBEDDING, LABELS, temperature=0.0),
         "temperature must be greater than 0, got 0.0"),
        (lambda: dkd_loss(EMBEDDING, EMBEDDING, LABELS[:3]),
         "labels must have shape (4,) to match the batch, got (3,)"),
        (lambda: pkt_loss(EMBEDDING, EMBEDDING, epsilon=0.0), "epsilon must be greater than 0, got 0.0"),
        (lambda: pkt_loss(MAP, MAP), "student_embedding must have 2 dimensions, got shape (4, 2, 2, 3)"),
        (lambda: rkd_loss(EMBEDDING, MAP), "teacher_embedding must have 2 dimensions, got shape (4, 2, 2, 3)"),
        (lambda: attention_transfer_loss(EMBEDDING, MAP), "student_features must have 4 dimensions, got shape (4, 3)"),
        (lambda: vid_loss(MAP, MAP, np.ones(2, np.float32)), "log_scale must have shape (3,): (channels,), got (2,)"),
        (lambda: factor_transfer_loss(MAP, MAP[..., :2], pool_channels=False),
         "without pool_channels, factors must have the same number of channels, "
         "got student (4, 2, 2, 3), teacher (4, 2, 2, 2)"),
        (lambda: hierarchical_context_loss(MAP, MAP[:, :1]),
         "shapes must be equal, got student_features (4, 2, 2, 3), teacher_features (4, 1, 2, 3)"),
        (lambda: activation_boundary_loss([MAP], [MAP], margin=0.0), "margin must be greater than 0, got 0.0"),
        (lambda: activation_boundary_loss([MAP, MAP], [MAP]),
         "student has 2 stages and teacher 1: stages are paired one to one, so the numbers must be equal"),
        (lambda: activation_boundary_loss([], []), "at least 1 stages are needed, got 0"),
        (lambda: fsp_loss([MAP], [MAP]), "at least 2 stages are needed, got 1"),
        (lambda: fsp_loss([MAP, MAP], [MAP]),
         "student has 2 stages and teacher 1: stages are paired one to one, so the numbers must be equal"),
        (lambda: fsp_loss([MAP, MAP], [MAP, MAP[..., :2]]),
         "stage 2 must have the same number of channels in student and teacher, "
         "got student (4, 2, 2, 3), teacher (4, 2, 2, 2)"),
    ],
)  # fmt: skip
def test_errors(call, text):
    with pytest.raises(ValueError, match=message(text)):
        call()
