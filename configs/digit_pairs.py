"""Two handwritten digits in each image of 16x16 pixels: the smallest multi-label recipe, with no download needed.

An image has the classes of its digits; networks are scored by mean average precision. `--config=digit_pairs` is the
paper's category structure for several classes per image, combined with logit distillation. `:bkd` leaves out category
structure, and `:bce` also leaves out the teacher (configs/methods.py).
"""

from ml_collections import ConfigDict

from cskd_jax.configs import methods, networks


def get_config(word="mlcskd"):
    """Returns what differs from the defaults of docs/configuration.md."""
    teacher, student, method = networks.split_word(word, ("resnet18", 0.25), ("resnet18", 0.0625))
    config = ConfigDict()
    config.method = method
    config.batch_size = 64
    config.epochs = 16
    config.log_every = 10
    config.dataset = ConfigDict({"name": "digit_pairs", "mean": (0.1528,), "std": (0.3067,)})
    config.augment = ConfigDict({"crop_padding": 1})  # There is no flip, because it would change most digits.
    config.teacher = ConfigDict({"name": teacher[0], "width": teacher[1], "epochs": 16})
    config.student = ConfigDict({"name": student[0], "width": student[1]})
    config.losses = methods.losses(method, multilabel=True)
    config.optimizer = ConfigDict({"learning_rate": 0.2, "milestones": (10, 14)})
    return config
