"""Vision Transformers: values of timm's, tokens, interpolation, random draws, and what a configuration sets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cskd_jax.errors import UserError
from cskd_jax.interop.matching import match
from cskd_jax.interop.names import from_torch, to_torch
from cskd_jax.models import count_parameters, create_model
from tests.torch_files import assert_same_variables

TINY = {"patch_size": 4, "image_size": (8, 12), "depth": 2}
WIDTH = 1 / 16


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
