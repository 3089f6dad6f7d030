"""Archives and image files that the tests make."""

import io
import tarfile
import zipfile

import numpy as np
from PIL import Image


def photograph(seed, size, mode="RGB", **options):
    """An image file of random blocks of 4 pixels, JPEG unless `options` of Pillow's save say otherwise."""
    width, height = size
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), channels), np.uint8)
    pixels = np.kron(blocks, np.ones((4, 4, 1), np.uint8))[:height, :width]
    buffer = io.BytesIO()
    image = Image.frombytes(mode, size, pixels.tobytes())
    image.save(buffer, **({"format": "JPEG", "quality": 95} | options))
    return buffer.getvalue()


def drawing():
    """An image file that Pillow leaves to Ghostscript to draw."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    return buffer.getvalue()


def write_tar(path, members, prefix=""):
    """Writes a tar archive, compressed as its suffix says."""
    mode = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".tar": "w"}[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, members, prefix=""):
    """Writes a zip archive; a member whose name ends with / is a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(prefix + name, data)
    return path
