"""Training made of objects: networks, losses, optimizers, data. Nothing here knows a configuration."""
