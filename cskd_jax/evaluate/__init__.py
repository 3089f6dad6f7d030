"""Measures trained networks: `python -m cskd_jax.evaluate`.

A package for what it does not do: the processes that decode images import a module that runs once more, with all that
it imports, JAX among it; but not the `__main__` of a package.
"""
