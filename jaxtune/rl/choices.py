"""The keys that tell the algorithms of one family apart, with `auto` resolved, and which of them go together."""

import dataclasses

from jaxtune.common.settings import Settings
from jaxtune.errors import UserError

AUTO = 'auto'
ADVANTAGES = ('gae', 'group', 'group_mean', 'leave_one_out')
RATIOS = ('token', 'sequence')
NORMALISERS = ('answer', 'token', 'constant')
KL_ESTIMATORS = ('k1', 'k2', 'k3')
KL_PLACES = ('reward', 'loss')


@dataclasses.dataclass(frozen=True)
class Choices:
    """One algorithm of the family.

    Attributes:
      advantage: what an answer is measured by: `gae` (a value head), or its group's mean and standard deviation
        (`group`), mean (`group_mean`) or other answers (`leave_one_out`).
      ratio: whose probability ratio is clipped: a `token`'s or the whole `sequence`'s.
      normalise: what counts the same in the loss: each `answer`, each `token`, or each token over a `constant`, which
        is `generate.max_new_tokens`.
      kl: the estimator of the divergence from the reference.
      kl_in: whether the divergence is taken off the `reward` or added to the `loss`; '' where `rl.kl_coef` is 0.
    """

    advantage: str
    ratio: str
    normalise: str
    kl: str
    kl_in: str

    @property
    def grouped(self) -> bool:
        """Whether the answers to one prompt are measured by each other; else by a value head."""
        return self.advantage != 'gae'

    @property
    def token_fields(self) -> tuple[str, ...]:
        """Numbers of each token that the loss reads."""
        reference = ('reference',) if self.kl_in == 'loss' else ()
        measured = ('advantages',) if self.grouped else ('values', 'advantages', 'returns')
        return ('old', *reference, *measured, *(('constant',) if self.normalise == 'constant' else ()))


def choose(settings: Settings, task: Choices) -> Choices:
    """The recipe's choices.

    Args:
      settings: the recipe's `rl`.
      task: what its task takes for `auto`.

    Raises:
      UserError: two of them make no sense together; names the key.
    """

    def pick(key: str, default: str) -> str:
        value = getattr(settings, key)
        return default if value == AUTO else value

    advantage, ratio, kl_in = pick('advantage', task.advantage), settings.ratio, pick('kl_in', task.kl_in)
    normalise = pick('normalise', 'answer' if ratio == 'sequence' else task.normalise)
    chosen = Choices(advantage, ratio, normalise, pick('kl', 'k1' if kl_in == 'reward' else 'k3'), kl_in)
    _check(settings, chosen)
    return chosen if settings.kl_coef else dataclasses.replace(chosen, kl_in='')


def _check(settings: Settings, chosen: Choices) -> None:
    if chosen.ratio == 'sequence' and not chosen.grouped:
        raise UserError(
            'rl.ratio=sequence: expected token with rl.advantage=gae, whose advantages differ from token to token'
        )
    if chosen.ratio == 'sequence' and chosen.normalise != 'answer':
        raise UserError(
            f'rl.normalise={chosen.normalise}: expected answer with rl.ratio=sequence, of which each answer has one'
        )
    if chosen.kl == 'k1' and chosen.kl_in == 'loss':
        raise UserError('rl.kl=k1: expected k2 or k3 with rl.kl_in=loss, for the gradient of k1 is zero on average')
    for key, off in (('skip_equal', False), ('resample', 0)):
        value = getattr(settings, key)
        if value != off and not chosen.grouped:
            raise UserError(f'rl.{key}={value}: expected {off} with rl.advantage=gae, which asks each prompt once')
    least = 1.0 + clip_high(settings)
    if 0 < settings.dual_clip <= least:
        raise UserError(
            f'rl.dual_clip={settings.dual_clip:g}: expected 0 = off, or more than 1 + the upper clip range = {least:g}'
        )


def clip_high(settings: Settings) -> float:
    """The clip range above 1: `rl.clip_high`, or `rl.clip` where that is `auto` or 0."""
    return settings.clip if settings.clip_high in (AUTO, 0) else settings.clip_high
