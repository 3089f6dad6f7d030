"""Tiny ImageNet with the pairs and the protocol of mdistiller (Zhao et al. 2022 and 2023).

`--config=tiny_imagenet_standard:resnet18/shufflenet_v2/kd` is one cell: 200 epochs, batches of 256, images rotated by
up to 20 degrees and mirrored. With `--config.optimizer.name=dot` it is the cell of DOT. Every number is in
tiny_imagenet_standard.json with its source, and `cskd-jax config show` prints both. Only kd, alone and with DOT, was
published; other methods keep their weights from configs/methods.py. The `mobilenet_v2` of mdistiller differs from the
one here in its first convolution, which is 1x1 with a padding of 1.
"""

import json
import pathlib

from cskd_jax.configs import benchmark

_TABLE = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def get_config(word="cskd"):
    """Returns what differs from the defaults of docs/configuration.md."""
    return benchmark.config_of(_TABLE, word)


def get_sources(word="cskd"):
    """Returns {key: where its value was published}."""
    return benchmark.sources_of(_TABLE, word)
