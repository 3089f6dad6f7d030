"""The loss and the training step in PyTorch, as an expert would write them: without a loop over samples or categories.

The loss works on the categories that a batch has, or on all of them with shapes that `torch.compile` knows. The
networks and the objective are those of the CIFAR-100 recipe (configs/cifar100.py); the step keeps images channels-last,
and its SGD is fused.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Grouping(NamedTuple):
    """The categories of a batch.

    Attributes:
      index: Row of the category of each sample, int64 [B].
      counts: Number of samples of each category, float [K].
      membership: One-hot rows of the samples, float [B, K]; None to sum with `index_add`.
    """

    index: Tensor
    counts: Tensor
    membership: Tensor | None = None

    @property
    def size(self) -> int | Tensor:
        """Returns the number of categories that have samples."""
        return len(self.counts) if self.membership is None else torch.count_nonzero(self.counts)

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sums of values [B, D] by category, [K, D]."""
        if self.membership is not None:
            return self.membership.T @ values
        return values.new_zeros(len(self.counts), values.shape[1]).index_add(0, self.index, values)


def group_present(labels: Tensor) -> Grouping:
    """Returns the categories that the batch has, for eager execution: their number depends on the labels."""
    _, index, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    return Grouping(index, counts.float())


def group_all(labels: Tensor, num_classes: int) -> Grouping:
    """Returns all categories, with shapes that a compiler knows; one-hot products are what it does best."""
    membership = functional.one_hot(labels, num_classes).float()
    return Grouping(labels, membership.sum(dim=0), membership)


def category_centers(samples: Tensor, groups: Grouping) -> Tensor:
    """Returns the mean of the samples of each category, [K, D]; zeros for categories without any."""
    return groups.sum(samples) / groups.counts.clamp(min=1)[:, None]


def deviations(samples: Tensor, groups: Grouping, correct: Tensor | None = None) -> Tensor:
    """Returns the samples minus the detached center of their category.

    Args:
      samples: Samples, float [B, D].
      groups: Categories of the samples.
      correct: Samples that make up the centers, bool [B]; None takes all. In a category without any, each sample is its
        own center.

    Returns:
      Deviations [B, D].
    """
    fixed = samples.detach()
    if correct is None:
        return samples - category_centers(fixed, groups)[groups.index]
    chosen = correct.to(samples.dtype)[:, None]
    counts = groups.sum(chosen)
    centers = groups.sum(fixed * chosen) / counts.clamp(min=1)
    return samples - torch.where((counts > 0)[groups.index], centers[groups.index], fixed)


def _cosines(centers):
    unit = functional.normalize(centers, dim=1)
    return unit @ unit.T


def paper_loss(student_features: Tensor, teacher_features: Tensor, groups: Grouping) -> Tensor:
    """Computes the category-structure loss of the paper: Eq. 9, with beta = 0.01 and gamma = 0.2."""
    student, teacher = student_features.flatten(1), teacher_features.flatten(1)
    centers_s, centers_t = category_centers(student, groups), category_centers(teacher, groups)
    difference = (teacher - centers_t[groups.index]) - (student - centers_s[groups.index])
    squares = groups.sum(difference.square().sum(dim=1, keepdim=True))
    # The root has no gradient at 0, where a norm has the gradient 0.
    norms = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    inter = torch.linalg.vector_norm(_cosines(centers_t) - _cosines(centers_s))
    return 0.01 * norms.sum() / groups.size + 0.2 * inter


def reference_terms(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    groups: Grouping,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    filter_misclassified: bool = True,
) -> dict[str, Tensor]:
    """Computes the terms of the code that Chen et al. 2020 released (https://github.com/xeanzheng/CSKD).

    Args:
      student_features: Features of the student after sigma, float [B, ...].
      teacher_features: Features of the teacher in the same shape.
      labels: Labels, int64 [B].
      groups: Categories of the samples.
      student_logits: Logits of the student, float [B, C]; with None, the terms on logits are left out.
      teacher_logits: Logits of the teacher, float [B, C], or None.
      filter_misclassified: Whether the centers of intra_feature are only of samples that each network classifies
        correctly.

    Returns:
      Scalars by name; `category` is their weighted sum.
    """
    student, teacher = student_features.flatten(1), teacher_features.flatten(1)
    correct_s = correct_t = None
    if filter_misclassified:
        correct_s, correct_t = (logits.argmax(dim=1) == labels for logits in (student_logits, teacher_logits))
    structure_s, structure_t = deviations(student, groups, correct_s), deviations(teacher, groups, correct_t)
    terms = {
        "intra_feature": functional.mse_loss(structure_t, structure_s) / student.shape[1],
        "inter_feature": _inter_mse(student, teacher, groups),
    }
    intra, inter = terms["intra_feature"], terms["inter_feature"]
    if student_logits is not None:
        structure_s, structure_t = deviations(student_logits, groups), deviations(teacher_logits, groups)
        terms["intra_logits"] = functional.mse_loss(structure_t, structure_s) / student_logits.shape[1]
        terms["inter_logits"] = _inter_mse(student_logits, teacher_logits, groups)
        terms["compactness"] = torch.mean(structure_s**2)
        intra, inter = intra + terms["intra_logits"], inter + terms["inter_logits"]
    terms["intra"] = 0.002 * intra + 0.1 * terms.get("compactness", 0.0)
    terms["inter"] = 0.04 * inter
    return terms | {"category": terms["intra"] + terms["inter"]}


def _inter_mse(student, teacher, groups):
    centers_s, centers_t = category_centers(student, groups), category_centers(teacher, groups)
    # Categories without samples have centers of 0, whose cosines are 0.
    return (_cosines(centers_t) - _cosines(centers_s)).square().sum() / groups.size**3


class ConvBatchNorm(nn.Sequential):
    """A convolution without bias, followed by batch normalization."""

    def __init__(self, channels: int, features: int, kernel_size: int = 3, stride: int = 1):
        conv = nn.Conv2d(channels, features, kernel_size, stride, padding=kernel_size // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, nn.BatchNorm2d(features))


class Block(nn.Module):
    """A residual block: ConvBatchNorms with ReLU between them around an identity or projection shortcut."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        if bottleneck:
            features = 4 * width
            layers = [ConvBatchNorm(channels, width, 1), ConvBatchNorm(width, width, 3, stride)]
            layers.append(ConvBatchNorm(width, features, 1))
        else:
            features = width
            layers = [ConvBatchNorm(channels, width, 3, stride), ConvBatchNorm(width, width)]
        self.layers = nn.ModuleList(layers)
        same = stride == 1 and channels == features
        self.downsample = nn.Identity() if same else ConvBatchNorm(channels, features, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, C, H, W] to [B, features, H', W']."""
        y = x
        for layer in self.layers[:-1]:
            y = functional.relu(layer(y), inplace=True)
        return functional.relu(self.layers[-1](y) + self.downsample(x), inplace=True)


class ResNet(nn.Module):
    """Residual network for small images: 3x3 stem, 3x3 max-pool with stride 1, four stages with strides 1, 2, 2, 2.

    Args:
      num_classes: Number of classes.
      stage_sizes: Numbers of blocks of the stages.
      bottleneck: Whether blocks have three convolutions (ResNet-50 and deeper) instead of two.
      width: Factor on the channels.
    """

    def __init__(self, num_classes: int, stage_sizes: Sequence[int], bottleneck: bool, width: float):
        super().__init__()
        widths = [round(width * channels) for channels in (64, 128, 256, 512)]
        channels = widths[0]
        self.stem = ConvBatchNorm(3, channels)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.stages = nn.ModuleList()
        for stage, (num_blocks, stage_width) in enumerate(zip(stage_sizes, widths, strict=True)):
            blocks = []
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(channels, stage_width, stride, bottleneck))
                channels = stage_width * (4 if bottleneck else 1)
            self.stages.append(nn.Sequential(*blocks))
        self.num_features = channels
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps images [B, 3, H, W] to logits [B, num_classes] and the last feature map [B, D, H', W']."""
        x = self.pool(functional.relu(self.stem(images), inplace=True))
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.mean(dim=(2, 3))), x


class Step:
    """One training step: frozen teacher, trained student and sigma, variant `reference`, SGD.

    Args:
      teacher: Teacher, which is put in evaluation mode.
      student: Student, which is put in training mode.
      device: Device that both are moved to.
      compiled: Whether networks and loss are compiled by `torch.compile`.
    """

    def __init__(self, teacher: ResNet, student: ResNet, device: str = "cpu", compiled: bool = False):
        layout = {"device": torch.device(device), "memory_format": torch.channels_last}
        self.teacher, self.student = teacher.to(**layout).eval(), student.to(**layout).train()
        sigma = nn.Conv2d(student.num_features, teacher.num_features, 1, bias=False)
        nn.init.kaiming_normal_(sigma.weight, mode="fan_out", nonlinearity="relu")
        self.sigma = sigma.to(**layout)
        parameters = [*student.parameters(), *self.sigma.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
        compile_ = torch.compile if compiled else (lambda function: function)
        self._teach, self._study, self._compare = (
            compile_(function) for function in (self.teacher, self._forward, self._loss)
        )
        self._num_classes = student.classifier.out_features if compiled else None

    def _forward(self, images):
        logits, features = self.student(images)
        return logits, self.sigma(features)

    def _loss(self, student, teacher, labels, groups):
        terms = reference_terms(student[1], teacher[1], labels, groups, student[0], teacher[0])
        mse = functional.mse_loss(teacher[0], student[0])
        return 0.9 * functional.cross_entropy(student[0], labels) + terms["category"] + 0.1 * (1e-5 * mse)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Takes a step; returns the total loss, and the milliseconds of each part of the step."""
        clock = _Clock(images.device)
        with torch.no_grad():
            teacher = self._teach(images)
        clock.stop("teacher forward")
        student = self._study(images)
        clock.stop("student forward")
        groups = group_present(labels) if self._num_classes is None else group_all(labels, self._num_classes)
        total = self._compare(student, teacher, labels, groups)
        clock.stop("loss")
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        clock.stop("backward and update")
        return total.detach(), clock.parts


class _Clock:
    """A clock of the milliseconds of consecutive parts."""

    def __init__(self, device):
        self.parts, self._device = {}, device
        self._start = self._now()

    def _now(self):
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return 1e3 * time.perf_counter()

    def stop(self, name):
        now = self._now()
        self.parts[name] = now - self._start
        self._start = now


def pick_device(platform: str) -> str:
    """Returns the PyTorch device to compare with a JAX platform."""
    return "cuda" if platform == "gpu" and torch.cuda.is_available() else "cpu"


def synchronize(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
