"""CUB-200-2011, teacher ResNet50, student ResNet18 (width 0.5): the supplement of Chen et al. 2020.

`--config=cub200` is category-structure distillation as in the code released with the paper
(https://github.com/xeanzheng/CSKD), and `:cskd_paper` is the variant in the paper; `:METHOD` picks another method
(configs/methods.py). No settings for this data set have been published: the optimizer settings are the paper's for Tiny
ImageNet, which has as many classes.
"""

from ml_collections import ConfigDict

from cskd_jax.configs import methods, networks


def get_config(word="cskd"):
    """Returns what differs from the defaults of docs/configuration.md."""
    teacher, student, method = networks.split_word(
        word, ("resnet50_224", 1.0), ("resnet18_224", 0.5), small_images=False
    )
    config = ConfigDict()
    config.method = method
    config.batch_size = 200  # One for each class.
    config.log_every = 10
    # Mean and standard deviation of ImageNet.
    config.dataset = ConfigDict({"name": "cub200", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)})
    config.augment = ConfigDict({"resize": 256, "flip": True})
    config.teacher = ConfigDict({"name": teacher[0], "width": teacher[1]})
    config.student = ConfigDict({"name": student[0], "width": student[1]})
    config.losses = methods.losses(method)
    config.first_phase = methods.first_phase(method)
    config.optimizer = ConfigDict({"weight_decay": 5e-4, "milestones": (50, 100, 150)})
    return config
