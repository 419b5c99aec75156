"""jaxtune: a JAX trainer that takes a language model from raw text to a model people prefer."""

__version__ = '0.1.0'
