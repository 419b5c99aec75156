"""Recipes: the checks of their keys, the command line, the workdir."""
