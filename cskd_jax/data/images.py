"""Image files into arrays of one size."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from cskd_jax.errors import UserError

# Pillow's names of what image files may be, whatever their suffix says. Of the many others that Pillow knows, some
# start programs: EPS is drawn by Ghostscript.
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of an image with so many channels.


class Reader(Protocol):
    """Images of one size that are decoded when they are asked for.

    Attributes:
      shape: (N, H, W, C).
    """

    shape: tuple[int, int, int, int]

    def select(self, index: np.ndarray) -> "Reader":
        """A reader of the images at positions `index`, int [n]; quickly sent to another process where n is small."""

    def read(self) -> np.ndarray:
        """All images, uint8 [N, H, W, C].

        Raises:
          UserError: one is damaged or has another size; the message names it.
        """


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Opens an image file of one of `FORMATS`; Pillow raises errors of many types here and when it decodes.

    Raises:
      UserError: It is of none of them.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UserError(f"the content is none of {', '.join(FORMATS)}") from None


def read_image(file: Path | BinaryIO, name: str, channels: int, image_size: int | None) -> np.ndarray:
    """Decodes an image file.

    Args:
      file: to decode.
      name: of the image, for messages.
      channels: 1, 3 or 4, to which it is converted.
      image_size: if given, the side of the square that `middle_square` makes of it.

    Returns:
      uint8 [H, W, channels].

    Raises:
      UserError: It is no sound image of 8 bits per channel.
    """
    try:
        with open_image(file) as image:
            if not image.mode.startswith(("I", "F")):
                if image.mode == "P":  # A palette may hold transparency, which Pillow wants to see kept at first.
                    image = image.convert("RGBA")
                if image.mode != MODES[channels]:
                    image = image.convert(MODES[channels])
                if image_size is not None:
                    image = middle_square(image, image_size)
                return np.asarray(image).reshape(image.height, image.width, channels)
            mode = image.mode
    # Pillow's decoders raise many types.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} is not a sound image ({reason}): replace or remove it") from error
    raise UserError(f"{name} has more than 8 bits per channel (Pillow mode {mode}): convert it to 8 bits")


def check_size(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raises UserError unless the image `name` has the (H, W, C) that is expected."""
    if tuple(shape) != tuple(expected):
        (height, width), (wanted_height, wanted_width) = shape[:2], expected[:2]
        raise UserError(
            f"{name} is {width}x{height} pixels where {wanted_width}x{wanted_height} are expected: all images must "
            "have one size, or dataset.image_size be set, to which they are cut"
        )


def middle_square(image: Image.Image, side: int) -> Image.Image:
    """Resizes the shorter side to 8/7 of `side`, bilinearly, and cuts out the middle.

    224 pixels of 256: how the field evaluates on photographs. The mode must be one that Pillow resizes bilinearly,
    such as L, RGB and RGBA.
    """
    scale = round(side * 8 / 7) / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + side, top + side))
