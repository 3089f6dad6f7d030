"""Recipes, one per file, and what they share: `methods` and `networks`, the words that may follow their names."""
