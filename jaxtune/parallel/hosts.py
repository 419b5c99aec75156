"""Joining the processes of a pod or cluster into one program."""

import contextlib
import dataclasses
import glob
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxtune.errors import UserError
from jaxtune.parallel import liveness

_CLUSTER_SIGNS = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'JAX_NUM_PROCESSES')


_watch = liveness.Watch()


def many_processes() -> bool:
    """Whether this process is, or on a TPU may be, one of several."""
    return _launched_together() or _on_tpu_vm()


def _launched_together() -> bool:
    """Whether the environment says that this process is one of several."""
    if any(os.environ.get(name, '1') not in ('', '0', '1') for name in _CLUSTER_SIGNS):
        return True
    workers = os.environ.get('TPU_WORKER_HOSTNAMES', '')
    # Off a TPU, an installed libtpu leaves a sentence in that variable.
    return (',' in workers and ' ' not in workers) or 'MEGASCALE_COORDINATOR_ADDRESS' in os.environ


def _on_tpu_vm() -> bool:
    """Whether this is a host of a TPU slice, whose metadata server alone knows how many there are."""
    chips = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
    return bool(chips) and os.environ.get('JAX_PLATFORMS', 'tpu').startswith('tpu')


def initialize() -> None:
    """Starts `jax.distributed` where the launcher started several processes (TPU pod, Slurm, Open MPI, or by hand).

    By hand: `JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i`.
    """
    if not many_processes():
        return
    if os.environ.get('JAX_PLATFORMS') == 'cpu':
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    if 'JAX_NUM_PROCESSES' in os.environ and 'JAX_PROCESS_ID' in os.environ:
        jax.distributed.initialize(
            coordinator_address=os.environ.get('JAX_COORDINATOR_ADDRESS'),
            num_processes=int(os.environ['JAX_NUM_PROCESSES']),
            process_id=int(os.environ['JAX_PROCESS_ID']),
        )
    elif _launched_together():
        jax.distributed.initialize()
    elif _on_tpu_vm():
        # A single host whose environment JAX does not know has nobody to wait for.
        with contextlib.suppress(ValueError):
            jax.distributed.initialize()
    if jax.process_count() > 1:
        _watch_each_other()


def _watch_each_other() -> None:
    """From here on, a process that is lost ends the others."""
    address = os.environ.get('JAX_COORDINATOR_ADDRESS', '').rpartition(':')[0]
    meeting = from_primary(
        lambda: dataclasses.asdict(liveness.listen(_watch, jax.process_count() - 1, address)),
    )
    if not is_primary() and not liveness.join(_watch, liveness.Meeting(**meeting), jax.process_index()):
        print(
            f'jaxtune: process {jax.process_index()} does not reach process 0 at {", ".join(meeting["addresses"])}, '
            f'port {meeting["port"]}; if one of them is lost, the other ends later',
            file=sys.stderr,
        )


def send_to_primary(message: Any) -> None:
    """Sends JSON values to process 0 without waiting for it; they are lost where there is no connection."""
    for link in _watch.links if not is_primary() else ():
        link.send(message=message)


def on_message(receive: Callable[[int, str, Any], None]) -> None:
    """In process 0: calls `receive(process, host, message)`, in another thread, for what other processes send."""
    _watch.receive = receive


@contextlib.contextmanager
def pod() -> Iterator[None]:
    """Inside, this process is one of the program's; at its end the others are told that it leaves, and how.

    What fails because another process was lost ends with the line about that process.
    """
    initialize()
    try:
        yield
    except UserError:
        _watch.leave(2)
        raise
    except (SystemExit, KeyboardInterrupt) as error:
        code = getattr(error, 'code', None)
        _watch.leave(code if isinstance(code, int) else 1)
        raise
    except BaseException:
        if _watch.links:
            liveness.wait_for_verdict()
        raise
    _watch.leave(0)


def is_primary() -> bool:
    """Whether this process prints and writes (without starting JAX's backends where there is only one)."""
    return not many_processes() or jax.process_index() == 0


def from_primary(function: Callable[[], Any]) -> Any:
    """What `function` returns in process 0, where alone it runs: JSON values.

    Raises:
      UserError: in every process, what process 0 raised.
    """
    if not many_processes() or jax.process_count() == 1:
        return function()
    from jax.experimental import multihost_utils  # only pods need it

    answer = b''
    if jax.process_index() == 0:
        try:
            answer = json.dumps({'value': function()}).encode()
        except UserError as error:
            answer = json.dumps({'error': str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(answer))))
    letters = np.frombuffer(answer.ljust(size, b' '), np.uint8) if answer else np.zeros(size, np.uint8)
    told = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(letters)).astype(np.uint8).tobytes())
    if 'error' in told:
        raise UserError(told['error'])
    return told['value']
