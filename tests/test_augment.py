"""Augmentation on the device, and normalization, against what the docstrings promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cskd_jax.data.augment import Normalize, augment, enlarge
from cskd_jax.data.photographs import color_jitter, mean_gray, resized_crop

PADDING = 1
SIZE = 3
COUNT = 400

SETTINGS = ("resize", "rotation", "crop_padding", "flip", "crop_area", "color_jitter", "erasing")
jitted = jax.jit(augment, static_argnames=SETTINGS)


def make_image():
    """[3, 3, 2] whose pixels all differ and none is black."""
    return np.arange(1, SIZE * SIZE * 2 + 1, dtype=np.uint8).reshape(SIZE, SIZE, 2)


def crops(image, padding):
    """{(row, column): crop} of the zero-padded image."""
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    offsets = range(2 * padding + 1)
    return {(row, column): padded[row : row + SIZE, column : column + SIZE] for row in offsets for column in offsets}


@functools.cache
def augmented(crop_padding, flip, seed=0):
    """One image, augmented at COUNT positions."""
    images = np.repeat(make_image()[None], COUNT, axis=0)
    return np.asarray(jitted(images, jax.random.key(seed), jnp.arange(COUNT), crop_padding=crop_padding, flip=flip))


def draws(images, padding):
    """The (row, column, whether mirrored) of each image; fails for an image that is none of them."""
    known = {}
    for offset, crop in crops(make_image(), padding).items():
        known[crop.tobytes()] = (*offset, False)
        known[crop[:, ::-1].tobytes()] = (*offset, True)
    return [known[image.tobytes()] for image in images]


def test_images_are_mirrored_crops_of_the_padded_image():
    # Twice 3 x 3 offsets, each with an expectation of 22: all of them occur.
    assert len(set(draws(augmented(PADDING, True), PADDING))) == 18


def test_crop_alone_does_not_mirror():
    found = draws(augmented(PADDING, False), PADDING)
    assert not any(mirrored for *_, mirrored in found)
    assert len(set(found)) == 9


def test_crops_are_uniform():
    found = draws(augmented(PADDING, True), PADDING)
    counts = np.unique([3 * row + column for row, column, _ in found], return_counts=True)[1]
    # Expectation 44, standard deviation 6.3.
    assert counts.min() > 44 - 4 * 6.3
    assert counts.max() < 44 + 4 * 6.3


def test_flip_mirrors_about_half():
    found = draws(augmented(0, True), 0)
    # Expectation 200, standard deviation 10.
    assert abs(sum(mirrored for *_, mirrored in found) - COUNT / 2) < 40


def test_flip_does_not_depend_on_the_crop():
    found = draws(augmented(PADDING, True), PADDING)
    mirrored = [mirrored for row, _, mirrored in found if row == 0]
    assert 0.3 < np.mean(mirrored) < 0.7


def test_neither_crop_nor_flip_changes_nothing():
    np.testing.assert_array_equal(augmented(0, False), np.repeat(make_image()[None], COUNT, axis=0))


def test_shape_and_dtype_stay():
    images = augmented(PADDING, True)
    assert images.shape == (COUNT, SIZE, SIZE, 2)
    assert images.dtype == np.uint8


def test_key_changes_the_draws():
    assert draws(augmented(PADDING, True), PADDING) != draws(augmented(PADDING, True, seed=1), PADDING)


@pytest.mark.parametrize("parts", [2, 8])
def test_split_of_the_batch_does_not_matter(parts):
    size = COUNT // parts
    images = np.repeat(make_image()[None], size, axis=0)
    split = [
        jitted(images, jax.random.key(0), part * size + jnp.arange(size), crop_padding=PADDING, flip=True)
        for part in range(parts)
    ]
    np.testing.assert_array_equal(np.concatenate(split), augmented(PADDING, True))


def test_draw_does_not_depend_on_the_image():
    images = np.stack([make_image(), make_image() + 100])
    first, second = jitted(images, jax.random.key(0), jnp.array([5, 5]), crop_padding=PADDING, flip=True)
    np.testing.assert_array_equal(np.where(first > 0, first + 100, 0), second)


def test_not_square():
    images = np.repeat(make_image()[None, :2], 4, axis=0)
    assert jitted(images, jax.random.key(0), jnp.arange(4), crop_padding=2, flip=True).shape == (4, 2, 3, 2)


@pytest.mark.slow
def test_without_jit():
    images = np.repeat(make_image()[None], 4, axis=0)
    result = augment(images, jax.random.key(0), jnp.arange(4), crop_padding=PADDING, flip=True)
    np.testing.assert_array_equal(result, augmented(PADDING, True)[:4])


def bilinear(image, height, width):
    """[H, W, C] enlarged in float64, straight from the definition: exact values, not yet rounded."""

    def weights(size, new_size):
        middle = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
        return np.maximum(0, 1 - np.abs(middle[:, None] - np.arange(size)))

    rows, columns = weights(image.shape[0], height), weights(image.shape[1], width)
    return np.einsum("ah,bw,hwc->abc", rows, columns, image.astype(np.float64), optimize=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "side", "new_shape"),
    [((64, 64, 3), 72, (72, 72)), ((224, 224, 3), 256, (256, 256)), ((4, 6, 1), 10, (10, 15)), ((5, 3, 2), 3, (5, 3))],
)
def test_enlarge_is_bilinear(shape, side, new_shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    result = np.asarray(enlarge(image[None], side))[0]
    assert (result.shape, result.dtype) == ((*new_shape, shape[2]), np.uint8)
    assert np.abs(result - bilinear(image, *new_shape)).max() <= 0.5 + 1e-9
    if shape[2] == 3:  # Pillow rounds twice, once after each direction.
        other = np.asarray(Image.fromarray(image).resize(new_shape[::-1], Image.Resampling.BILINEAR))
        assert np.abs(result.astype(int) - other).max() <= 1


@pytest.mark.slow
def test_enlarge_with_64_bit_types(x64):
    image = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    assert enlarge(image, 9).dtype == np.uint8
    with jax.enable_x64(False):
        expected = np.asarray(enlarge(image, 9))
    np.testing.assert_array_equal(enlarge(image, 9), expected)


def test_enlarge_at_the_limit_of_its_integers():
    image = np.full((1, 2, 2, 1), 255, np.uint8)
    np.testing.assert_array_equal(enlarge(image, 1448), np.full((1, 1448, 1448, 1), 255))
    with pytest.raises(ValueError, match="images of 1449x1449 pixels are too large for 32-bit integers"):
        enlarge(image, 1449)


def test_resized_crop_at_the_limit_of_its_integers():
    key = jax.random.PRNGKey(0)
    image = np.full((1448, 1448, 1), 255, np.uint8)
    np.testing.assert_array_equal(resized_crop(image, key, 0.5), image)
    with pytest.raises(ValueError, match="images of 2048x1536 pixels are too large for 32-bit integers"):
        resized_crop(np.zeros((1536, 2048, 1), np.uint8), key, 0.5)


def test_color_jitter_at_the_limit_of_its_integers():
    image = np.full((2048, 4096, 1), 255, np.uint8)
    assert int(mean_gray(image.astype(np.int32))) == 255
    with pytest.raises(ValueError, match="images of 4096x2049 pixels are too large"):
        color_jitter(np.zeros((2049, 4096, 1), np.uint8), jax.random.PRNGKey(0), 0.5)


def test_enlarge_does_not_make_smaller():
    with pytest.raises(ValueError, match="resize is 63; images of 80x64 pixels can only be enlarged"):
        enlarge(np.zeros((1, 64, 80, 3), np.uint8), 63)


def resized(positions, crop_padding=0):
    images = np.repeat(make_image()[None], len(positions), axis=0)
    settings = {"resize": SIZE + 1, "crop_padding": crop_padding, "flip": True}
    return np.asarray(jitted(images, jax.random.key(0), jnp.asarray(positions), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("padding", [0, 1])
def test_resized_images_are_mirrored_crops_of_the_enlarged_image(padding):
    enlarged = np.asarray(enlarge(make_image()[None], SIZE + 1))[0]
    enlarged = np.pad(enlarged, ((padding, padding), (padding, padding), (0, 0)))
    offsets = range(2 + 2 * padding)
    cut = [enlarged[row : row + SIZE, column : column + SIZE] for row in offsets for column in offsets]
    possible = {crop.tobytes() for crop in cut} | {crop[:, ::-1].tobytes() for crop in cut}
    found = {image.tobytes() for image in resized(np.arange(COUNT), padding)}
    assert len(possible) == 2 * (2 + 2 * padding) ** 2
    assert found == possible


def test_resized_images_depend_on_the_position_alone():
    whole = resized(np.arange(64))
    np.testing.assert_array_equal(np.concatenate([resized(np.arange(8) + start) for start in range(0, 64, 8)]), whole)
    np.testing.assert_array_equal(resized(np.arange(64)[::-1]), whole[::-1])


@pytest.mark.slow
def test_resize_alone_without_jit():
    images = np.repeat(make_image()[None], 8, axis=0)
    settings = {"resize": SIZE + 1, "crop_padding": 0, "flip": True}
    np.testing.assert_array_equal(augment(images, jax.random.key(0), jnp.arange(8), **settings), resized(np.arange(8)))


def test_normalize():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    result = Normalize(mean, std)(images)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images / 255 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6)


def test_normalize_gray():
    images = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3, 1)
    np.testing.assert_allclose(Normalize((0.2,), (0.5,))(images).ravel(), [-0.4, 0, 1.6], atol=1e-6)


def test_normalize_stays_float32_with_64_bit_types(x64):
    assert Normalize((0.5,), (0.5,))(np.zeros((1, 2, 2, 1), np.uint8)).dtype == jnp.float32


def rotated(image, count, rotation):
    """One image, rotated at `count` positions."""
    images = np.repeat(image[None], count, axis=0)
    key, positions = jax.random.key(3), jnp.arange(count)
    return np.asarray(jitted(images, key, positions, rotation=rotation, crop_padding=0, flip=False))


@pytest.mark.slow
def test_rotation_is_that_of_pillow():
    """The angles go up to the largest one to both sides, and the nearest pixel is taken."""
    image = np.random.default_rng(0).integers(1, 256, (12, 16, 3), np.uint8)
    angles = np.linspace(-20, 20, 257)
    expected = [np.asarray(Image.fromarray(image).rotate(angle, Image.Resampling.NEAREST)) for angle in angles]
    nearest = []
    for result in rotated(image, 60, 20):
        wrong = [(result != other).any(axis=-1).mean() for other in expected]
        nearest.append(angles[np.argmin(wrong)])
        assert min(wrong) < 0.02  # A pixel on the border between two others may fall to either.
    assert min(nearest) < -15
    assert max(nearest) > 15


def test_half_a_turn_is_exact():
    image = make_image()
    turned = {image[::-1, ::-1].tobytes(), image.tobytes()}
    assert turned <= {result.tobytes() for result in rotated(image, 2000, 180)}


@pytest.mark.slow
def test_rotation_leaves_the_other_draws_alone():
    image, key = np.full((2, 5, 5, 1), 7, np.uint8), jax.random.key(0)
    image[:, 2, 1] = 200
    plain = jitted(image, key, jnp.arange(2), crop_padding=0, flip=True)
    with_rotation = jitted(image, key, jnp.arange(2), rotation=1, crop_padding=0, flip=True)
    np.testing.assert_array_equal(plain, with_rotation)  # One degree moves none of so few pixels.


# Photographs.


def photographs(count=32, size=(12, 16)):
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (count, 3, 4, 3))
    return np.clip(np.kron(smooth, np.ones((1, size[0] // 3, size[1] // 4, 1))), 0, 255).astype(np.uint8)


def pixels_of_box(image, box):
    """The rectangle that Pillow cuts out and enlarges bilinearly."""
    return np.asarray(Image.fromarray(image).crop(box).resize(image.shape[1::-1], Image.Resampling.BILINEAR))


@pytest.mark.slow
def test_resized_crop_is_a_rectangle_enlarged():
    """Every result is what Pillow makes of one of all rectangles, up to rounding."""
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    settings = {"crop_area": 0.3, "crop_padding": 0, "flip": False}
    found = jitted(np.repeat(image[None], 24, axis=0), jax.random.key(0), jnp.arange(24), **settings)
    boxes = [
        (left, top, left + width, top + height)
        for height in range(1, 7)
        for width in range(1, 9)
        for top in range(7 - height)
        for left in range(9 - width)
    ]
    candidates = np.stack([pixels_of_box(image, box) for box in boxes]).astype(int)
    seen = set()
    for result in np.asarray(found).astype(int):
        errors = np.abs(candidates - result).max(axis=(1, 2, 3))
        left, top, right, bottom = boxes[int(errors.argmin())]
        assert errors.min() <= 1
        area = (right - left) * (bottom - top) / 48
        assert area >= 0.3 - 0.15  # Sides are rounded to whole pixels.
        seen.add((left, top, right, bottom))
    assert len(seen) > 12


@pytest.mark.slow
def test_color_jitter_changes_brightness_contrast_and_saturation():
    images = photographs()
    key, positions = jax.random.key(0), jnp.arange(len(images))
    settings = {"crop_padding": 0, "flip": False}
    changed = np.asarray(jitted(images, key, positions, color_jitter=0.4, **settings)).astype(float)
    ratios = changed.mean(axis=(1, 2, 3)) / images.mean(axis=(1, 2, 3))
    assert 0.55 < ratios.min() < 0.8
    assert 1.1 < ratios.max() < 1.45
    np.testing.assert_array_equal(jitted(images, key, positions, color_jitter=0.0, **settings), images)
    # Gray images stay gray, however saturation changes.
    gray_images = np.repeat(images[..., :1], 3, axis=3)
    result = np.asarray(jitted(gray_images, key, positions, color_jitter=1.0, **settings)).astype(int)
    assert np.abs(result - result[..., :1]).max() <= 1


@pytest.mark.slow
def test_erasing_makes_a_rectangle_gray():
    images = np.zeros((200, 12, 16, 3), np.uint8)
    settings = {"crop_padding": 0, "flip": False, "erasing": 0.5}
    result = np.asarray(jitted(images, jax.random.key(0), jnp.arange(200), **settings))
    erased = (result == 124).all(axis=3)
    assert not result[~erased].any()
    shares = erased.mean(axis=(1, 2))
    assert 0.35 < np.mean(shares > 0) < 0.65
    assert shares.max() < 0.45
    for mask in erased[shares > 0]:
        rows, columns = np.nonzero(mask)
        assert mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()


@pytest.mark.slow
def test_photographs_are_augmented_by_position():
    """However the batch is split."""
    images, key = photographs(8), jax.random.key(5)
    settings = {"crop_area": 0.08, "color_jitter": 0.4, "erasing": 1.0, "crop_padding": 0, "flip": True}
    compiled = functools.partial(jitted, **settings)
    whole = compiled(images, key, jnp.arange(8))
    parts = [compiled(images[i : i + 2], key, jnp.arange(i, i + 2)) for i in range(0, 8, 2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(np.unique(np.asarray(whole), axis=0)) == 8
