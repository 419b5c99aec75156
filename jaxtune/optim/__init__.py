"""Optimizers, schedules and their state in eight bits."""
