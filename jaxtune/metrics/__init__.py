"""Metrics and samples that a run writes."""
