"""Group relative policy optimisation: no value head, an answer is measured by its siblings.

Shao et al. 2024, arXiv:2402.03300. Dr. GRPO, DAPO, GSPO, RLOO and REINFORCE are this task with other keys.
"""

from jaxtune.rl import family
from jaxtune.rl.choices import Choices

CHOICES = Choices(advantage='group', ratio='token', normalise='answer', kl='k3', kl_in='loss')
ALGORITHM = family.algorithm('grpo', CHOICES)
