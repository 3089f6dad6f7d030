"""The loss and the training step in PyTorch, as a direct port of the equations with Python loops.

Samples are gathered by category in dictionaries of lists, centers are means of stacked lists, and cosines are computed
row by row, or by one matrix product where a caller asks for that. The networks and the objective are those of the
CIFAR-100 recipe (configs/cifar100.py).
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def group_by_category(samples: Tensor, labels: Tensor) -> dict[int, list[Tensor]]:
    """Returns {category: its samples}, in the order in which the categories first occur."""
    groups = {}
    for sample, label in zip(samples, labels.tolist(), strict=True):
        groups.setdefault(label, []).append(sample)
    return groups


def category_centers(samples: Tensor, labels: Tensor) -> dict[int, Tensor]:
    """Returns {category: mean of its samples}."""
    groups = group_by_category(samples, labels)
    return {category: torch.mean(torch.stack(members), dim=0) for category, members in groups.items()}


def deviations(samples: Tensor, labels: Tensor, correct: Tensor | None = None) -> Tensor:
    """Returns the samples minus the detached center of their category.

    Args:
      samples: Samples, float [B, D].
      labels: Labels, int [B].
      correct: Samples that make up the centers, bool [B]; None takes all. In a category without any, each sample is its
        own center.

    Returns:
      Deviations [B, D].
    """
    chosen = slice(None) if correct is None else correct
    centers = category_centers(samples.detach()[chosen], labels[chosen])
    own = [centers.get(label, sample) for sample, label in zip(samples.detach(), labels.tolist(), strict=True)]
    return samples - torch.stack(own)


def cosines_by_rows(centers: dict[int, Tensor]) -> Tensor:
    """Returns the cosine of each pair of centers, [K, K], computed one row at a time."""
    stacked = torch.stack(list(centers.values()))
    return torch.stack([functional.cosine_similarity(center[None], stacked, dim=1) for center in stacked])


def cosines_by_product(centers: dict[int, Tensor]) -> Tensor:
    """Returns the cosine of each pair of centers, [K, K], computed by one matrix product."""
    unit = functional.normalize(torch.stack(list(centers.values())), dim=1)
    return unit @ unit.T


Cosines = Callable[[dict[int, Tensor]], Tensor]


def paper_loss(
    student_features: Tensor, teacher_features: Tensor, labels: Tensor, cosines: Cosines = cosines_by_rows
) -> Tensor:
    """Computes the category-structure loss of the paper: Eq. 9, with beta = 0.01 and gamma = 0.2."""
    student, teacher = student_features.flatten(1), teacher_features.flatten(1)
    groups_s, groups_t = group_by_category(student, labels), group_by_category(teacher, labels)
    centers_s = {category: torch.mean(torch.stack(members), dim=0) for category, members in groups_s.items()}
    centers_t = {category: torch.mean(torch.stack(members), dim=0) for category, members in groups_t.items()}
    intra = 0.0
    for category in groups_s:
        structure_s = torch.stack(groups_s[category]) - centers_s[category]
        structure_t = torch.stack(groups_t[category]) - centers_t[category]
        intra = intra + torch.linalg.vector_norm(structure_t - structure_s)
    inter = torch.linalg.vector_norm(cosines(centers_t) - cosines(centers_s))
    return 0.01 * intra / len(groups_s) + 0.2 * inter


def reference_terms(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    filter_misclassified: bool = True,
    cosines: Cosines = cosines_by_rows,
) -> dict[str, Tensor]:
    """Computes the terms of the code that Chen et al. 2020 released (https://github.com/xeanzheng/CSKD).

    Args:
      student_features: Features of the student after sigma, float [B, ...].
      teacher_features: Features of the teacher in the same shape.
      labels: Labels, int [B].
      student_logits: Logits of the student, float [B, C]; with None, the terms on logits are left out.
      teacher_logits: Logits of the teacher, float [B, C], or None.
      filter_misclassified: Whether the centers of intra_feature are only of samples that each network classifies
        correctly.
      cosines: Function that computes the cosines of centers.

    Returns:
      Scalars by name; `category` is their weighted sum.
    """
    student, teacher = student_features.flatten(1), teacher_features.flatten(1)
    correct_s = correct_t = None
    if filter_misclassified:
        correct_s, correct_t = (logits.argmax(dim=1) == labels for logits in (student_logits, teacher_logits))
    structure_s, structure_t = deviations(student, labels, correct_s), deviations(teacher, labels, correct_t)
    terms = {
        "intra_feature": functional.mse_loss(structure_t, structure_s) / student.shape[1],
        "inter_feature": _inter_mse(student, teacher, labels, cosines),
    }
    intra, inter = terms["intra_feature"], terms["inter_feature"]
    if student_logits is not None:
        structure_s, structure_t = deviations(student_logits, labels), deviations(teacher_logits, labels)
        terms["intra_logits"] = functional.mse_loss(structure_t, structure_s) / student_logits.shape[1]
        terms["inter_logits"] = _inter_mse(student_logits, teacher_logits, labels, cosines)
        terms["compactness"] = torch.mean(structure_s**2)
        intra, inter = intra + terms["intra_logits"], inter + terms["inter_logits"]
    terms["intra"] = 0.002 * intra + 0.1 * terms.get("compactness", 0.0)
    terms["inter"] = 0.04 * inter
    return terms | {"category": terms["intra"] + terms["inter"]}


def _inter_mse(student, teacher, labels, cosines):
    centers_s, centers_t = category_centers(student, labels), category_centers(teacher, labels)
    return functional.mse_loss(cosines(centers_t), cosines(centers_s)) / len(centers_s)


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
    """

    def __init__(self, teacher: ResNet, student: ResNet, device: str = "cpu"):
        self.teacher, self.student = teacher.to(device).eval(), student.to(device).train()
        sigma = nn.Conv2d(student.num_features, teacher.num_features, 1, bias=False)
        nn.init.kaiming_normal_(sigma.weight, mode="fan_out", nonlinearity="relu")
        self.sigma = sigma.to(device)
        parameters = [*student.parameters(), *self.sigma.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Takes a step; returns the total loss, and the milliseconds of each part of the step."""
        clock = _Clock(images.device)
        with torch.no_grad():
            teacher_logits, teacher_features = self.teacher(images)
        clock.stop("teacher forward")
        student_logits, student_features = self.student(images)
        student_features = self.sigma(student_features)
        clock.stop("student forward")
        terms = reference_terms(student_features, teacher_features, labels, student_logits, teacher_logits)
        mse = functional.mse_loss(teacher_logits, student_logits)
        total = 0.9 * functional.cross_entropy(student_logits, labels) + terms["category"] + 0.1 * (1e-5 * mse)
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
