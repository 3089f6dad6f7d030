"""Compares the results of runs with each other and with published results: `python -m cskd_jax.report`."""
