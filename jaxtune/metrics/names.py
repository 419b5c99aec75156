"""What metrics are called in words, how their values are shown, and of which a higher value is better.

The last part of a name decides: `eval/reward` and `ppo/reward` are both `reward`. A plug-in brings the titles of its
own metrics along: `run.json` may hold `titles`, name -> words, which win over those here.
"""

import re
from collections.abc import Collection, Mapping

TITLES: Mapping[str, str] = {
    'loss': 'Loss',
    'learning_rate': 'Learning rate',
    'grad_norm': 'Gradient norm',
    'tokens_per_second': 'Tokens a second',
    'mfu': 'Model FLOPs utilisation',
    'goodput': 'Goodput, the share of the time in updates that count',
    'peak_bytes': 'Peak memory',
    'entropy': 'Entropy a token',
    'kl': 'KL from the reference',
    'approx_kl': 'KL from the policy that answered',
    'eos_rate': 'Answers that came to an end',
    'length': 'Tokens an answer',
    'turns': 'Turns an answer',
    'reward_std': 'Spread of the rewards',
    'explained_variance': 'Explained variance of the returns',
    'frac_reward_zero_std': 'Groups with nothing to tell apart',
    'learnt_share': 'Answers that were learnt from',
    'occupancy': 'Slots that wrote a token, of all in the steps of sampling',
    'sampled_tokens_per_second': 'Tokens sampled a second',
    'resampled': 'Prompts asked in the place of those without signal',
    'busiest_expert': 'Load of the busiest expert, 1 = even',
    'router_entropy': 'Entropy of the load of experts, 1 = even',
    'router_aux_loss': 'Load-balancing loss',
    'router_z_loss': 'Z-loss of the router',
    # Names in the files of earlier versions.
    'ended': 'Answers that came to an end',
    'value_explained': 'Explained variance of the returns',
    'groups_alike': 'Groups with nothing to tell apart',
}

_SHARES = ('mfu', 'goodput', 'accuracy', 'exact_match', 'fraction', 'share', 'longer_is_better', 'eos_rate', 'zero_std')
_SHARES += ('occupancy',)
_SHARES += ('ended', 'alike')  # of earlier versions

# Parts of the names of metrics of which a higher value is better.
HIGHER_IS_BETTER = ('accuracy', 'reward', 'bleu', 'f1', 'exact_match', 'margin')


def source_of(name: str) -> str:
    """The label of the source that a held-out loss is of, `eval/loss/LABEL`; '' for other metrics."""
    return name.removeprefix('eval/loss/') if name.startswith('eval/loss/') else ''


def positions_of(name: str) -> tuple[int, int] | None:
    """First and last position of the bucket that a metric is of, `eval/loss_by_position/LOW-HIGH`; None for others."""
    match = re.fullmatch(r'eval/\w+_by_position/(\d+)-(\d+)', name)
    return (int(match[1]), int(match[2])) if match else None


def last_part(name: str) -> str:
    """What a metric is apart from whose it is: `loss` of `train/loss`, `reward/math` of `grpo/reward/math`."""
    *_, group, last = ('', '', *name.split('/'))
    return f'reward/{last}' if group == 'reward' else last


def title(name: str, titles: Mapping[str, str] | None = None) -> str:
    """A metric's name in words: `eval/bits_per_byte` -> `Bits per byte`.

    Args:
      name: of the metric.
      titles: further titles, of a plug-in, by the last part of the name.
    """
    last = last_part(name)
    if last.startswith('reward/'):  # one of several
        return f'Reward: {last.removeprefix("reward/")}'
    return {**TITLES, **(titles or {})}.get(last) or last.replace('_', ' ').capitalize()


def unit(name: str) -> str:
    """`bytes`, `percent` (of a share, 0 to 1) or `''` for other numbers."""
    if name.endswith('bytes'):
        return 'bytes'
    return 'percent' if name.endswith(_SHARES) else ''


def higher_is_better(name: str, declared: Collection[str] = ()) -> bool:
    """Whether a higher value of a metric is better.

    Args:
      name: of the metric.
      declared: last parts of the names of metrics, of a plug-in, of which it is.
    """
    if source_of(name):  # whatever its label is
        return False
    return name.rsplit('/', 1)[-1] in declared or any(part in name for part in HIGHER_IS_BETTER)
