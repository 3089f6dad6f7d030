"""Image files and the arrays of one size into which they are decoded."""

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from cskd_jax.errors import UserError

# Pillow's names of the formats that image files may have, whatever their suffix. Some of the many others that Pillow
# knows start programs: EPS is drawn by Ghostscript.
FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's name of the mode by number of channels.


class Reader(Protocol):
    """Images of one size that are decoded when they are requested.

    Attributes:
      shape: Shape of all images together, (N, H, W, C).
    """

    shape: tuple[int, int, int, int]

    def select(self, index: np.ndarray) -> "Reader":
        """Returns a reader of the images at positions `index`, int [n], which can be sent to another process.

        Sending it is quick where n is small.
        """
        ...

    def read(self) -> np.ndarray:
        """Returns all images, uint8 [N, H, W, C].

        Raises:
          UserError: If an image is damaged or has another size; the message names it.
        """
        ...


def open_image(file: Path | BinaryIO) -> Image.Image:
    """Opens an image file of one of `FORMATS`; Pillow raises errors of many types here and when it decodes.

    Raises:
      UserError: If the file has none of these formats.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise UserError(f"the content is none of {', '.join(FORMATS)}") from None


def read_image(file: Path | BinaryIO, name: str, channels: int, image_size: int | None) -> np.ndarray:
    """Decodes an image file.

    Args:
      file: File to decode.
      name: Name of the image, for messages.
      channels: Number of channels to which the image is converted: 1, 3 or 4.
      image_size: Side of the square that `middle_square` makes of the image, or None.

    Returns:
      An array uint8 [H, W, channels].

    Raises:
      UserError: If it is not a sound image of 8 bits per channel.
    """
    try:
        with open_image(file) as image:
            if not image.mode.startswith(("I", "F")):
                if image.mode == "P":  # A palette may hold transparency, and Pillow warns unless it is kept at first.
                    image = image.convert("RGBA")
                if image.mode != MODES[channels]:
                    image = image.convert(MODES[channels])
                if image_size is not None:
                    image = middle_square(image, image_size)
                return np.asarray(image).reshape(image.height, image.width, channels)
            mode = image.mode
    # Pillow's decoders raise exceptions of many types.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} is not a sound image ({reason}): replace or remove it") from error
    raise UserError(f"{name} has more than 8 bits per channel (Pillow mode {mode}): convert it to 8 bits")


def check_size(name: str, shape: Sequence[int], expected: Sequence[int]) -> None:
    """Raises UserError unless the image `name` has the expected shape (H, W, C)."""
    if tuple(shape) != tuple(expected):
        (height, width), (wanted_height, wanted_width) = shape[:2], expected[:2]
        raise UserError(
            f"{name} is {width}x{height} pixels where {wanted_width}x{wanted_height} are expected: all images must "
            "have one size, or dataset.image_size be set, to which they are cut"
        )


def middle_square(image: Image.Image, side: int) -> Image.Image:
    """Resizes the shorter side to 8/7 of `side`, bilinearly, and cuts out the middle.

    For `side` 224, this is the usual evaluation of networks for ImageNet: 224 pixels out of 256. The mode must be one
    that Pillow resizes bilinearly, such as L, RGB and RGBA.
    """
    scale = round(side * 8 / 7) / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + side, top + side))
