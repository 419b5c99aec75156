"""Reinforcement learning: a policy answers prompts, a reward scores the answers, and losses learn from both.

An algorithm is a module here and a line below. It holds what an objective does (`row`, `loss`; see `objectives`), and

- `VALUE`: whether its model has a value head;
- `group(config) -> int`: how many answers each prompt gets;
- `learn(config, found) -> (fields, metrics)`: what its rows hold beside the answers, made of `policy.Found`.
"""

import importlib
from types import ModuleType

ALGORITHMS = {
    'ppo': 'jaxtune.rl.ppo',
    'grpo': 'jaxtune.rl.grpo',
}


def get(task: str) -> ModuleType:
    """The module of an algorithm, by the task's name."""
    return importlib.import_module(ALGORITHMS[task])
