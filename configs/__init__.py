"""Recipes, one a file; `methods` and `networks` are the words that may stand behind their names."""
