"""Against PyTorch itself, where it is installed: what it saves is read, what is exported it loads strictly."""

import sys
import types

import jax
import numpy as np
import pytest

from cskd_jax.interop.names import from_torch, to_torch
from cskd_jax.interop.torch_file import read_state_dict
from cskd_jax.models import create_model

torch = pytest.importorskip("torch")
nn = torch.nn
WIDTHS = (4, 8, 16, 32)


class BasicBlock(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class SmallResNet18(nn.Module):
    """ResNet18 of width 1/16 for small images, named as in torchvision and the released code."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.maxpool = nn.MaxPool2d(3, 1, 1)
        before = (WIDTHS[0], *WIDTHS)
        for stage, width in enumerate(WIDTHS):
            blocks = BasicBlock(before[stage], width, 1 if stage == 0 else 2), BasicBlock(width, width, 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(WIDTHS[-1], 10)

    def forward(self, x):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    """A network that has seen batches, so that its running averages are not those of a new one."""
    torch.manual_seed(0)
    module = SmallResNet18()
    with torch.no_grad():
        for _ in range(3):
            module(2 * torch.randn(8, 3, 16, 16) + 1)
    return module.eval()


CONTENTS = {
    "state dict": lambda network: network.state_dict(),
    "checkpoint": lambda network: {
        "epoch": 3,
        "best": torch.tensor(0.5),
        "accuracy": np.float64(0.3),
        "net": nn.DataParallel(network).state_dict(),
        "optimizer": torch.optim.Adam(network.parameters()).state_dict(),
    },
    "network": lambda network: network,
    "network of DataParallel": nn.DataParallel,
}


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", CONTENTS)
def test_what_torch_saves_is_read(content, zipped, network, tmp_path, monkeypatch):
    # Its classes are of a module that is gone when the file is read.
    monkeypatch.setitem(sys.modules, "resnet", resnet := types.ModuleType("resnet"))
    for kind in (BasicBlock, SmallResNet18):
        monkeypatch.setattr(kind, "__module__", "resnet")
        setattr(resnet, kind.__name__, kind)
    path = tmp_path / "file.pth"
    torch.save(CONTENTS[content](network), path, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()
    read, expected = read_state_dict(path), network.state_dict()
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read[name], tensor.numpy(), err_msg=name)


def test_logits_agree_and_export_loads_strictly(network):
    module = create_model("resnet18", num_classes=10, width=0.0625)
    variables, *_ = from_torch(module, 3, {name: tensor.numpy() for name, tensor in network.state_dict().items()})
    images = np.random.default_rng(0).standard_normal((4, 16, 16, 3)).astype(np.float32)
    logits = jax.jit(lambda v, x: module.apply(v, x, train=False).logits)(variables, images)
    exported = SmallResNet18().eval()
    state_dict = to_torch(module, variables, batches=3)
    exported.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()}, strict=True)
    with torch.no_grad():
        expected, actual = (net(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy() for net in (network, exported))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
