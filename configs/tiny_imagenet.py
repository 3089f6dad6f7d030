"""Tiny ImageNet, teacher ResNet152, student ResNet18 (width 0.25): Chen et al. 2020, tables 3 and 4.

`--config=tiny_imagenet` is category-structure distillation as in the code released with the paper
(https://github.com/xeanzheng/CSKD), and `:cskd_paper` is the variant in the paper; `:METHOD` picks another method
(configs/methods.py). The released code has no settings for this data set: the paper's settings are used for all
methods.
"""

from ml_collections import ConfigDict

from cskd_jax.configs import methods, networks


def get_config(word="cskd"):
    """Returns what differs from the defaults of docs/configuration.md."""
    teacher, student, method = networks.split_word(word, ("resnet152", 1.0), ("resnet18", 0.25))
    config = ConfigDict()
    config.method = method
    config.batch_size = 200  # One for each class.
    config.dataset = ConfigDict(
        {"name": "tiny_imagenet", "mean": (0.4802, 0.4481, 0.3975), "std": (0.2770, 0.2691, 0.2821)}
    )
    config.augment = ConfigDict({"resize": 72, "flip": True})
    config.teacher = ConfigDict({"name": teacher[0], "width": teacher[1]})
    config.student = ConfigDict({"name": student[0], "width": student[1]})
    config.losses = methods.losses(method)
    config.first_phase = methods.first_phase(method)
    config.optimizer = ConfigDict({"weight_decay": 5e-4, "milestones": (50, 100, 150)})
    return config
