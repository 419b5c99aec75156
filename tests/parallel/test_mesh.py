"""Devices in slices: data alone runs over them, and what cannot be so divided is refused."""

import dataclasses

import jax
import pytest

from jaxtune.errors import UserError
from jaxtune.parallel import make_mesh
from jaxtune.parallel.mesh import _slices


@dataclasses.dataclass(frozen=True)
class Device:
    """Of a machine that is not here."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = 'cuda'


def cluster(processes, each=1, per_slice=0, platform='cuda'):
    """Devices in processes, and as many of these to a slice, listed as they came up."""
    devices = [
        Device(i, i // each, i // each // per_slice if per_slice else 0, platform) for i in range(processes * each)
    ]
    return devices[::-1]


@pytest.mark.parametrize(
    ('devices', 'slices', 'sizes'),
    [
        (cluster(2, 4), 1, [8]),
        (cluster(2, 4), -1, [8]),  # of one slice, by what they say
        (cluster(2, 4), 2, [4, 4]),  # a process is a slice
        (cluster(16), 2, [8, 8]),  # a process a GPU, eight a host
        (cluster(16, per_slice=8), -1, [8, 8]),
        (cluster(16, per_slice=4), 2, [8, 8]),  # what the devices say is finer
        (cluster(4, 4, 2, 'tpu'), 2, [8, 8]),
        (cluster(4, 4, 2, 'tpu'), -1, [8, 8]),
    ],
)
def test_devices_are_dealt_out_in_order(devices, slices, sizes):
    parts = _slices(devices, slices, f'mesh.slices={slices}')
    assert [len(part) for part in parts] == sizes
    processes = [sorted({device.process_index for device in part}) for part in parts]
    assert [index for part in processes for index in part] == sorted({device.process_index for device in devices})


@pytest.mark.parametrize(
    ('devices', 'slices', 'told'),
    [
        (cluster(4), 3, 'mesh.slices=3: the devices are of 4 processes; expected a number that divides it'),
        (cluster(4, 4, 2, 'tpu'), 1, 'mesh.slices=1: the number of slices of the devices is 2; expected that, or -1'),
        (cluster(4, 4, 0, 'tpu'), 2, 'mesh.slices=2: the number of slices of the devices is 1; expected that, or -1'),
        ([*cluster(3)[1:], Device(9, 2)], 2, 'mesh.slices=2: the devices are of 3 processes'),
        ([*cluster(2), Device(9, 1)], 2, 'mesh.slices=2: expected slices of equally many devices, found 1, 2'),
    ],
)
def test_what_cannot_be_divided_is_refused(devices, slices, told):
    with pytest.raises(UserError) as error:
        _slices(devices, slices, f'mesh.slices={slices}')
    assert str(error.value).startswith(told)


def test_one_process_is_one_slice():
    with pytest.raises(UserError, match=r'mesh.slices=2: the devices are of 1 processes'):
        make_mesh({'data': -1, 'slices': 2})
    assert make_mesh({'data': -1, 'slices': -1}).shape['data'] == len(jax.devices())
