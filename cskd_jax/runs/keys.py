"""The keys of a configuration, each with its default, rule and meaning."""

import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any

from cskd_jax.models import MODELS
from cskd_jax.models.vision_transformer import VISION_TRANSFORMER_SETTINGS, VisionTransformer
from cskd_jax.training import rules

# The default of a key that every recipe must set.
REQUIRED = object()
_AS_DEFAULT = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a configuration.

    Attributes:
      default: Value if a recipe does not set the key, or `REQUIRED`.
      rule: Rule that a value must follow.
      meaning: One sentence for the documentation.
      changes_results: Whether another value may lead to other results. A run may be resumed with another value of a
        key that does not change results.
      before: Value that applies to runs whose workdir lacks the key. It is needed for a key that offers a choice where
        earlier versions behaved differently from the new default. A run that began with that behavior continues with
        it.
      data_set: Name of the only data set that reads the key; None if all do.
      only_with: (another key, those of its values with which this key is read). None in place of the values means
        any value except None, zero and an empty one; None for the pair means that the key is always read.
    """

    default: Any
    rule: rules.Rule
    meaning: str
    changes_results: bool = True
    before: Any = _AS_DEFAULT
    data_set: str | None = None
    only_with: tuple[str, tuple[str, ...] | None] | None = None

    def value_in_workdir(self, data_set: str | None) -> Any:
        """Returns the value that the absence of the key implies in the workdir of a run on a data set."""
        is_read = self.data_set in (None, data_set)
        return self.before if is_read and self.before is not _AS_DEFAULT else self.default

    @property
    def has_changed(self) -> bool:
        """Returns whether earlier versions did something other than the default."""
        return self.before is not _AS_DEFAULT


_MODEL = rules.one_of(*MODELS, listed_in="a network of [networks.md](networks.md)")
_TEACHER = rules.optional(_MODEL._replace(test=lambda value: value in MODELS or not value))

# The settings of a network that configurations may set, besides its name and width.
_NETWORK_SETTINGS = (
    "patch_size",
    "depth",
    "num_heads",
    "pool",
    "distillation_token",
    "register_tokens",
    "layer_scale",
    "dropout",
    "stochastic_depth",
)


def attributes_of(owner: type) -> dict[str, str]:
    """Returns the descriptions of attributes in the docstring of a class, by name."""
    lines = (inspect.getdoc(owner) or "").partition("Attributes:\n")[2].splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line.startswith("    ") and found:
            found[list(found)[-1]] += " " + line.strip()
        elif line.startswith("  ") and ": " in line:
            name, _, text = line.strip().partition(": ")
            found[name] = text
        else:
            break
    return found


def _network_keys(role: str) -> dict[str, Key]:
    """Returns the keys of the settings of a teacher or student, which are those of a Vision Transformer."""
    meanings, found = attributes_of(VisionTransformer), {}
    for name in _NETWORK_SETTINGS:
        rule = rules.optional(rules.Rule(*VISION_TRANSFORMER_SETTINGS[name]))
        meaning = meanings[name].partition(";")[0].rstrip(".")
        found[f"{role}.{name}"] = Key(
            None, rule, f"{meaning}, for a Vision Transformer; None keeps the value of the network."
        )
    return found


_STEP = ("optimizer.schedule", ("step",))
_ADAMW, _SGD_OR_DOT = ("optimizer.name", ("adamw",)), ("optimizer.name", ("sgd", "dot"))

# Every key except those of `losses`, which `runs.loss_keys` derives from the classes of the losses.
KEYS: Mapping[str, Key] = types.MappingProxyType(
    {
        "method": Key(REQUIRED, rules.TEXT, "Name of the method in results and in the default workdir."),
        "seed": Key(
            0, rules.integer(0, 2**32 - 1), "Seed of the weights, the order of the images, and the augmentation."
        ),
        "batch_size": Key(128, rules.integer(1), "Images in a step, over all devices."),
        "drop_last": Key(False, rules.BOOL, "Whether the last, smaller batch of an epoch is left out."),
        "epochs": Key(200, rules.integer(1), "Epochs that the student trains for; a larger number extends a run."),
        "dtype": Key(
            "float32",
            rules.one_of("float32", "bfloat16", "float64"),
            "Floating-point type that the networks compute in; float64 needs JAX_ENABLE_X64=1 in the environment.",
        ),
        "precision": Key(
            "default",
            rules.one_of("default", "high", "highest"),
            "Precision of matrix products and convolutions of float32 numbers: by default, TPUs and recent GPUs use a "
            "lower one; highest is float32 everywhere. CPUs always compute in float32.",
        ),
        "log_every": Key(50, rules.integer(1), "Steps between two rows of metrics.jsonl.", changes_results=False),
        "keep_checkpoints": Key(
            2,
            rules.integer(1),
            "Number of newest checkpoints to keep, in addition to the best one.",
            changes_results=False,
        ),
        "save_every_minutes": Key(
            0.5,
            rules.NOT_NEGATIVE,
            "Minimum minutes between two checkpoints, which are saved at the end of an epoch; 0 saves after every "
            "epoch. The last epoch and a stop always save one.",
            changes_results=False,
        ),
        "evaluate_every_epochs": Key(
            1,
            rules.integer(1),
            "Epochs from one evaluation to the next; the last epoch is always evaluated. The best epoch is the best of "
            "those that are evaluated.",
        ),
        "dataset.name": Key(
            REQUIRED,
            rules.TEXT,
            "Name of the data set: digits, digit_pairs, cifar10, cifar100, tiny_imagenet, cub200, image_folder, or any "
            "name in tensorflow-datasets.",
        ),
        "dataset.data_dir": Key(
            None,
            rules.optional(rules.TEXT),
            "Folder of prepared data sets and downloads; None is the folder in the environment variable TFDS_DATA_DIR, "
            "or else ~/tensorflow_datasets.",
            changes_results=False,
        ),
        "dataset.path": Key(
            None,
            rules.optional(rules.TEXT),
            "Folder with `train/CLASS/*` (or `train/*`, images without labels) and `test/CLASS/*`; for image_folder "
            "only.",
            changes_results=False,
        ),
        "dataset.train_examples": Key(
            None,
            rules.optional(rules.integer(1, 10**9)),
            "Size of a class-balanced part of the training split (of multi-label data, the first examples); None takes "
            "all of it.",
        ),
        "dataset.validation_examples": Key(
            None,
            rules.optional(rules.integer(1, 10**9)),
            "Size of a class-balanced part of the training split that is held out to choose the best epoch; the test "
            "split is then measured for the last and the best epoch alone. None chooses on the test split.",
        ),
        "dataset.validation_seed": Key(
            0,
            rules.integer(0, 2**32 - 1),
            "Seed for choosing the validation examples.",
            only_with=("dataset.validation_examples", None),
        ),
        "dataset.image_size": Key(
            None,
            rules.optional(rules.integer(1, 4096)),
            "Side of the square to which every image is resized and cropped; None leaves images as they are.",
        ),
        "dataset.exif_orientation": Key(
            True,
            rules.BOOL,
            "Whether photographs are rotated upright according to their EXIF data; for image_folder only.",
            before=False,
            data_set="image_folder",
        ),
        "dataset.streaming": Key(
            None,
            rules.optional(rules.BOOL),
            "Whether images are decoded batch by batch rather than once into memory; None streams only images "
            "that would take more than an eighth of the memory.",
            changes_results=False,
        ),
        "dataset.workers": Key(
            None,
            rules.optional(rules.integer(1, 1024)),
            "Processes that decode streamed images; None starts one per processor.",
            changes_results=False,
        ),
        "dataset.mean": Key(
            REQUIRED, rules.CHANNELS, "Mean of each channel, or one for all channels, of pixels in [0, 1]."
        ),
        "dataset.std": Key(
            REQUIRED, rules.DEVIATIONS, "Standard deviation of each channel, or one for all, of pixels in [0, 1]."
        ),
        "sampler.name": Key(
            "uniform",
            rules.one_of("uniform", "balanced"),
            "Order of the images: uniform shows each once per epoch; balanced puts equal numbers of images of each "
            "of its classes into a batch.",
        ),
        "sampler.samples_per_category": Key(
            4,
            rules.integer(1),
            "Images of a class in a balanced batch, a divisor of batch_size.",
            only_with=("sampler.name", ("balanced",)),
        ),
        "augment.resize": Key(
            0,
            rules.integer(0, 1024),
            "Number of pixels to which the shorter side of an image is enlarged before cropping, at least as many as "
            "it already has; 0 leaves the image as it is. It does not change with dataset.image_size.",
        ),
        "augment.rotation": Key(
            0,
            rules.integer(0, 180),
            "Maximum degrees by which an image is rotated, in either direction, before it is cropped; 0 turns it off.",
        ),
        "augment.crop_padding": Key(
            0,
            rules.integer(0, 256),
            "Pixels of black padding around an image before it is cropped at random; 0 adds none, and then crops "
            "nothing unless augment.resize has enlarged the image.",
        ),
        "augment.crop_area": Key(
            1.0,
            rules.AREA,
            "Smallest share of the area of an image that a random resized crop keeps, such as 0.08; 1 turns it off.",
        ),
        "augment.flip": Key(False, rules.BOOL, "Whether half of the images are mirrored."),
        "augment.color_jitter": Key(
            0.0, rules.SHARE, "Largest change of brightness, contrast and saturation, as a fraction; 0 turns it off."
        ),
        "augment.erasing": Key(0.0, rules.SHARE, "Probability that a random rectangle of an image becomes gray."),
        "augment.mixup": Key(
            0.0,
            rules.UP_TO_100,
            "Parameter of the beta distribution with which mixup mixes an image with another of the batch; 0 turns it "
            "off.",
        ),
        "augment.cutmix": Key(
            0.0, rules.UP_TO_100, "The same for CutMix. With both, each batch uses one of them, drawn at random."
        ),
        "teacher.name": Key(None, _TEACHER, "Network of the teacher; needed only by losses that read a teacher."),
        "teacher.width": Key(1.0, rules.WIDTH, "Factor on the number of channels of the teacher."),
        "teacher.checkpoint": Key(
            None,
            rules.optional(rules.TEXT),
            "Folder of a trained teacher, such as WORKDIR/teacher; None trains one first, on the labels alone.",
        ),
        "teacher.others": Key(
            (),
            rules.TEXTS,
            "Folders of further trained teachers, which may be any networks of this package. All teachers are then "
            "combined, except for a loss that names one of them: 0 is that of teacher.checkpoint, 1 the first of "
            "these.",
        ),
        "teacher.weights": Key(
            (),
            rules.SHARES,
            "Weights of several teachers in their combination; they are equal by default.",
            only_with=("teacher.others", None),
        ),
        "teacher.combine": Key(
            "logits",
            rules.one_of("logits", "probabilities"),
            "What is averaged over several teachers: their logits, or their probabilities at temperature 1.",
            only_with=("teacher.others", None),
        ),
        "teacher.image_sizes": Key(
            (),
            rules.SIDES,
            "Sides of the squares to which each teacher's images are resized, 0 for images as they are; by default, "
            "none are resized.",
        ),
        "teacher.epochs": Key(200, rules.integer(1), "Epochs that the teacher trains for, if it is trained here."),
        "teacher.learning_rate": Key(
            None,
            rules.optional(rules.POSITIVE),
            "Learning rate of a teacher that is trained here; None takes optimizer.learning_rate.",
        ),
        "student.name": Key(REQUIRED, _MODEL, "Network of the student."),
        "student.width": Key(1.0, rules.WIDTH, "Factor on the number of channels of the student."),
        "student.checkpoint": Key(
            None,
            rules.optional(rules.TEXT),
            "Folder of a trained network, such as WORKDIR/student, from whose weights the student starts; its "
            "classifier is initialized anew if the classes differ. None starts from random weights.",
        ),
        **_network_keys("teacher"),
        **_network_keys("student"),
        "optimizer.name": Key(
            "sgd", rules.one_of("sgd", "adamw", "dot"), "Name of the optimizer; dot is sgd with two momenta."
        ),
        "optimizer.learning_rate": Key(
            0.1, rules.POSITIVE, "Learning rate after the warm-up, before the schedule lowers it."
        ),
        "optimizer.schedule": Key(
            "step",
            rules.one_of("step", "cosine", "constant"),
            "How the learning rate falls: step at optimizer.milestones, cosine to zero, constant not at all.",
        ),
        "optimizer.warmup_epochs": Key(
            0, rules.integer(0), "Epochs over which the learning rate rises linearly from zero."
        ),
        "optimizer.milestones": Key(
            (),
            rules.EPOCHS,
            "Numbers of epochs after which the learning rate is multiplied by optimizer.decay_factor, with the step "
            "schedule.",
            only_with=_STEP,
        ),
        "optimizer.decay_factor": Key(
            0.1, rules.POSITIVE, "Factor on the learning rate at each milestone.", only_with=_STEP
        ),
        "optimizer.weight_decay": Key(
            1e-4, rules.NOT_NEGATIVE, "Factor of the weight decay: an L2 penalty in sgd, decoupled decay in adamw."
        ),
        "optimizer.decay_all": Key(
            True,
            rules.BOOL,
            "Whether weight decay also applies to parameters with at most one dimension: biases and normalization.",
        ),
        "optimizer.clip_norm": Key(
            None,
            rules.optional(rules.POSITIVE),
            "Largest global norm of the gradients, to which larger ones are scaled down before the weight decay; None "
            "does not clip.",
        ),
        "optimizer.accumulation_steps": Key(
            1,
            rules.integer(1, 10**4),
            "Micro-batches into which a batch is divided, one after the other on the devices: one update sees the "
            "whole batch, but relations between images, batch normalization and memories see micro-batches.",
        ),
        "optimizer.ema_decay": Key(
            None,
            rules.optional(rules.FRACTION),
            "Decay of an exponential moving average of the parameters and batch statistics. The average, not the "
            "current weights, is then evaluated and saved for other runs; the same holds for a teacher that is trained "
            "here. None keeps no average.",
        ),
        "optimizer.momentum": Key(
            0.9, rules.FRACTION, "Momentum of sgd; mean of the two momenta of dot.", only_with=_SGD_OR_DOT
        ),
        "optimizer.delta": Key(
            0.075,
            rules.FRACTION,
            "With dot, how much the momentum of distillation is above optimizer.momentum, and that of supervision "
            "below it.",
            only_with=("optimizer.name", ("dot",)),
        ),
        "optimizer.nesterov": Key(False, rules.BOOL, "Whether the momentum of sgd is Nesterov's."),
        "optimizer.restart_momentum": Key(
            False,
            rules.BOOL,
            "Whether every epoch of sgd starts with zero momentum, as in the code released with the paper.",
            only_with=_SGD_OR_DOT,
        ),
        "optimizer.beta1": Key(0.9, rules.FRACTION, "Decay of the mean of the gradients of adamw.", only_with=_ADAMW),
        "optimizer.beta2": Key(
            0.999, rules.FRACTION, "Decay of the mean of the squared gradients of adamw.", only_with=_ADAMW
        ),
        "optimizer.epsilon": Key(
            1e-8, rules.POSITIVE, "Term of adamw that keeps its denominator from zero.", only_with=_ADAMW
        ),
        "first_phase.epochs": Key(
            0,
            rules.integer(0),
            "Epochs of a first phase of ab, fsp or ft, before `epochs`: the method trains alone, with weight 1 and its "
            "own optimizer; training then starts with a new one, and all other epochs count from there.",
        ),
        "first_phase.learning_rate": Key(
            None,
            rules.optional(rules.POSITIVE),
            "Learning rate of the first phase, which stays the same throughout; None takes optimizer.learning_rate.",
            only_with=("first_phase.epochs", None),
        ),
    }
)


def network_settings(section: Any) -> dict[str, Any]:
    """Returns {name: value} of the settings of a network that `config.teacher` or `config.student` sets."""
    return {name: section[name] for name in _NETWORK_SETTINGS if section[name] is not None}


def indifferent() -> frozenset[str]:
    """Returns the keys that do not change results, so that a run may be resumed with other values."""
    return frozenset(path for path, key in KEYS.items() if not key.changes_results)
