"""Data sets on disk in the layout of tensorflow-datasets: this package's own are prepared here; any can be read.

The data sets of this package are written as array_record, which needs no TensorFlow to write or to read. TensorFlow is
required only where tensorflow-datasets cannot do without it: for tfrecord files, and to prepare its stock data sets.

tensorflow-datasets is imported inside the functions, so that importing `cskd_jax.data` stays cheap.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cskd_jax.data.images import MODES
from cskd_jax.data.tfds_records import ArrayRecords, RecordImages, TfRecords, _open, require_tensorflow
from cskd_jax.data.types import ImageDataset, Split, balanced_indices
from cskd_jax.errors import UserError, one_line, raise_if_of_system
from cskd_jax.inputs import read_json

_logger = logging.getLogger(__name__)

# Entry of the metadata of a prepared data set that says whether it was made from the official archive.
_OFFICIAL = "official"
_UNLABELED = -1  # The label of examples without one.


class NotPreparedError(UserError):
    """An error for a data set that is not prepared yet, where preparing it is not allowed."""


class SourceSplit(NamedTuple):
    """One split of a data set of this package, as its source provides it.

    Attributes:
      images: N images, each uint8 [H, W, C] or the bytes of an image file that decodes to that. A source whose images
        would not fit in memory provides an iterable that decodes them one by one and raises UserError if one is
        damaged.
      labels: Labels of each label feature, uint8 or int [N].
    """

    images: Iterable[np.ndarray | bytes]
    labels: Mapping[str, np.ndarray]


class Content(NamedTuple):
    """All of a data set of this package.

    Attributes:
      splits: Splits by name: train and test (or validation).
      label_names: Names of the labels of each label feature.
      official: Whether it was read from the official archive; None if there is no archive.
    """

    splits: Mapping[str, SourceSplit]
    label_names: Mapping[str, Sequence[str]]
    official: bool | None = None


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A data set of this package, prepared from its original archive or from another package.

    Attributes:
      name: Name in tensorflow-datasets, and of the folder.
      version: Version, to be increased when the same source gives different examples.
      description: One or two sentences for dataset_info.json.
      homepage: Address of the origin of the data.
      image_shape: Shape (H, W, C) of an image, with C one of 1, 3 and 4.
      label_sizes: Number of classes of each label feature; `label` is the one to learn.
      read: Function from the root data folder to the content; it is called only when nothing is prepared yet.
    """

    name: str
    version: str
    description: str
    homepage: str
    image_shape: tuple[int, int, int]
    label_sizes: Mapping[str, int]
    read: Callable[[Path], Content]


def load_own(
    source: ArraySource,
    *,
    data_dir: str | None,
    path: str | None,
    train_examples: int | None,
    image_size: int | None,
    prepare: bool = True,
) -> ImageDataset:
    """Opens a data set of this package, preparing it first if necessary.

    Args:
      source: Data set to open.
      data_dir: Root data folder; None is the folder in TFDS_DATA_DIR, or else ~/tensorflow_datasets.
      path: Must be None, because it is an argument of image_folder.
      train_examples: Size of the subset that `balanced_indices` chooses; None keeps all examples.
      image_size: Side of the squares that `images.read_image` makes of the images, or None.
      prepare: Whether it may be prepared; if not, nothing is written.

    Returns:
      The data set, in source order, with readers of its images.

    Raises:
      UserError: If the source cannot be obtained or is damaged, or if the folder cannot be written. NotPreparedError,
        a subclass, if it would have to be prepared.
    """
    refuse_path(source.name, path)
    builder_class = _builder_class(source)
    builder = _construct(source.name, data_dir, lambda: builder_class(data_dir=data_dir))
    if not _is_prepared(builder):
        _check_allowed(builder, prepare)
        builder.content = source.read(Path(builder.data_dir_root))
        _prepare(builder)
        # The builder is part of a reference cycle, which would keep gigabytes alive until the garbage collector runs.
        del builder.content
        # The builder is created anew, because the files may have been written by another process that was faster.
        builder = builder_class(data_dir=data_dir)
    dataset = load_prepared(builder, source.name, train_examples, image_size, keep_labels=prepare)
    return dataclasses.replace(dataset, official=_is_official(builder))


def load_named(
    name: str,
    *,
    table: Sequence[str],
    data_dir: str | None,
    path: str | None,
    train_examples: int | None,
    image_size: int | None,
    prepare: bool = True,
) -> ImageDataset:
    """Opens any data set that tensorflow-datasets knows or finds prepared under `data_dir`.

    Args:
      name: Name in tensorflow-datasets, with its configuration and version if needed ("name/config:1.0.0").
      table: Names of the data sets of this package, for the message about unknown ones.
      data_dir: Root data folder; None is the folder in TFDS_DATA_DIR, or else ~/tensorflow_datasets.
      path: Must be None, because it is an argument of image_folder.
      train_examples: Size of the subset that `balanced_indices` chooses; None keeps all examples.
      image_size: Side of the squares that `images.read_image` makes of the images, or None.
      prepare: Whether it may be prepared; if not, nothing is written.

    Returns:
      The data set as `load_prepared` returns it.

    Raises:
      UserError: If the name is unknown, if TensorFlow is needed but not installed, if the preparation failed, or if the
        data set does not consist of labeled images with the splits train and test (or validation). NotPreparedError, a
        subclass, if it would have to be prepared.
    """
    import tensorflow_datasets as tfds

    refuse_path(name, path)
    try:
        builder = _construct(name, data_dir, lambda: _builder(name, data_dir))
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"unknown data set '{name}'; it must be one of {', '.join(table)}, or any tensorflow-datasets name"
        ) from error
    if not _is_prepared(builder):
        _check_allowed(builder, prepare)
        _check_features(builder, name)  # This precedes a download that may take hours.
        require_tensorflow(f"data set '{name}' is not prepared in {builder.data_dir}, and preparing it")
        _prepare(builder)
        builder = tfds.builder(name, data_dir=data_dir)
    return load_prepared(builder, name, train_examples, image_size, keep_labels=prepare)


def load_prepared(
    builder: Any, name: str, train_examples: int | None, image_size: int | None, *, keep_labels: bool = False
) -> ImageDataset:
    """Opens the splits train and test (or validation) of a prepared builder.

    The split validation takes the place of test if there is no such split, or if it has no labels.

    Args:
      builder: `tfds.core.DatasetBuilder` whose files are prepared.
      name: Name of the data set, for the result and for messages.
      train_examples: Size of the subset that `balanced_indices` chooses; None keeps all examples.
      image_size: Side of the squares that `images.read_image` makes of the images; with None, all images must have the
        size of the first.
      keep_labels: Whether the labels may be kept in the folder of the data set, which makes the next time faster.

    Returns:
      The data set, in the order of its files. Its images are readers, except that images prepared as tfrecord, which
      can only be read from front to back, are arrays.

    Raises:
      UserError: If TensorFlow is needed but not installed, or if the data set does not consist of labeled images with
        the splits train and test (or validation).
    """
    _check_features(builder, name)
    _open.cache_clear()  # The same folder may have been prepared again.
    splits = builder.info.splits
    tests = [split for split in ("test", "validation") if split in splits]
    if "train" not in splits or not tests:
        raise UserError(f"data set '{name}' needs the splits train and test (or validation): it has {sorted(splits)}")
    categories = tuple(builder.info.features["label"].names)
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" in formats:
        open_split = functools.partial(ArrayRecords, builder.data_dir, keep_labels=keep_labels)
    elif "tfrecord" in formats:
        require_tensorflow(f"data set '{name}' is prepared as tfrecord in {builder.data_dir}, and reading it")
        open_split = functools.partial(TfRecords, builder)
    else:
        raise UserError(f"{builder.data_dir} is prepared as {sorted(formats)}; it must be array_record or tfrecord")
    records = {split: open_split(split) for split in ("train", tests[0])}
    labels = {split: source.labels() for split, source in records.items()}
    if len(tests) > 1 and len(labels["test"]) and (labels["test"] == _UNLABELED).all():
        _logger.warning("the split test of data set '%s' has no labels: its split validation is used", name)
        del records["test"], labels["test"]
        records["validation"] = open_split("validation")
        labels["validation"] = records["validation"].labels()
    labels = {split: _checked(found, records[split], name, len(categories)) for split, found in labels.items()}
    chosen = {split: np.arange(len(found)) for split, found in labels.items()}
    chosen["train"] = balanced_indices(labels["train"], categories, train_examples)
    channels = builder.info.features["image"].shape[-1]
    image_shape, opened = None, []
    for split, source in records.items():
        where = f"data set '{name}', split {split}"
        reader = RecordImages(source, chosen[split], where, channels, image_size, image_shape)
        image_shape = reader.shape[1:]
        images = reader if isinstance(source, ArrayRecords) else reader.read()
        opened.append(Split(images, labels[split][chosen[split]]))
    return ImageDataset(name, opened[0], opened[1], categories)


def refuse_path(name: str, path: str | None) -> None:
    """Raises UserError if a path is given for a data set that does not take one."""
    if path is not None:
        raise UserError(f"path='{path}' is only for image_folder: leave it out for data set '{name}' and set data_dir")


def _builder_class(source: ArraySource) -> type:
    """Returns the builder class of a data set of this package, which prepares it from its attribute `content`."""
    import tensorflow_datasets as tfds

    # The class is not registered, because tensorflow-datasets has stock builders of the same names.
    class ArrayBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = source.name
        VERSION = tfds.core.Version(source.version)
        content: Content

        def _info(self):
            labels = {key: tfds.features.ClassLabel(num_classes=size) for key, size in source.label_sizes.items()}
            return tfds.core.DatasetInfo(
                builder=self,
                description=source.description,
                homepage=source.homepage,
                features=tfds.features.FeaturesDict(
                    {"id": tfds.features.Text(), "image": tfds.features.Image(shape=source.image_shape), **labels}
                ),
                supervised_keys=("image", "label"),
                disable_shuffling=True,  # Keeps the order of the source.
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl_manager):
            features: Any = self.info.features
            metadata: Any = self.info.metadata
            metadata[_OFFICIAL] = self.content.official
            for key, names in self.content.label_names.items():
                features[key].names = list(names)
            return {name: self._generate_examples(name, split) for name, split in self.content.splits.items()}

        def _generate_examples(self, split_name, split):
            for index, image in enumerate(split.images):
                if isinstance(image, np.ndarray):
                    image = _encode(image)
                labels = {key: int(values[index]) for key, values in split.labels.items()}
                yield index, {"id": f"{split_name}_{index:05d}", "image": image, **labels}

    return ArrayBuilder


def _encode(image: np.ndarray) -> bytes:
    """Returns a PNG file; tensorflow-datasets would use TensorFlow, and compression that takes four times as long."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _builder(name: str, data_dir: str | None) -> Any:
    """Returns the builder of a data set; raises UserError for one of another registry, such as huggingface:NAME.

    The code of such a registry would be downloaded and executed, and the name may come from a foreign run.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming

    registry = naming.parse_builder_name_kwargs(name)[0].namespace
    if registry:
        raise UserError(
            f"data set '{name}' belongs to {registry}, not to tensorflow-datasets itself, and such data sets are not "
            "read: store its images in folders, for image_folder"
        )
    return tfds.builder(name, data_dir=data_dir)


def _construct(name: str, data_dir: str | None, make: Callable[[], Any]) -> Any:
    """Calls `make`, which constructs a builder, and turns all errors except an unknown name into UserError."""
    import tensorflow_datasets as tfds

    # tensorflow-datasets would create a folder named ~ in the working directory.
    if data_dir is None and "TFDS_DATA_DIR" not in os.environ and os.path.expanduser("~") == "~":
        raise UserError(
            f"data set '{name}' needs a folder, but there is no home folder (HOME is not set): set data_dir"
        )
    try:
        return make()
    except (tfds.core.DatasetNotFoundError, UserError):
        raise
    # Builders run their own code, which may raise anything; a damaged dataset_info.json raises protobuf errors.
    except Exception as error:
        if isinstance(error, ImportError) and "'tensorflow'" in str(error):
            require_tensorflow(f"opening data set '{name}'")
        problem = f"data set '{name}' cannot be opened in {_root(data_dir)}"
        raise_if_of_system(error, problem)
        raise UserError(f"{problem}: {one_line(error)}") from error


def _is_prepared(builder: Any) -> bool:
    """Returns whether the builder's folder holds a finished preparation.

    tensorflow-datasets writes into a folder with a different name and renames it at the end, so a preparation that was
    killed leaves nothing here.
    """
    try:
        if (builder.data_path / "dataset_info.json").exists():
            return True
        exists = builder.data_path.exists()
    except OSError as error:
        raise UserError(f"cannot read {builder.data_dir}: {one_line(error)}") from error
    if exists:
        # tensorflow-datasets would mistake the folder for a prepared one.
        raise UserError(f"{builder.data_dir} exists but holds no dataset_info.json: remove it to prepare it again")
    return False


def _check_allowed(builder: Any, prepare: bool) -> None:
    """Raises NotPreparedError unless a data set may be prepared."""
    if not prepare:
        raise NotPreparedError(f"data set '{builder.name}' is not prepared in {builder.data_dir}")


def _is_official(builder: Any) -> bool | None:
    """Returns whether a data set of this package was prepared from the official archive; None if it does not say."""
    path = Path(builder.data_dir) / "metadata.json"
    found = read_json(path).get(_OFFICIAL) if path.is_file() else None  # Earlier versions did not write it.
    return found if isinstance(found, bool) else None


def _prepare(builder: Any) -> None:
    """Writes the builder's array_record files, or accepts those that another process wrote in the meantime."""
    import tensorflow_datasets as tfds

    _logger.info("preparing the data set %s in %s", builder.name, builder.data_dir)
    tfds.disable_progress_bar()
    try:
        # tensorflow-datasets prints its own messages to standard output; it raises errors when something goes wrong.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise  # An image is damaged; the message names it.
    # A stock builder runs its own code, which may raise anything.
    except Exception as error:
        # If several processes prepare the same folder, all but the first fail when they rename theirs.
        if not _is_prepared(builder):
            problem = f"cannot prepare data set '{builder.name}' in {builder.data_dir}"
            raise_if_of_system(error, problem)
            raise UserError(f"{problem}: {one_line(error)}") from error


def _check_features(builder: Any, name: str) -> None:
    """Raises UserError unless there are an 8-bit `image` and a ClassLabel `label`."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    found = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = found.get("image"), found.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        has = (
            ", ".join(f"{key} ({type(feature).__name__})" for key, feature in sorted(found.items())) or "no named ones"
        )
        raise UserError(f"data set '{name}' needs the features image (Image) and label (ClassLabel): it has {has}")
    _check_image(image, name)


def _check_image(image: Any, name: str) -> None:
    """Raises UserError unless the feature `image` has 8 bits and 1, 3 or 4 channels."""
    if image.np_dtype != np.uint8 or len(image.shape) != 3 or image.shape[-1] not in MODES:
        raise UserError(
            f"data set '{name}' needs uint8 images with 1, 3 or 4 channels: "
            f"it has {np.dtype(image.np_dtype).name} images of shape {image.shape}"
        )


def _checked(labels: np.ndarray, records: ArrayRecords | TfRecords, name: str, classes: int) -> np.ndarray:
    """Returns the labels of a split, int32 [N]; raises UserError if there are none, or one that is not a class."""
    if not len(labels) or labels.min() < 0:
        raise UserError(f"data set '{name}' has no examples, or unlabeled ones, in its {records.split} split")
    if labels.max() >= classes:
        raise UserError(
            f"data set '{name}' has the label {labels.max()} in its {records.split} split; labels must be from 0 to "
            f"{classes - 1}: remove {records.directory} to prepare it again"
        )
    return labels.astype(np.int32)


def _root(data_dir: str | None) -> str:
    return data_dir or "the default data_dir"
