"""Import and export of PyTorch weights; `import_torch` and `export` are commands."""
