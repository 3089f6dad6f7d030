"""Image files and the equally sized arrays into which they are decoded."""

import contextlib
import warnings
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from cskd_jax.errors import UserError
from cskd_jax.inputs import open_regular

# Pillow's names of the formats that image files may have, regardless of their suffix. Some of the many other formats
# that Pillow knows start programs: EPS is rendered by Ghostscript.
FORMATS = ("BMP", "JPEG", "PNG", "WEBP", "GIF", "TIFF")
# The largest phone cameras make images of 50 million pixels, which take 200 MB while they are converted.
MAX_PIXELS = 52_000_000
_MAX_FILE = 256 << 20  # bytes
_ORIENTATION = 0x0112  # in EXIF
# How an image is rotated upright, by orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {turn for orientation, turn in _TURNS.items() if orientation >= 5}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of the mode for each number of channels.


class Reader(Protocol):
    """Images of one size that are decoded when they are requested.

    Attributes:
      shape: Shape of all images together, (N, H, W, C).
    """

    shape: tuple[int, int, int, int]

    def select(self, index: np.ndarray) -> "Reader":
        """Returns a reader of the images at positions `index`, int [n], which can be sent to another process.

        Sending it is fast if n is small.
        """
        ...

    def read(self) -> np.ndarray:
        """Returns all images, uint8 [N, H, W, C].

        Raises:
          UserError: If an image is damaged or has a different size; the message names it.
        """
        ...


def open_image(file: IO[bytes]) -> Image.Image:
    """Opens an image file of one of `FORMATS`; Pillow raises many types of errors here and when decoding.

    For a file with several images, such as an animation, the first one is decoded. Pillow warns about many harmless
    things, so callers ignore its warnings.

    Raises:
      UserError: If the file has none of these formats, or more than `MAX_PIXELS` according to its header.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UserError(f"the format is not one of {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"it has {width}x{height} pixels; at most {MAX_PIXELS:,} in total are allowed")
    return image


def read_image(
    file: str | Path | IO[bytes],
    name: str,
    channels: int,
    image_size: int | None,
    *,
    expected: tuple[int, ...] | None = None,
    upright: bool = False,
) -> np.ndarray:
    """Decodes an image file.

    Args:
      file: File to decode.
      name: Name of the image, for messages.
      channels: Number of channels to which the image is converted: 1, 3 or 4.
      image_size: Side of the square that `middle_square` makes of the image, or None.
      expected: Shape (H, W, C) that the image must have, checked before it is decoded; None for any.
      upright: Whether the image is rotated according to its EXIF data.

    Returns:
      An array uint8 [H, W, channels].

    Raises:
      UserError: If it is not a valid image with 8 bits per channel, or does not have the expected shape.
    """
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.ExitStack() as stack:
            # Pillow warns about things it can do without.
            if isinstance(file, str | Path):
                file = stack.enter_context(open_regular(file, _MAX_FILE))
            image = stack.enter_context(open_image(file))
            turn = _turn(image) if upright else None
            size = image.size[::-1] if turn in _SIDEWAYS else image.size
            fits = expected is None or image_size is not None or size == (expected[1], expected[0])
            if fits and not image.mode.startswith(("I", "F")):
                return _pixels(image if turn is None else image.transpose(turn), channels, image_size)
            mode = image.mode
    # Pillow's decoders raise many types of exceptions.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} is not a valid image ({reason}): replace or remove it") from error
    if expected is not None and not fits:
        raise UserError(
            f"{name} is {size[0]}x{size[1]} pixels, expected {expected[1]}x{expected[0]}: all images must have the "
            "same size; set dataset.image_size to crop them to one size"
        )
    raise UserError(f"{name} has more than 8 bits per channel (Pillow mode {mode}): convert it to 8 bits")


def _pixels(image, channels, image_size):
    if image.mode in ("P", "PA"):  # A palette may hold transparency, and Pillow warns unless that is kept at first.
        image = image.convert("RGBA")
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if image_size is not None:
        image = middle_square(image, image_size)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Returns the operation that rotates an image upright; None if it is upright, or if its EXIF data are damaged."""
    if image.format == "TIFF":  # Pillow rotates it when decoding.
        return None
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many types of errors. Photographs with damaged data are left unchanged.
        return None


def middle_square(image: Image.Image, side: int) -> Image.Image:
    """Resizes the shorter side to 8/7 of `side`, bilinearly, and cuts out the middle.

    For `side` 224, this is the usual preprocessing for evaluation on ImageNet: 224 pixels out of 256. The mode must be
    one that Pillow can resize bilinearly, such as L, RGB or RGBA.

    Raises:
      UserError: The resized image would have more than `MAX_PIXELS`.
    """
    scale = round(side * 8 / 7) / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    if width * height > max(MAX_PIXELS, image.width * image.height):
        raise UserError(f"an image of {image.width}x{image.height} pixels is too narrow for a square of {side} pixels")
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + side, top + side))
