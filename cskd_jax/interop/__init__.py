"""PyTorch weights in and out; `import_torch` and `export` are commands."""
