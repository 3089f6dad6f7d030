"""What the messages advise when a run does not fit its data: it is tried, up to where the training would begin."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from PIL import Image

import cskd_jax
from cskd_jax.__main__ import main
from cskd_jax.errors import UserError
from cskd_jax.runs import run
from cskd_jax.training.trainer import Trainer

SMALL = "digits:ce --config.student.name=resnet8 --config.student.width=0.25"
DIGITS = f"{SMALL} --config.dataset.train_examples=160"
LAST = f"{SMALL} --config.drop_last=true"
FOLDER = f"{SMALL} --config.dataset.name=image_folder --config.dataset.path={{folder}} --config.batch_size=8 "
FOLDER += "--config.dataset.mean=(0.5,) --config.dataset.std=(0.5,)"
TAUGHT = "{recipe} --config.student.name=resnet8 --config.student.width=0.25 --config.teacher.name=resnet8"
TAUGHT += " --config.teacher.width=0.25 --config.dataset.train_examples=160"
TRANSFORMER = "--config.student.name=deit_tiny --config.student.width=0.25 --config.student.depth=1"


def _taught(method):
    return TAUGHT.format(recipe=f"digits:{method}")


# What is asked for; a part of the message; and what it advises, each in the place of the same keys or added.
ADVICE = [
    (f"{DIGITS} --config.dataset.train_examples=129", "set drop_last=True, or another batch_size", ["drop_last=true"]),
    (
        f"{DIGITS} --config.dataset.train_examples=148 --config.batch_size=16",
        "the last batch of an epoch (drop_last=True leaves it out) is 4, which",
        ["drop_last=true"],
    ),
    (
        f"{DIGITS} --config.batch_size=16 --config.optimizer.accumulation_steps=16",
        "micro-batch (batch_size 16 / accumulation_steps 16) is 1, which does not split evenly",
        ["optimizer.accumulation_steps=2"],
    ),
    (f"{DIGITS} --config.dataset.path=/x", "leave it out", []),
    (f"{LAST} --config.dataset.train_examples=5", "it must be from 10 to 1398", ["dataset.train_examples=1398"]),
    (f"{LAST} --config.dataset.train_examples=1400", "at most 1398 are possible", ["dataset.train_examples=1398"]),
    (
        f"{DIGITS} --config.dataset.image_size=12 --config.augment.resize=8",
        "it must be 0 or at least 12, since it does not follow dataset.image_size",
        ["augment.resize=0", "augment.resize=12"],
    ),
    (
        f"{FOLDER} --config.dataset.image_size=1536 --config.augment.crop_area=0.5",
        "augment.crop_area is 0.5, but it takes images of at most 2,097,152 pixels, and these would have 1536x1536",
        ["augment.crop_area=1", "dataset.image_size=8"],
    ),
    (f"{DIGITS} --config.optimizer.warmup_epochs=30", "must be less than epochs, 30", ["optimizer.warmup_epochs=29"]),
    (f"{DIGITS} --config.dataset.mean=(0.1,0.2) --config.dataset.std=(1,1)", "one value for all channels", []),
    (FOLDER, "set dataset.image_size", ["dataset.image_size=8"]),
    (
        f"{DIGITS} --config.optimizer.name=adamw --config.optimizer.nesterov=true",
        "nesterov is True, but it applies only to sgd",
        ["optimizer.name=sgd", "optimizer.nesterov=false"],
    ),
    (
        f"{_taught('fsp')} --config.optimizer.name=dot --config.optimizer.restart_momentum=false",
        "has no first phase: set first_phase.epochs to 0",
        ["first_phase.epochs=0"],
    ),
    (
        f"{_taught('kd')} --config.losses.kd.teacher=average",
        "set optimizer.ema_decay, for example to 0.99",
        ["optimizer.ema_decay=0.99"],
    ),
    (f"{_taught('kd')} --config.losses.kd.teacher=1", "numbered from 0 to 0", ["losses.kd.teacher=0"]),
    (
        f"{_taught('dkd')} --config.augment.mixup=0.2",
        "losses.dkd reads only one: leave it out, or set both to 0; cross_entropy, dml, and losses that read",
        ["augment.mixup=0"],
    ),
    (
        f"{_taught('deit')}",
        "use a Vision Transformer with distillation_token=True",
        ["student.name=deit_tiny student.width=0.25 student.patch_size=4 student.distillation_token=true"],
    ),
    (f"{DIGITS} {TRANSFORMER}", "set patch_size to a divisor of their sides", ["student.patch_size=4"]),
    (
        f"{_taught('kd')} --config.teacher.image_sizes=(32,)",
        "applies only to given teachers",
        ["teacher.image_sizes=()"],
    ),
    (
        f"{DIGITS} --config.sampler.name=balanced --config.sampler.samples_per_category=3",
        "not divisible by sampler.samples_per_category 3",
        ["sampler.samples_per_category=8"],
    ),
    (
        f"{_taught('cskd')} --config.losses.category_structure.center_momentum=0.9",
        "center_momentum needs filter_misclassified=False",
        ["losses.category_structure.filter_misclassified=false"],
    ),
]


@pytest.fixture
def command(tmp_path, digits_dir, monkeypatch, capsys):
    """Runs a command up to where the training would begin; returns its code, its error, and whether it got there."""
    begun = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_train", lambda started, stop, start: begun.extend(started.runs))

    def call(words):
        begun.clear()
        code = main(["cskd-jax", "train", *words, f"--config.dataset.data_dir={digits_dir}", "--workdir=run"])
        return code, capsys.readouterr().err, bool(begun)

    return call


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "message", "advised"), ADVICE, ids=[message for _, message, _ in ADVICE])
def test_advice(asked, message, advised, command, tmp_path):
    for number, name in enumerate(
        f"{split}/{label}/{n}" for split in ("train", "test") for label in "ab" for n in "1234"
    ):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number % 2, 8)).save(path)
    words = asked.format(folder=tmp_path / "images").split()
    code, error, begun = command(words)
    assert (code, begun) == (2, False)
    assert message in error
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing"
    for changes in map(str.split, advised):
        keys = tuple(f"--config.{change.partition('=')[0]}=" for change in changes)
        rest = [word for word in words if not word.startswith(keys)]
        code, error, begun = command([*rest, *(f"--config.{change}" for change in changes)])
        assert (code, begun) == (0, True), error


class _Net(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(3)(images.reshape(len(images), -1))


def _arrays(count):
    return np.zeros((count, 4, 4, 1), np.uint8), np.arange(count) % 3


def _linear(variables, images, train, rngs):
    return images.reshape(len(images), -1) @ variables["params"]["kernel"], {}


_TAUGHT = {"teacher": _Net(), "teacher_variables": _Net().init(jax.random.key(0), np.zeros((1, 4, 4, 1)), False)}
# Settings of `distill` that are refused, the message, and those that it advises.
SETTINGS = [
    (
        {"train": _arrays(16), "batch_size": 1, "drop_last": True},
        "batch_size is 1; it must be at least 2",
        [{"batch_size": 2}],
    ),
    (
        {"train": _arrays(17), "batch_size": 8, "accumulation_steps": 2},
        "holds one image, .*set drop_last=True, or another batch_size",
        [{"drop_last": True}, {"batch_size": 6}],
    ),
    (
        {"train": _arrays(13), "batch_size": 8, "accumulation_steps": 2},
        "the last micro-batch .*set drop_last=True, or accumulation_steps=1",
        [{"drop_last": True}, {"accumulation_steps": 1}],
    ),
    (
        {"train": _arrays(16), "batch_size": 8, "accumulation_steps": 8},
        "smaller accumulation_steps",
        [{"accumulation_steps": 4}],
    ),
    (
        {"train": lambda epoch: [_arrays(8), _arrays(1)]},
        "one image, .*have train leave it out, or add images to it",
        [{"train": lambda epoch: [_arrays(8)]}, {"train": lambda epoch: [_arrays(8), _arrays(2)]}],
    ),
    ({"train": iter([])}, "give arrays, or a function from", [{"train": _arrays(16), "batch_size": 8}]),
    (
        {"train": _arrays(16), "batch_size": 8, "mix": cskd_jax.Mix(mixup=0.2), "losses": {"dkd": 1.0}} | _TAUGHT,
        "losses.dkd reads only one: leave it out, or set both to 0",
        [{"losses": {"kd": 1.0}}, {"mix": cskd_jax.Mix(mixup=0, cutmix=0)}],
    ),
    (
        {"train": _arrays(16), "batch_size": 8, "losses": {"kd": {"teacher": "average"}}} | _TAUGHT,
        "give the student an ema, such as 0.99",
        [{"ema": 0.99}],
    ),
    (
        {"train": _arrays(16), "batch_size": 8, "student": lambda variables, images, train, rngs: (images, {})},
        "give it student_variables to start from",
        [{"student": _linear, "student_variables": {"params": {"kernel": np.zeros((16, 3), np.float32)}}}],
    ),
    (
        {"train": _arrays(16), "batch_size": 8, "losses": None},
        r"losses=\{'kd': 0.9\}",
        [{"losses": {"cross_entropy": 1.0}}],
    ),
]


@pytest.mark.parametrize(("settings", "message", "advised"), SETTINGS, ids=[message for _, message, _ in SETTINGS])
def test_advice_of_distill(settings, message, advised, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda trainer, stop: {"student": "begun"})
    rest = {"test": _arrays(6), "epochs": 1, "callbacks": (), "devices": 1, "optimizer": optax.sgd(0.1)}
    rest |= {"student": _Net(), "losses": {"cross_entropy": 1.0}}
    with pytest.raises(UserError, match=message):
        cskd_jax.distill(**rest | settings)
    for change in advised:
        assert cskd_jax.distill(**rest | settings | change) == "begun"


def test_folders_of_students_are_no_links(tmp_path):
    """A folder from elsewhere may hold links to files of the user, which checkpoints would replace."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "small").symlink_to(tmp_path / "outside")
    students = {"small": cskd_jax.Student(_Net(), {"cross_entropy": 1.0}, optax.sgd(0.1))}
    with pytest.raises(UserError, match="small is a symbolic link"):
        cskd_jax.distill(
            train=_arrays(8), test=_arrays(4), students=students, epochs=1, batch_size=4, workdir=tmp_path / "run"
        )
