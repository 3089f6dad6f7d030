"""Image files and the equally sized arrays into which they are decoded."""

import contextlib
import re
import warnings
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from cskd_jax.errors import UserError, raise_if_of_system
from cskd_jax.inputs import open_regular

# Pillow's names of the formats that image files may have, regardless of their suffix. Some of the many other formats
# that Pillow knows start programs: EPS is rendered by Ghostscript.
FORMATS = ("BMP", "JPEG", "PNG", "WEBP", "GIF", "TIFF")
# The largest phone cameras make images of 50 million pixels, which take 200 MB while they are converted.
MAX_PIXELS = 52_000_000
_MAX_FILE = 256 << 20  # bytes
# Pillow reads files in Python's loops. What precedes the pixels, such as EXIF data, color profiles and thumbnails,
# takes a few hundred reads and less than a megabyte in most files.
_MAX_HEADER = 16 << 20  # bytes
_MAX_HEADER_READS = 20_000
# The pixels of a large image take some ten thousand reads. BMP has two for each run of equal pixels, and for PNG each
# read may be followed by slow work.
_MAX_READS = 4_000_000
_MAX_PNG_READS = 300_000
# 16x16 is the smallest usual tile of a TIFF image, and that of `MAX_PIXELS` has 203,125 of them.
_MAX_TIFF_VALUES = 250_000
_BYTES_OF_TIFF = (1, 2, 6, 7)  # Types of values that Pillow does not turn into Python's numbers,
# except in the tags that list the parts of the image.
_PARTS_OF_TIFF = (
    TiffImagePlugin.STRIPOFFSETS,
    TiffImagePlugin.STRIPBYTECOUNTS,
    TiffImagePlugin.TILEOFFSETS,
    TiffImagePlugin.TILEBYTECOUNTS,
)
_ALWAYS_FITTING_TILE = 1 << 22  # pixels
_MAX_SCANS = 50  # A progressive JPEG has about ten.
_JPEG_SCAN = b"\xff\xda"
_JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
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


def open_image(file: IO[bytes], most_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image file of one of `FORMATS`; Pillow raises many types of errors here and when decoding.

    For a file with several images, such as an animation, the first one is decoded. Pillow warns about many harmless
    things, so callers ignore its warnings.

    Raises:
      UserError: If the file has none of these formats, more than `most_pixels` according to its header, or more
        metadata, scans or values than any valid image.
    """
    start = file.read(16)
    is_tiff = start[:4] in TiffImagePlugin.PREFIXES
    if is_tiff:
        _check_tiff_values(file, start)
    # WEBP is read at once. TIFF may hold the layers of an editor, which are skipped at once.
    reads_all = is_tiff or start.startswith(b"RIFF")
    bounded: Any = _BoundedReads(file)
    bounded.allow(_MAX_FILE if reads_all else _MAX_HEADER, _MAX_HEADER_READS, "its header is too long")
    try:
        image = Image.open(bounded, formats=FORMATS)
    except UnidentifiedImageError:
        raise UserError(f"the format is not one of {', '.join(FORMATS)}") from None
    width, height = image.size
    if width * height > most_pixels:
        raise UserError(f"it has {width}x{height} pixels; at most {most_pixels:,} in total are allowed")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff_tiles(image)
    elif isinstance(image, JpegImagePlugin.JpegImageFile):  # or MPO, JPEG with several images
        _check_scans(file)
    bounded.allow(2 * _MAX_FILE, _MAX_PNG_READS if image.format == "PNG" else _MAX_READS, "it has too many parts")
    return image


class _BoundedReads:
    """An image file that Pillow cannot read in endless small steps."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def allow(self, size: int, reads: int, problem: str) -> None:
        """Sets how many bytes may be read from now on, in how many reads, and what is wrong with more."""
        self._bytes, self._reads, self._problem = size, reads, problem

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes; raises UserError if the limits are exceeded."""
        data = self._file.read(size)
        self._bytes -= len(data)
        self._reads -= 1
        if min(self._bytes, self._reads) < 0:
            raise UserError(self._problem)
        return data


def _check_tiff_values(file: IO[bytes], start: bytes) -> None:
    """Raises UserError if a tag of a TIFF file has so many values that Pillow would take gigabytes for them.

    Args:
      file: TIFF file.
      start: Its first 16 bytes.
    """
    if start.startswith(b"MM\0\x2b"):  # Pillow would read it as if it were no BigTIFF, and libtiff as what it is.
        raise UserError("big-endian BigTIFF is not supported")
    order: Any = "little" if start.startswith(b"II") else "big"
    # (start and end of the position of the tags), bytes of their number, of a tag, and of the number of its values
    offset, count_size, tag_size, values_size = ((8, 16), 8, 20, 8) if start[2] == 43 else ((4, 8), 2, 12, 4)
    file.seek(int.from_bytes(start[slice(*offset)], order))
    count = int.from_bytes(file.read(count_size), order)
    if count > 65_535:
        raise UserError("its header is too long")
    tags = file.read(count * tag_size)
    for begin in range(0, len(tags), tag_size):
        tag, kind = (int.from_bytes(tags[place : place + 2], order) for place in (begin, begin + 2))
        values = int.from_bytes(tags[begin + 4 : begin + 4 + values_size], order)
        if values > _MAX_TIFF_VALUES and (kind not in _BYTES_OF_TIFF or tag in _PARTS_OF_TIFF):
            raise UserError(f"its tag {tag} has {values:,} values; at most {_MAX_TIFF_VALUES:,} are allowed")


def _check_tiff_tiles(image: TiffImagePlugin.TiffImageFile) -> None:
    """Raises UserError if the tiles are much larger than the image: libtiff decodes whole tiles."""
    width, height = (image.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    whole = (image.width + 15) * (image.height + 15)  # Sides of tiles are multiples of 16.
    if width * height > max(whole, _ALWAYS_FITTING_TILE):
        raise UserError(f"it has tiles of {width}x{height} pixels, which are larger than the image")


def _check_scans(file: IO[bytes]) -> None:
    """Raises UserError if a JPEG file has too many scans, each of which goes through all pixels."""
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)
    if data.count(_JPEG_SCAN) <= _MAX_SCANS:
        return
    # These may be part of something else, such as a video after the end of the image.
    position, scans = 2, 0  # after the mark that begins the image
    for _ in range(_MAX_HEADER_READS):
        found = _JPEG_SEGMENT.search(data, position)
        if found is None or found[0] == b"\xff\xd9":
            return
        scans += found[0] == _JPEG_SCAN
        if scans > _MAX_SCANS:
            break
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    raise UserError(f"it has more than {_MAX_SCANS} scans, or too many other parts")


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
      TransientError: If there was no memory for it, or the like.
    """
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.ExitStack() as stack:
            # Pillow warns about things it can do without.
            if isinstance(file, str | Path):
                file = stack.enter_context(open_regular(file, _MAX_FILE))
            image = open_image(file)
            turn = _turn(image) if upright else None
            size = image.size[::-1] if turn in _SIDEWAYS else image.size
            fits = expected is None or image_size is not None or size == (expected[1], expected[0])
            if fits and not image.mode.startswith(("I", "F")):
                if image.format == "WEBP":  # Its decoder holds two more images, which a copy leaves behind.
                    image = image.copy()
                return _pixels(image if turn is None else image.transpose(turn), channels, image_size)
            mode = image.mode
    # Pillow's decoders raise many types of exceptions.
    except Exception as error:
        raise_if_of_system(error, f"cannot read {name}")
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
    except (UserError, MemoryError):
        raise
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
