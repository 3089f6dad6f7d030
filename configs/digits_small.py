"""The digits of scikit-learn with the smallest networks: a distillation in seconds."""

from ml_collections import ConfigDict

from cskd_jax.configs import digits


def get_config(word="cskd"):
    """Returns what differs from the defaults of docs/configuration.md."""
    config = digits.get_config(word)
    config.epochs, config.teacher.epochs = 5, 5
    config.teacher.update(ConfigDict({"name": "resnet20", "width": 1.0}))
    config.student.update(ConfigDict({"name": "resnet8", "width": 0.5}))
    return config
