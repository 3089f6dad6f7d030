"""The standard benchmark: CIFAR-100 with the pairs and the protocol of CRD's reference code (Tian et al. 2020).

`--config=cifar100_standard:resnet56/resnet20/kd` is one cell of the table that distillation papers use for comparison:
240 epochs, batches of 64, and the weights with which each method was published, specific to the pair where they depend
on it. Every number is in cifar100_standard.json with its source, and `cskd-jax config show` prints both. The networks
are those of https://github.com/HobbitLong/RepDistiller, where `mobilenet_v2` is half as wide and `resnet50` has no
max-pool; any two of them may form a pair.
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
