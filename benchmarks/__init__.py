"""Benchmarks, which need the repository and are not installed with the package."""
