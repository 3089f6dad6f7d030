"""Runs: configurations, what they are built into, and the folders in which they are carried out."""
