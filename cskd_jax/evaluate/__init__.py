"""Measures trained networks: `python -m cskd_jax.evaluate`.

This is a package rather than a module because of the processes that decode images: they import the main module once
more, with all its imports, including JAX, but not the `__main__` of a package.
"""
