"""CIFAR-100, teacher ResNet101 (width 0.5), student ResNet18 (width 0.25): Chen et al. 2020, table 2, first row.

`--config=cifar100` is category-structure distillation as in the code released with the paper
(https://github.com/xeanzheng/CSKD); `:METHOD` picks another method (configs/methods.py) with the same optimizer. Only
`:cskd_paper` has the optimizer of the paper, which lowers the learning rate once more and keeps the momentum from epoch
to epoch.
"""

from cskd_jax.configs import cifar10


def get_config(word="cskd"):
    """Returns what differs from the defaults of docs/configuration.md: the recipe of CIFAR-10 on other images."""
    config = cifar10.get_config(word)
    config.dataset.name = "cifar100"
    return config
