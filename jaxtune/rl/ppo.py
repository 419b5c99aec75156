"""Proximal policy optimisation with a value head, as in InstructGPT.

Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155.

Every token costs `rl.kl_coef` times its log-probability above the reference's; the last one brings the reward.
"""

from jaxtune.rl import family
from jaxtune.rl.choices import Choices

CHOICES = Choices(advantage='gae', ratio='token', normalise='token', kl='k1', kl_in='reward')
ALGORITHM = family.algorithm('ppo', CHOICES)
