"""A network that compiles in no time."""

from flax import linen as nn


class Net(nn.Module):
    """A network that gives logits of `classes`, a map and an embedding.

    Attributes:
      width: Number of channels of the map.
      classes: Number of classes.
    """

    width: int = 4
    classes: int = 3

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3), strides=2)(x))
        embedding = x.mean(axis=(1, 2))
        return {"logits": nn.Dense(self.classes)(embedding), "features": (x,), "embedding": embedding}
