"""Training built from objects: networks, losses, optimizers, data. Nothing here knows about configurations."""
