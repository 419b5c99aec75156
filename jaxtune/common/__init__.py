"""Utilities that know neither arrays nor recipes: console, files, registries, user imports, signals."""
