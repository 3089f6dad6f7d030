"""The setup that the students of a trainer share."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax

from cskd_jax.data import ImageDataset
from cskd_jax.data.batches import Sampler
from cskd_jax.data.strong import strong_augment
from cskd_jax.distributed.devices import Devices
from cskd_jax.training.callbacks import Callback
from cskd_jax.training.mixing import Mix


@dataclasses.dataclass(frozen=True)
class Setup:
    """The setup that all students of a trainer share.

    Attributes:
      data: Training, test and possibly validation split.
      sampler: Sampler that chooses the images of a batch.
      normalize: Function from images of the data to inputs of the networks.
      augment: Function of images, a key and positions in the global batch, applied before `normalize`; None leaves the
        images unchanged.
      key: Key for weights and augmentation; the same for all students, so that their runs can be compared in pairs.
      devices: Devices to compute on.
      callbacks: Callbacks.
      workdir: Folder of the checkpoints and logs; None writes nothing.
      log_every: Number of steps between two rows of the history.
      keep_checkpoints: Number of most recent checkpoints to keep in addition to the best.
      save_every_minutes: Minimum time between two checkpoints, which are saved at the end of an epoch.
      evaluate_every_epochs: Number of epochs from one evaluation to the next.
      accumulation_steps: Number of micro-batches that a batch is divided into.
      mix: Function that mixes the inputs of the networks with each other; None leaves them unchanged.
    """

    data: ImageDataset
    sampler: Sampler
    normalize: Callable[[jax.Array], jax.Array]
    augment: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None
    key: jax.Array
    devices: Devices
    callbacks: Sequence[Callback] = ()
    workdir: pathlib.Path | None = None
    log_every: int = 50
    keep_checkpoints: int = 2
    save_every_minutes: float = 0.5
    evaluate_every_epochs: int = 1
    accumulation_steps: int = 1
    mix: Mix | None = None

    @property
    def micro_batch_size(self) -> int | None:
        """Returns the number of images in a micro-batch over all devices; None if batches stay whole."""
        return None if self.accumulation_steps == 1 else self.sampler.batch_size // self.accumulation_steps

    def preprocess(self, images: jax.Array, key: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns the images of a training batch as inputs of the networks."""
        return self.normalize(images if self.augment is None else self.augment(images, key, positions))

    def preprocess_view(self, images: jax.Array, key: jax.Array, positions: jax.Array) -> jax.Array:
        """Returns a further view of the images, strongly augmented after another draw of the usual augmentation."""
        usual_key, strong_key = jax.random.split(key)
        if self.augment is not None:
            images = self.augment(images, usual_key, positions)
        return self.normalize(strong_augment(images, strong_key, positions))

    def say(self, message: str) -> None:
        """Sends a line of text to the callbacks."""
        for callback in self.callbacks:
            callback.on_message(message)

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Returns a context for something other than training, which the callbacks are told about."""
        with contextlib.ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.pause(what))
            yield
