"""Answers to prompts: sampling, beam search, and metrics of texts."""
