"""Preparation: documents are collected, cleaned, deduplicated, filtered, tokenised and built into a training set.

`plain` is the short way: documents as they come, in this process, with what the trainer itself needs. The other modules
are the long way, for which the extra `[data]` is needed; `phases` has its map.
"""

HELD_OUT = 'eval.jsonl'  # the held-out documents as text
