"""What a compiled program costs, by its text: seconds by layer part, collectives, kernels."""

from jaxtune.cost.chips import Chip, chip_of
from jaxtune.cost.estimate import Collective, Estimate, Kernel, estimate

__all__ = ['Chip', 'Collective', 'Estimate', 'Kernel', 'chip_of', 'estimate']
