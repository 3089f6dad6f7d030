"""Trains a student of the standard table by cross-entropy and KD in plain PyTorch, to compare with `cskd-jax train`.

python benchmarks/torch_training.py --config=cifar100_standard:resnet56/resnet8/kd --teacher=FILE.pth --workdir=DIR
                                    [--teacher_mean=0.507,0.4865,0.4409] [--teacher_std=0.2673,0.2564,0.2761]
                                    [--config.KEY=VALUE ...]

The recipe is that of the command, and so are the images; of the methods, ce and kd are known here. Overrides may change
the keys in `_OVERRIDES`, and keys that do not change results. Everything else is PyTorch, eager and channels-last: the
ResNets of benchmarks/torch_pairs.py, the crops, the loss, and SGD. The same command resumes after the last complete
epoch. DIR/metrics.jsonl, with a row for every epoch, and DIR/results.json are written at the end.

  --teacher       state dict that torch.save wrote, of the network that the recipe names, with arrays in its order
  --workdir       folder of the run
  --teacher_mean, --teacher_std   normalization of the images that the teacher was trained on; that of the recipe by
                  default
"""

import hashlib
import io
import json
import math
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import torch_pairs
from cskd_jax.commands import command_line
from cskd_jax.commands.arguments import numbers
from cskd_jax.data import Split
from cskd_jax.errors import UserError
from cskd_jax.files import write_bytes, write_json, write_text
from cskd_jax.runs import keys, recipes, schema
from cskd_jax.runs.build import load_data

_EVALUATED_AT_ONCE = 500
_NETWORKS = tuple(name for name in torch_pairs.NETWORKS if name.startswith("resnet"))
_OVERRIDES = {
    "seed", "batch_size", "epochs", "dataset.train_examples", "dataset.mean", "dataset.std", "augment.crop_padding",
    "optimizer.learning_rate", "optimizer.momentum", "optimizer.nesterov",
    "optimizer.weight_decay", "optimizer.milestones", "optimizer.decay_factor", "losses.cross_entropy.weight",
    "losses.kd.weight",
}  # fmt: skip


class Images:
    """The images of a split as PyTorch takes them.

    Args:
      split: Split, with uint8 images [N, H, W, C] and labels [N].
      padding: Pixels of black around an image, before a crop of its size is taken at random.
    """

    def __init__(self, split: Split, padding: int = 0):
        self.images = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2).float() / 255
        self.labels, self._padding = torch.from_numpy(np.array(split.labels)).long(), padding

    def augmented(self, indices: Tensor) -> Tensor:
        """Returns random crops of some images, half of them mirrored."""
        count, (height, width) = len(indices), self.images.shape[2:]
        padded = functional.pad(self.images[indices], [self._padding] * 4)
        top, left = torch.randint(2 * self._padding + 1, (2, count, 1))
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
        crops = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return crops.permute(0, 3, 1, 2)


class Normalize(nn.Module):
    """Subtracts a mean and divides by a deviation, one for each channel."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))

    def forward(self, images: Tensor) -> Tensor:
        """Maps pixels in [0, 1], [B, C, H, W], to the inputs of a network."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def load_teacher(path: str, network: nn.Module) -> nn.Module:
    """Gives a network the arrays of a state dict that holds them in the same order, under any names."""
    given, own = torch.load(path, weights_only=True), network.state_dict()
    shapes = [getattr(array, "shape", None) for array in given.values()]
    if shapes != [array.shape for array in own.values()]:
        raise UserError(f"{path} does not hold the {len(own)} arrays of the teacher, and nothing else, in its order")
    network.load_state_dict(dict(zip(own, given.values(), strict=True)))
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, normalize: nn.Module, test: Images) -> float:
    """Returns the share of the images that a network in evaluation mode classifies correctly."""
    network.eval()
    batches = zip(test.images.split(_EVALUATED_AT_ONCE), test.labels.split(_EVALUATED_AT_ONCE), strict=True)
    right = sum((network(normalize(images)).logits.argmax(1) == labels).sum().item() for images, labels in batches)
    return right / len(test.labels)


class Training:
    """A training, epoch by epoch.

    Args:
      config: Configuration.
      train: Training images.
      teacher: The teacher and the normalization of its images.
    """

    def __init__(self, config: Any, train: Images, teacher: tuple[nn.Module, nn.Module]):
        torch.manual_seed(config.seed)
        self._config, self._train, (self._teacher, self._teacher_input) = config, train, teacher
        self.network = torch_pairs.NETWORKS[config.student.name]().to(memory_format=torch.channels_last)
        self.normalize = Normalize(config.dataset.mean, config.dataset.std)
        settings = config.optimizer
        self._optimizer = torch.optim.SGD(
            self.network.parameters(), settings.learning_rate, settings.momentum,
            weight_decay=settings.weight_decay, nesterov=settings.nesterov, fused=True,
        )  # fmt: skip
        self._schedule = torch.optim.lr_scheduler.MultiStepLR(
            self._optimizer, list(settings.milestones), settings.decay_factor
        )

    def epoch(self) -> float:
        """Trains for an epoch; returns the mean loss of its steps."""
        self.network.train()
        losses = [
            self._step(chosen) for chosen in torch.randperm(len(self._train.labels)).split(self._config.batch_size)
        ]
        self._schedule.step()
        return torch.stack(losses).mean().item()

    def _step(self, chosen):
        images, weights = self._train.augmented(chosen), self._config.losses
        student = self.network(self.normalize(images))
        loss = weights.cross_entropy.weight * functional.cross_entropy(student.logits, self._train.labels[chosen])
        if "kd" in weights:
            with torch.no_grad():
                teacher = self._teacher(self._teacher_input(images))
            loss = loss + weights.kd.weight * torch_pairs.kd(student, teacher)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """Returns everything that later epochs depend on."""
        parts = {name: getattr(self, name).state_dict() for name in ("network", "_optimizer", "_schedule")}
        return parts | {"random": torch.get_rng_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a state."""
        for name in ("network", "_optimizer", "_schedule"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])


def train(
    config: Any, teacher: tuple[nn.Module, nn.Module], workdir: pathlib.Path, identity: dict[str, Any]
) -> dict[str, Any]:
    """Trains in a folder, from its last complete epoch on; returns the results.

    Args:
      config: Configuration.
      teacher: The teacher and the normalization of its images.
      workdir: Folder of the run.
      identity: What a run must have in common with what the folder holds, to continue it.

    Raises:
      UserError: The folder holds another run, or a longer one.
    """
    dataset = load_data(config)
    test = Images(dataset.test)
    training = Training(config, Images(dataset.train, config.augment.crop_padding), teacher)
    saved, rows = workdir / "state.pt", []
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        rows = state.pop("rows")
        if state.pop("identity") != identity or len(rows) > config.epochs:
            raise UserError(f"{workdir} holds another run; use another --workdir")
        training.restore(state)
    for number in range(len(rows), config.epochs):
        start = time.perf_counter()
        loss = training.epoch()
        if not math.isfinite(loss):
            raise UserError(f"the loss of epoch {number + 1} is {loss}")
        trained = time.perf_counter()
        top1 = accuracy(training.network, training.normalize, test)
        row = {"epoch": number + 1, "loss": loss, "test_top1": top1, "train_seconds": trained - start}
        rows.append(row | {"evaluation_seconds": time.perf_counter() - trained})
        content = io.BytesIO()
        torch.save(training.state() | {"rows": rows, "identity": identity}, content)
        write_bytes(saved, content.getvalue())
        print(json.dumps(rows[-1]), flush=True)
    write_text(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    training_seconds = sum(row["train_seconds"] for row in rows)
    seconds = training_seconds + sum(row["evaluation_seconds"] for row in rows)
    scores = [row["test_top1"] for row in rows]
    return {
        "last": scores[-1], "best": max(scores), "teacher": accuracy(*teacher, test), "seconds": seconds,
        "images_per_second": len(dataset.train.labels) * len(rows) / training_seconds,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Trains, and writes and prints the results."""
    return command_line.run_program(_run, __doc__, argv)


def _load_config(recipe, overrides):
    """Returns the configuration; raises UserError if something of it is not known here."""
    config = recipes.load_recipe(recipe, overrides)
    schema.validate(config)
    base = schema.flatten(recipes.load_recipe(recipe, []))
    allowed = _OVERRIDES | keys.indifferent()
    changed = [key for key, value in schema.flatten(config).items() if value != base[key] and key not in allowed]
    if changed:
        raise UserError(f"{changed[0]} cannot be changed here; what can are {', '.join(sorted(_OVERRIDES))}")
    networks, losses = {config.teacher.name, config.student.name}, set(config.losses)
    if not networks <= {*_NETWORKS} or not {"cross_entropy"} <= losses <= {"cross_entropy", "kd"}:
        raise UserError(f"networks must be among {', '.join(_NETWORKS)}, and the method ce or kd")
    if "kd" in losses and (config.losses.kd.temperature != 4 or config.losses.kd.standardize):
        raise UserError("losses.kd.temperature must be 4, and losses.kd.standardize False")
    return config


def _run(argv):
    parser = command_line.Parser(takes_config=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--teacher_mean", type=numbers(float, -1e6, 1e6))
    parser.add_argument("--teacher_std", type=numbers(float, 1e-6, 1e6))
    values = parser.parse(argv)
    config = _load_config(parser.recipe(values), values.overrides)
    teacher = load_teacher(values.teacher, torch_pairs.NETWORKS[config.teacher.name]())
    network = teacher.to(memory_format=torch.channels_last)
    images = {"mean": values.teacher_mean, "std": values.teacher_std}
    images = {name: given or list(config.dataset[name]) for name, given in images.items()}
    digest = hashlib.sha256(pathlib.Path(values.teacher).read_bytes()).hexdigest()
    kept = {key: value for key, value in schema.plain(config).items() if key not in {"epochs", *keys.indifferent()}}
    identity = {"config": kept, "teacher": digest, "teacher_images": images}
    values.workdir.mkdir(parents=True, exist_ok=True)
    results = train(config, (network, Normalize(**images)), values.workdir, identity)
    described = {"epochs": config.epochs, "torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(values.workdir / "results.json", results | identity | described)
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
