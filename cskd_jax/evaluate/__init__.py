"""Measures trained networks: `python -m cskd_jax.evaluate`.

This is a package and not a module because of the processes that decode images: they import the main module once more,
with all its imports, JAX among them, but not the `__main__` of a package.
"""
