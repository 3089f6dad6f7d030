"""The 1,797 handwritten digits of scikit-learn, 8x8 pixels: a run of a few minutes on two cores, without a download.

`--config=digits` is category-structure distillation as in the code released with the paper
(https://github.com/xeanzheng/CSKD); `:METHOD` picks another method (configs/methods.py).
"""

from ml_collections import ConfigDict

from cskd_jax.configs import methods, networks


def get_config(word="cskd"):
    """Returns what differs from the defaults of docs/configuration.md."""
    teacher, student, method = networks.split_word(word, ("resnet18", 0.25), ("resnet18", 0.125))
    config = ConfigDict()
    config.method = method
    config.batch_size = 64
    config.epochs = 30
    config.log_every = 10
    config.dataset = ConfigDict({"name": "digits", "mean": (0.3055,), "std": (0.3766,)})
    config.augment = ConfigDict({"crop_padding": 1})  # There is no flip, because it would change most digits.
    config.teacher = ConfigDict({"name": teacher[0], "width": teacher[1], "epochs": 30})
    config.student = ConfigDict({"name": student[0], "width": student[1]})
    config.losses = methods.losses(method, warmup_epochs=5)
    config.first_phase = methods.first_phase(method, epochs=4)
    config.optimizer = ConfigDict(
        {"learning_rate": 0.05, "milestones": (15, 25), "restart_momentum": method != "cskd_paper"}
    )
    return config
