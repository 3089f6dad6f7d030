"""The 1797 handwritten digits that are part of scikit-learn: a real data set that needs no download."""

from pathlib import Path
from typing import Any

import numpy as np

from cskd_jax.data.tfds_source import ArraySource, Content, SourceSplit

TEST_EXAMPLES = 357


def read(data_root: Path) -> Content:
    """Returns the digits, split into 1440 training and 357 test examples.

    The examples are sorted by class (and by source order within a class), and 357 of them, evenly spaced in that order,
    are used for testing. Each class thus contributes its share, to within one example. Both splits keep the source
    order. The values 0..16 are scaled to 0..255 and rounded.

    Args:
      data_root: Not used: the examples are part of scikit-learn.

    Returns:
      The content, with images uint8 [N, 8, 8, 1].
    """
    del data_root
    from sklearn.datasets import load_digits  # This import takes a second.

    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    line = np.argsort(labels, kind="stable")
    is_test = np.zeros(len(labels), bool)
    is_test[line[np.arange(TEST_EXAMPLES) * len(labels) // TEST_EXAMPLES]] = True
    splits = {
        name: SourceSplit(images[mask], {"label": labels[mask]})
        for name, mask in (("train", ~is_test), ("test", is_test))
    }
    return Content(splits, {"label": [str(name) for name in digits.target_names]})


SOURCE = ArraySource(
    name="digits",
    version="1.0.0",
    description="Handwritten digits of 8x8 pixels from the UCI repository, as scikit-learn carries them.",
    homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    image_shape=(8, 8, 1),
    label_sizes={"label": 10},
    read=read,
)
