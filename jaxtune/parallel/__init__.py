"""The device mesh: its axes, how parameters and batches lie on it, and how many hosts become one program."""

from jaxtune.parallel.batches import batch_sharding, place, place_all
from jaxtune.parallel.compiler_options import compiler_options
from jaxtune.parallel.mesh import (
    AXES,
    BATCH_AXES,
    auto_axes,
    axis_size,
    batch_shards,
    compute_capability,
    constrain,
    device_kind,
    dividing_axes,
    fusion_barrier,
    in_order,
    make_mesh,
    one_cpu,
    one_device,
    platform,
)
from jaxtune.parallel.rules import RULES, copied_bytes, match_rules, shardings, state_specs

__all__ = [
    'AXES',
    'BATCH_AXES',
    'RULES',
    'auto_axes',
    'axis_size',
    'batch_sharding',
    'batch_shards',
    'compiler_options',
    'compute_capability',
    'constrain',
    'copied_bytes',
    'device_kind',
    'dividing_axes',
    'fusion_barrier',
    'in_order',
    'make_mesh',
    'match_rules',
    'one_cpu',
    'one_device',
    'place',
    'place_all',
    'platform',
    'shardings',
    'state_specs',
]
