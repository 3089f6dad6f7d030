"""The networks and methods of the standard table in PyTorch, for images of 32x32 pixels: eager, without loops."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.torch_reference import Block, ConvBatchNorm, group_present, reference_terms


class Output(NamedTuple):
    """The logits [B, C] of a network, its stage maps [B, D, H, W], and the last of them pooled, [B, D]."""

    logits: Tensor
    maps: list[Tensor]
    embedding: Tensor


class _Stages(nn.Module):
    """A stem, stages, and a classifier; what follows the last stage is `last`."""

    def __init__(self, stem, stages, last, channels, num_classes):
        super().__init__()
        self.stem, self.stages, self.last = stem, nn.ModuleList(stages), last
        self.channels, self.classifier = channels, nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Output:
        """Maps images [B, 3, H, W] to the output."""
        maps, x = [], self.stem(images)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        embedding = self.last(x).mean(dim=(2, 3))
        return Output(self.classifier(embedding), maps, embedding)


def _make_stages(block, channels, widths, num_blocks):
    """Returns stages of `block(channels, width, stride)` with strides 1, 2, 2, each at the first block."""
    stages = []
    for number, width in enumerate(widths):
        rest = [block(width, width, 1) for _ in range(num_blocks - 1)]
        stages.append(nn.Sequential(block(channels, width, 2 if number else 1), *rest))
        channels = width
    return stages


def resnet(depth: int, widths: Sequence[int], num_classes: int = 100) -> _Stages:
    """Returns a ResNet of basic blocks: widths of the stem and of three stages."""
    stages = _make_stages(partial(Block, bottleneck=False), widths[0], widths[1:], (depth - 2) // 6)
    stem = nn.Sequential(ConvBatchNorm(3, widths[0]), nn.ReLU(inplace=True))
    return _Stages(stem, stages, nn.Identity(), widths[-1], num_classes)


class _WideBlock(nn.Module):
    """A block whose normalizations come before the convolutions."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels), nn.BatchNorm2d(width)])
        self.convs = nn.ModuleList(
            [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.Conv2d(width, width, 3, 1, 1, bias=False)]
        )
        self.shortcut = None if channels == width else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x [B, C, H, W] to [B, width, H', W']."""
        y = functional.relu(self.norms[0](x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = functional.relu(self.norms[1](self.convs[0](y)), inplace=True)
        return self.convs[1](y) + shortcut


def wide_resnet(depth: int, factor: int, num_classes: int = 100) -> _Stages:
    """Returns a wide ResNet with three stages of 16, 32 and 64 times `factor` channels."""
    widths = (16 * factor, 32 * factor, 64 * factor)
    stages = _make_stages(_WideBlock, 16, widths, (depth - 4) // 6)
    last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU(inplace=True))
    return _Stages(nn.Conv2d(3, 16, 3, 1, 1, bias=False), stages, last, widths[-1], num_classes)


NETWORKS = {
    "resnet56": lambda: resnet(56, (16, 16, 32, 64)),
    "resnet20": lambda: resnet(20, (16, 16, 32, 64)),
    "resnet8": lambda: resnet(8, (16, 16, 32, 64)),
    "resnet32x4": lambda: resnet(32, (32, 64, 128, 256)),
    "resnet8x4": lambda: resnet(8, (32, 64, 128, 256)),
    "wrn_40_2": lambda: wide_resnet(40, 2),
    "wrn_16_2": lambda: wide_resnet(16, 2),
}


def kd(student: Output, teacher: Output) -> Tensor:
    """Returns the divergence of softened probabilities, T = 4."""
    soft, target = functional.log_softmax(student.logits / 4, 1), functional.softmax(teacher.logits / 4, 1)
    return 16 * functional.kl_div(soft, target, reduction="batchmean")


def dkd(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """Returns the divergence of label against the rest, plus 8 times that among the rest, T = 4."""
    own = functional.one_hot(labels, student.logits.shape[1]).bool()

    def parts(logits):
        probabilities = functional.softmax(logits / 4, 1)
        label = (probabilities * own).sum(1)
        return torch.stack([label, 1 - label], 1), functional.log_softmax(logits / 4 - 1000.0 * own, 1)

    (binary_s, rest_s), (binary_t, rest_t) = parts(student.logits), parts(teacher.logits)
    target = functional.kl_div(binary_s.log(), binary_t, reduction="batchmean")
    return 16 * (target + 8 * functional.kl_div(rest_s, rest_t.exp(), reduction="batchmean"))


def at(student: Output, teacher: Output) -> Tensor:
    """Returns the squared difference of attention maps, summed over the stages."""

    def attention(x):
        return functional.normalize(x.square().mean(1).flatten(1))

    return sum((attention(s) - attention(t)).square().mean() for s, t in zip(student.maps, teacher.maps, strict=True))


def sp(student: Output, teacher: Output) -> Tensor:
    """Returns the squared difference of similarities between samples."""

    def similarity(x):
        x = x.flatten(1)
        return functional.normalize(x @ x.T)

    return (similarity(teacher.maps[-1]) - similarity(student.maps[-1])).square().mean()


def pkt(student: Output, teacher: Output) -> Tensor:
    """Returns the divergence of probabilities made of cosines between samples."""

    def probabilities(x):
        x = functional.normalize(x, eps=1e-7)
        x = (x @ x.T + 1) / 2
        return x / x.sum(1, keepdim=True)

    p, q = probabilities(teacher.embedding), probabilities(student.embedding)
    return (p * torch.log((p + 1e-7) / (q + 1e-7))).mean()


def rkd(student: Output, teacher: Output) -> Tensor:
    """Returns 25 times the difference of distances plus 50 times that of angles."""

    def distances(x):
        squares = x.square().sum(1)
        d = (squares[:, None] + squares - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(x)))
        return d / d[d > 0].mean()

    def angles(x):
        edges = functional.normalize(x[None] - x[:, None], dim=2)
        return edges @ edges.transpose(1, 2)

    s, t = student.embedding, teacher.embedding
    distance = functional.smooth_l1_loss(distances(s), distances(t))
    return 25 * distance + 50 * functional.smooth_l1_loss(angles(s), angles(t))


class Step:
    """One training step of a method: the teacher, the student, the loss beside cross-entropy, and SGD.

    Args:
      teacher: Name of the teacher.
      student: Name of the student.
      method: "ce", "cskd", "dkd", or a key of METHODS.
      batch_size: Number of random images.
    """

    def __init__(self, teacher: str, student: str, method: str, batch_size: int):
        torch.manual_seed(0)
        self._teacher = NETWORKS[teacher]().to(memory_format=torch.channels_last).eval()
        self._student = NETWORKS[student]().to(memory_format=torch.channels_last).train()
        self._method, parameters = method, list(self._student.parameters())
        if method == "cskd":
            self._sigma = nn.Conv2d(self._student.channels, self._teacher.channels, 1, bias=False)
            parameters += self._sigma.parameters()
        self._optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True)
        self._images = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
        self._labels = torch.randint(100, (batch_size,))

    def _compare(self, student, teacher):
        if self._method == "dkd":
            return dkd(student, teacher, self._labels)
        if self._method != "cskd":
            return METHODS[self._method](student, teacher)
        terms = reference_terms(
            self._sigma(student.maps[-1]), teacher.maps[-1], self._labels, group_present(self._labels),
            student.logits, teacher.logits,
        )  # fmt: skip
        return terms["category"]

    def __call__(self) -> None:
        """Takes a step."""
        student = self._student(self._images)
        loss = functional.cross_entropy(student.logits, self._labels)
        if self._method != "ce":
            with torch.no_grad():
                teacher = self._teacher(self._images)
            loss = loss + self._compare(student, teacher)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()


METHODS: dict[str, Callable[[Output, Output], Tensor]] = {"kd": kd, "at": at, "sp": sp, "pkt": pkt, "rkd": rkd}
