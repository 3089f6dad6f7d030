"""Runs: configurations, the objects built from them, and the folders of runs."""
