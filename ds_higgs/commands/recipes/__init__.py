"""Recipes: what `init` and recipes/ write for a goal, a card and a size of data."""
