"""CIFAR-10, teacher ResNet101 (width 0.5), student ResNet18 (width 0.25): Chen et al. 2020, table 1, first row.

`--config=cifar10` is category-structure distillation as in the code released with the paper
(https://github.com/xeanzheng/CSKD); `:METHOD` picks another method (configs/methods.py) with the same optimizer. Only
`:cskd_paper` has the optimizer of the paper, which lowers the learning rate once more and keeps the momentum from epoch
to epoch.
"""

from ml_collections import ConfigDict

from cskd_jax.configs import methods, networks


def get_config(word="cskd"):
    """Returns what differs from the defaults of docs/configuration.md."""
    teacher, student, method = networks.split_word(word, ("resnet101", 0.5), ("resnet18", 0.25))
    released = method != "cskd_paper"
    config = ConfigDict()
    config.method = method
    config.dataset = ConfigDict({"name": "cifar10", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)})
    config.augment = ConfigDict({"crop_padding": 4, "flip": True})
    config.teacher = ConfigDict({"name": teacher[0], "width": teacher[1]})
    config.student = ConfigDict({"name": student[0], "width": student[1]})
    config.losses = methods.losses(method)
    config.first_phase = methods.first_phase(method)
    config.optimizer = ConfigDict(
        {"milestones": (80, 120) if released else (80, 120, 160), "restart_momentum": released}
    )
    return config
