"""Sets the results of runs beside each other and beside the published ones: `python -m cskd_jax.report`."""
