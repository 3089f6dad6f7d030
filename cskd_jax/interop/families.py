"""The names that the networks of each family have in PyTorch.

A rule turns the path of a module of this package into the names that its layer (convolution or linear) and its
normalization have in a PyTorch state dict. ResNets are named as in torchvision and in the code of Chen et al. 2020
(https://github.com/xeanzheng/CSKD), which adds `branch1` to `branch4`; Inception is named as in torchvision; the others
are named as in the code of Tian et al. 2020 for CIFAR (https://github.com/HobbitLong/RepDistiller), and Vision
Transformers as in timm. Where a network is also known by other names, a family specifies how to convert those into
these.
"""

from collections.abc import Callable
from typing import NamedTuple

from flax import linen as nn

from cskd_jax.models.inception import InceptionV3
from cskd_jax.models.mobilenet import MobileNetV2
from cskd_jax.models.resnet import PaddedBlock, ResNet
from cskd_jax.models.shufflenet import ShuffleNet
from cskd_jax.models.vgg import VGG
from cskd_jax.models.vision_transformer import VisionTransformer
from cskd_jax.models.wide_resnet import WideResNet

# The names of a module's layer and of its normalization.
_Pair = tuple[str, str]


class Family(NamedTuple):
    """The names that the networks of a class have in PyTorch.

    Attributes:
      rules: {regular expression of a module's path: function from its groups, numbers as int, to the pair of names}.
      unused: Regular expression of additional names that a file may hold and that this package's network does not use.
      aliases: Pairs (regular expression, replacement) that turn other names of the same network into these.
    """

    rules: dict[str, Callable[..., _Pair]]
    unused: str = r"(?!)"
    aliases: tuple[tuple[str, str], ...] = ()


def _same(name):
    return lambda: (name, name)


def _numbered(stage, block, number):
    """Returns the names of layer `number` of a block in the networks that call their stages layers."""
    return f"layer{stage}.{block - 1}.conv{number}", f"layer{stage}.{block - 1}.bn{number}"


def _shortcut(word):
    def names(stage, block):
        return f"layer{stage}.{block - 1}.{word}.0", f"layer{stage}.{block - 1}.{word}.1"

    return names


def _shuffle_layer(stage, block, layer):
    return _numbered(stage, block, ("conv1", "depthwise", "conv2").index(layer) + 1)


def _two_sided_shuffle_layer(stage, layer):
    """Returns the names in the first block of a stage of version 2; the layers of the left branch are counted first."""
    return _numbered(stage, 1, ("left_depthwise", "left_conv", "conv1", "depthwise", "conv2").index(layer) + 1)


def _wide_layer(suffix):
    def names(stage, block):
        name = f"block{stage}.layer.{block - 1}.{suffix}"
        return name, name

    return names


def _vgg_layer(stage, number):
    return f"block{stage}.{3 * (number - 1)}", f"block{stage}.{3 * (number - 1) + 1}"


# {stage: (index of its first group, number of blocks in that group)}. A group is a row of the paper's table; the other
# blocks of the stage are in the next group.
_MOBILE_GROUPS = {1: (0, 1), 2: (2, 3), 3: (3, 4), 4: (5, 3)}


def _mobile_layer(stage, block, layer):
    group, size = _MOBILE_GROUPS[stage]
    block -= 1
    if block >= size:
        group, block = group + 1, block - size
    index = {"expand": 0, "depthwise": 3, "project": 6}[layer]
    return f"blocks.{group}.{block}.conv.{index}", f"blocks.{group}.{block}.conv.{index + 1}"


# {BRANCH_LAYER of this package: name in the block}; a pool, which has no name, is counted as a layer of its branch.
_DOUBLE_3X3 = {f"3_{number}": f"branch3x3dbl_{number}" for number in (1, 2, 3)}
_MIXED_5 = {"1_1": "branch1x1", "2_1": "branch5x5_1", "2_2": "branch5x5_2", **_DOUBLE_3X3, "4_2": "branch_pool"}
_MIXED_6 = {
    "1_1": "branch1x1",
    **{f"2_{number}": f"branch7x7_{number}" for number in (1, 2, 3)},
    **{f"3_{number}": f"branch7x7dbl_{number}" for number in (1, 2, 3, 4, 5)},
    "4_2": "branch_pool",
}
_MIXED_7 = {
    "1_1": "branch1x1",
    "2_1": "branch3x3_1",
    "2_2_row": "branch3x3_2a",
    "2_2_column": "branch3x3_2b",
    "3_1": "branch3x3dbl_1",
    "3_2": "branch3x3dbl_2",
    "3_3_row": "branch3x3dbl_3a",
    "3_3_column": "branch3x3dbl_3b",
    "4_2": "branch_pool",
}
# {(stage, block): (prefix of the block, names in it)}
_INCEPTION_BLOCKS = {
    (1, 1): ("", {"1_1": "Conv2d_1a_3x3", "1_2": "Conv2d_2a_3x3", "1_3": "Conv2d_2b_3x3"}),
    (2, 1): ("", {"1_2": "Conv2d_3b_1x1", "1_3": "Conv2d_4a_3x3"}),
    **{(2, block): (f"Mixed_5{letter}.", _MIXED_5) for block, letter in ((2, "b"), (3, "c"), (4, "d"))},
    (3, 1): (
        "Mixed_6a.",
        {"1_1": "branch3x3", **{f"2_{number}": f"branch3x3dbl_{number}" for number in (1, 2, 3)}},
    ),
    **{(3, block): (f"Mixed_6{letter}.", _MIXED_6) for block, letter in ((2, "b"), (3, "c"), (4, "d"), (5, "e"))},
    (4, 1): (
        "Mixed_7a.",
        {
            **{f"1_{number}": f"branch3x3_{number}" for number in (1, 2)},
            **{f"2_{number}": f"branch7x7x3_{number}" for number in (1, 2, 3, 4)},
        },
    ),
    **{(4, block): (f"Mixed_7{letter}.", _MIXED_7) for block, letter in ((2, "b"), (3, "c"))},
}


def _inception_layer(stage, block, branch, layer):
    prefix, names = _INCEPTION_BLOCKS[stage, block]
    name = prefix + names[f"{branch}_{layer}"]
    return f"{name}.conv", f"{name}.bn"


def _transformer_layer(block, path):
    name = f"blocks.{block - 1}.{path.replace('/', '.')}"
    return name, name


_STEM = {"stem": lambda: ("conv1", "bn1")}
_BLOCK = r"stage(\d+)_block(\d+)"

_SHUFFLE = {**_STEM, "classifier": _same("linear")}


def _resnet(shortcut, head, **others):
    rules = {**_STEM, rf"{_BLOCK}/conv(\d+)": _numbered, rf"{_BLOCK}/downsample": _shortcut(shortcut)}
    return Family({**rules, "": _same("branch4"), "classifier": _same(head)}, **others)


# The weights of Chen et al. in addition to those of the network.
_BRANCHES = r"branch\d+\.weight"
# Only networks without a max-pool, which leaves no trace in a file, are known by both sets of names.
_TO_FC = ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc."))
_FROM_DINOV2 = ((r"^register_tokens$", "reg_token"), (r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."))
_TO_LINEAR = ((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear."))

# {(class of the network, its variant): names}; a parameter of the network itself has the path "".
FAMILIES = {
    (ResNet, "max-pool"): _resnet("downsample", "fc", unused=_BRANCHES),
    (ResNet, "three stages"): _resnet("downsample", "fc", unused=_BRANCHES, aliases=_TO_FC),
    (ResNet, "linear"): _resnet("shortcut", "linear", aliases=_TO_LINEAR),
    (WideResNet, None): Family(
        {
            **_STEM,
            rf"{_BLOCK}_norm": _wide_layer("bn1"),
            rf"{_BLOCK}_conv1": lambda stage, block: (
                f"block{stage}.layer.{block - 1}.conv1",
                f"block{stage}.layer.{block - 1}.bn2",
            ),
            rf"{_BLOCK}_conv2": _wide_layer("conv2"),
            rf"{_BLOCK}_shortcut": _wide_layer("convShortcut"),
            "norm": _same("bn1"),
            "classifier": _same("fc"),
        },
        aliases=((r"^layer(\d+)\.layer\.", r"block\1.layer."), (r"^linear\.", "fc.")),
    ),
    (VGG, None): Family(
        {
            r"stem_conv(\d+)": lambda number: _vgg_layer(0, number),
            r"stage(\d+)_conv(\d+)": _vgg_layer,
            "classifier": _same("classifier"),
        }
    ),
    (MobileNetV2, None): Family(
        {
            "stem": lambda: ("conv1.0", "conv1.1"),
            rf"{_BLOCK}/(\w+)": _mobile_layer,
            "head": lambda: ("conv2.0", "conv2.1"),
            "classifier": _same("classifier.0"),
        }
    ),
    (ShuffleNet, 1): Family({**_SHUFFLE, rf"{_BLOCK}/(\w+)": _shuffle_layer}),
    (ShuffleNet, 2): Family(
        {
            **_SHUFFLE,
            r"stage(\d+)_block1/(\w+)": _two_sided_shuffle_layer,
            rf"{_BLOCK}/(\w+)": _shuffle_layer,
            "head": lambda: ("conv2", "bn2"),
        }
    ),
    (InceptionV3, None): Family(
        {rf"{_BLOCK}/branch(\d+)_conv(\w+)": _inception_layer, "classifier": _same("fc")},
        unused=r"AuxLogits\..*",
    ),
    (VisionTransformer, None): Family(
        {
            "patch_embed": _same("patch_embed.proj"),
            r"block(\d+)/(.+)": _transformer_layer,
            **{name: _same(name) for name in ("norm_pre", "norm", "fc_norm")},
            "classifier": _same("head"),
            "distillation_classifier": _same("head_dist"),
        },
        unused="mask_token",  # DINOv2 puts it in place of masked patches, only in its own training.
        aliases=_FROM_DINOV2,
    ),
}


def family_of(module: nn.Module) -> Family:
    """Returns the names of the family that a network belongs to."""
    variant = _resnet_variant(module) if isinstance(module, ResNet) else getattr(module, "version", None)
    return FAMILIES[type(module), variant]


def _resnet_variant(module):
    if module.pool_stride is not None:
        return "max-pool"
    others = module.block is PaddedBlock or not module.relu_between_blocks or len(module.stage_sizes) == 4
    return "linear" if others else "three stages"
