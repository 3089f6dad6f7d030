"""Records of data sets that tensorflow-datasets has prepared: array_record, or tfrecord through TensorFlow."""

import contextlib
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cskd_jax.data.images import read_image
from cskd_jax.errors import UserError, one_line, raise_if_of_system

_RECORDS_AT_ONCE = 4096  # Faster than reading one by one, without holding all of them encoded in memory.
INSTALL = "pip install 'cskd_jax[tf]'"


class ArrayRecords:
    """The records of a split that is prepared as array_record, read with random access and without TensorFlow.

    Args:
      directory: Folder of the prepared data set.
      split: Name of one of its splits.
      keep_labels: Whether `labels` may write into the folder.
    """

    def __init__(self, directory: str, split: str, keep_labels: bool = False):
        self.directory, self.split, self._keep_labels = directory, split, keep_labels

    def labels(self) -> np.ndarray:
        """Returns the labels as integers [N], which may be out of range.

        They may be kept in a file next to the records, because reading through all of the records may take a long time.
        """
        path, count = Path(self.directory) / f"labels-{self.split}.npy", self._count()
        # A memory map takes no memory for data that the file only claims to hold. NumPy parses the header as Python
        # code, and a damaged one raises errors of many types.
        with contextlib.suppress(Exception):
            labels = np.lib.format.open_memmap(path, mode="r") if path.is_file() else np.empty(0)
            if labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer):
                return np.array(labels)
        labels = np.array([label for _, label in self.examples(range(count))])
        if self._keep_labels:
            with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy") as file:
                np.save(file, labels)
                file.flush()
                shutil.copymode(path.with_name("dataset_info.json"), file.name)  # Whoever reads that may read this.
                os.link(file.name, path)  # Atomic. An older file that does not fit is kept but not used.
        return labels

    def examples(self, indices: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """Yields (encoded image, label) of the records at `indices`."""
        import tensorflow_datasets as tfds

        with unreadable(self.directory, self.split):
            source, fields = _open(self.directory, self.split)
            decoders = {"image": tfds.decode.SkipDecoding()}
            for start in range(0, len(indices), _RECORDS_AT_ONCE):
                for record in source.__getitems__(indices[start : start + _RECORDS_AT_ONCE]):
                    example = fields.deserialize_example_np(record, decoders=decoders)
                    if example["image"] is None or example["label"] is None:
                        raise ValueError("a record is empty")  # This is how array_record reads some truncated files.
                    yield example["image"], example["label"]

    def _count(self):
        with unreadable(self.directory, self.split):
            return len(_open(self.directory, self.split)[0])


@functools.lru_cache(maxsize=8)
def _open(directory: str, split: str) -> tuple[Any, Any]:
    """Returns the tfds.data_source of a split, and the features that are used.

    Both are cached, because a process often reads from them.
    """
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(directory)
    source = builder.as_data_source(
        split, file_format="array_record", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    # Parsing only the two features that are used and decoding the images here is twice as fast as the default.
    return source, tfds.features.FeaturesDict({key: builder.info.features[key] for key in ("image", "label")})


class TfRecords:
    """The records of a split that is prepared as tfrecord, read once through TensorFlow and kept, encoded."""

    def __init__(self, builder: Any, split: str):
        import tensorflow_datasets as tfds

        dataset = builder.as_dataset(
            split=split,
            decoders=tfds.decode.PartialDecoding(
                {"image": True, "label": True}, decoders={"image": tfds.decode.SkipDecoding()}
            ),
            read_config=tfds.ReadConfig(interleave_cycle_length=1),  # Reading one file after another keeps their order.
        )
        self.directory, self.split = builder.data_dir, split
        with unreadable(self.directory, split):
            self._examples = [(example["image"], example["label"]) for example in tfds.as_numpy(dataset)]

    def labels(self) -> np.ndarray:
        """Returns the labels as integers [N], which may be out of range."""
        return np.array([label for _, label in self._examples])

    def examples(self, indices: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """Yields (encoded image, label) of the records at `indices`."""
        return (self._examples[index] for index in indices)


class RecordImages:
    """A `Reader` for the images of records.

    Args:
      records: Records of a split.
      chosen: Positions of the examples in the split.
      where: Name of the split, for messages.
      channels: Number of channels to which images are converted: 1, 3 or 4.
      image_size: Side of the squares that `images.read_image` makes of the images, or None.
      image_shape: (H, W, C) that every image must have; None takes the shape of the first one.
    """

    def __init__(
        self,
        records: ArrayRecords | TfRecords,
        chosen: np.ndarray,
        where: str,
        channels: int,
        image_size: int | None,
        image_shape: tuple[int, int, int] | None,
    ):
        self._records, self._chosen, self._where = records, chosen, where
        self._channels, self._image_size = channels, image_size
        if image_shape is None:
            image_shape = next(self._images(chosen[:1], None)).shape
        self.shape = (len(chosen), *image_shape)

    def select(self, index: np.ndarray) -> "RecordImages":
        """Returns a reader of the images at positions `index`, int [n]."""
        settings = self._where, self._channels, self._image_size, self.shape[1:]
        return RecordImages(self._records, self._chosen[index], *settings)

    def read(self) -> np.ndarray:
        """Returns all images, uint8 [N, H, W, C]; raises UserError if one is damaged or has a different size.

        This is a plain loop, because small images are decoded so fast (10,000 per second) that threads would only wait
        for each other.
        """
        images = np.empty(self.shape, np.uint8)
        for row, image in enumerate(self._images(self._chosen, self.shape[1:])):
            images[row] = image
        return images

    def _images(self, positions, expected):
        positions = positions.tolist()
        for position, (encoded, _) in zip(positions, self._records.examples(positions), strict=True):
            name = f"{self._where}: example {position}"
            yield read_image(io.BytesIO(encoded), name, self._channels, self._image_size, expected=expected)


@contextlib.contextmanager
def unreadable(directory: str, split: str) -> Iterator[None]:
    """Turns the errors of the readers into UserError."""
    try:
        yield
    except UserError:
        raise
    # The readers are C++ libraries, which raise RuntimeError, ValueError, IndexError or TensorFlow's own errors.
    except Exception as error:
        raise_if_of_system(error, f"cannot read split {split} in {directory}")
        raise UserError(
            f"cannot read split {split} in {directory}: {one_line(error)}; remove the folder to prepare it again"
        ) from error


def require_tensorflow(what: str) -> None:
    """Imports TensorFlow, which `what` needs, or raises UserError."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(f"{what} needs TensorFlow, which is not installed: {INSTALL}") from error
    # TensorFlow would reserve the memory of every accelerator that it sees, which JAX needs.
    tf.config.set_visible_devices([], "GPU")
