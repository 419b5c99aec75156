"""Joining the processes of a pod or cluster into one program."""

import os

import jax

_CLUSTER_SIGNS = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'JAX_NUM_PROCESSES')


def many_processes() -> bool:
    """Whether the environment says that this process is one of several."""
    if any(os.environ.get(name, '1') not in ('', '0', '1') for name in _CLUSTER_SIGNS):
        return True
    workers = os.environ.get('TPU_WORKER_HOSTNAMES', '')
    # Off a TPU, an installed libtpu leaves a sentence in that variable.
    return (',' in workers and ' ' not in workers) or 'MEGASCALE_COORDINATOR_ADDRESS' in os.environ


def initialize() -> None:
    """Starts `jax.distributed` where the launcher started several processes (TPU pod, Slurm, Open MPI, or by hand).

    By hand: `JAX_COORDINATOR_ADDRESS=host:port JAX_NUM_PROCESSES=n JAX_PROCESS_ID=i`.
    """
    if not many_processes():
        return
    if os.environ.get('JAX_PLATFORMS') == 'cpu':
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    by_hand = 'JAX_NUM_PROCESSES' in os.environ and 'JAX_PROCESS_ID' in os.environ
    if by_hand:
        jax.distributed.initialize(
            coordinator_address=os.environ.get('JAX_COORDINATOR_ADDRESS'),
            num_processes=int(os.environ['JAX_NUM_PROCESSES']),
            process_id=int(os.environ['JAX_PROCESS_ID']),
        )
    else:
        jax.distributed.initialize()


def is_primary() -> bool:
    """Whether this process prints and writes (without starting JAX's backends where there is only one)."""
    return not many_processes() or jax.process_index() == 0
