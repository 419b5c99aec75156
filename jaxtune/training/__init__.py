"""Steps, the loop, evaluation, checkpoints."""
