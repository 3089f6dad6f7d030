"""The file that an import leaves beside a network: where its weights came from."""

import pathlib
from typing import Any

from cskd_jax.errors import UserError
from cskd_jax.inputs import is_text, read_json

IMPORT = "import.json"
# What others say about an import: its file and SHA-256 and, of a known public checkpoint, its address and data set.
_ORIGIN = ("file", "sha256", "source", "dataset")


def read_origin(folder: str | pathlib.Path) -> dict[str, Any] | None:
    """Returns {"file", "sha256", "source", "dataset"}, as far as they are known; None if no import left its file.

    A file that cannot be read counts as none: it describes the network, and nothing depends on it.

    Args:
      folder: Folder of a network.
    """
    try:
        found = read_json(pathlib.Path(folder) / IMPORT)
    except (OSError, UserError):
        return None
    return {key: found[key] for key in _ORIGIN if is_text(found.get(key))}
