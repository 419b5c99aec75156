"""Kernels that a compiler knows nothing of: what they multiply, and a model of how fast.

The shares of the peak are round figures of what the kernels' own projects publish for large shapes; they are a model,
not a measurement.
"""

import dataclasses
import math
import re
from collections.abc import Callable

from jaxtune.cost.hlo import Array, Instruction


@dataclasses.dataclass(frozen=True)
class Shares:
    """What kernels skip of the arrays that they are given.

    Attributes:
      attended: share of all pairs of its queries and keys that the busiest device's attention needs, by its mask.
      routed: share of the rows of a grouped product that belong to a device's own experts, if all have as much to do.
    """

    attended: float = 1.0
    routed: float = 1.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call of a kernel does.

    Attributes:
      flops: of its products.
      dtype: of what is multiplied.
      share: of the chip's peak that it reaches; None for what any large product does.
    """

    flops: float
    dtype: str
    share: float | None = None


def work(call: Instruction, read: list[Array], shares: Shares) -> Work | None:
    """What a custom call multiplies; None for one that is no known kernel.

    Args:
      call: the instruction.
      read: the arrays that it reads.
      shares: of the work that is needed.
    """
    target = call.attribute(r'custom_call_target="([^"]*)"')
    name = f'{target} {re.sub(r"[.0-9]+$", "", call.name)} {_of_pallas(call)}'
    for pattern, count in _KERNELS:
        if re.search(pattern, name):
            return count(call, read, shares)
    return None


def label(call: Instruction) -> str:
    """A kernel's name: without its number, and of a library's its own."""
    target = call.attribute(r'custom_call_target="([^"]*)"')
    own = re.sub(r'[.0-9]+$', '', call.name) if target in ('tpu_custom_call', '') else ''
    return own or _of_pallas(call) or target.lstrip('_')


def _of_pallas(call: Instruction) -> str:
    """The name of a Pallas kernel by the path of its primitive; '' of other calls."""
    match = re.search(r'(\w+)\)*/pallas_call$', call.op_name)
    return match[1] if match else ''


def _splash(call: Instruction, read: list[Array], shares: Shares) -> Work | None:
    # Masks and tables come first; then queries, keys, values `[heads, length, head_dim]`.
    queries, keys, *_ = [array for array in read if len(array.dims) >= 3 and array.dtype in ('bf16', 'f32')]
    if '_dkv' in call.name:  # scores, their gradient, keys' and values'; the fused kernel makes the queries' too
        # Of them a part for each block of keys.
        count = 5 if any(len(array.dims) > len(queries.dims) for array in call.results) else 4
    else:
        count = 3 if '_dq' in call.name else 2
    return Work(2.0 * count * queries.size * keys.dims[-2] * shares.attended, queries.dtype, 0.55)


def _cudnn_attention(call: Instruction, read: list[Array], shares: Shares) -> Work | None:
    listed = call.attribute(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]')
    pairs = math.prod(int(n) for n in re.findall(r'\d+', listed))
    backward = 'Backward' in call.text
    # It skips what its own causal mask excludes, and nothing that an added bias does.
    skipped = shares.attended if 'CAUSAL' in call.attribute(r'"mask_type":\s*"(\w+)"') else 1.0
    return Work(2.0 * (5 if backward else 2) * pairs * read[0].dims[-1] * skipped, read[0].dtype, 0.6 - 0.15 * backward)


def _triton_attention(call: Instruction, read: list[Array], shares: Shares) -> Work:
    # `[batch, length, heads, head_dim]`; the kernel of the keys' gradients makes four products, the queries' three.
    queries, keys, *_ = [array for array in read if len(array.dims) == 4]
    kernel = _of_pallas(call)
    count = {'flash_keys': 4, 'flash_queries': 3}.get(kernel, 2)
    share = 0.4 if kernel == 'flash_forward' else 0.3
    return Work(2.0 * count * queries.size * keys.dims[1] * shares.attended, queries.dtype, share)


def _grouped(call: Instruction, read: list[Array], shares: Shares) -> Work | None:
    """Megablox: `[m, k] x [groups, k, n]`, or `[k, m] x [m, n]` to `[groups, k, n]`."""
    rows = [array for array in read if len(array.dims) == 2 and array.dtype in ('bf16', 'f32')]
    stacked = [array for array in (*read, *call.results) if len(array.dims) == 3]
    if not rows or not stacked:
        return None
    k, n = stacked[0].dims[1:]
    m = rows[0].dims['tgmm' in call.name]
    return Work(2.0 * m * k * n * shares.routed, rows[0].dtype, 0.6)


def _gemm(call: Instruction, read: list[Array], _: Shares) -> Work | None:
    if len(read) < 2:
        return None
    batch = math.prod(read[0].dims[:-2])
    return Work(2.0 * math.sqrt(read[0].size * read[1].size * call.results[0].size * batch), read[0].dtype)


def _nf4(call: Instruction, read: list[Array], _: Shares) -> Work | None:
    """Codes `[out, in / 2]`: a TPU looks them up in the time of a product of 128 tokens at 0.3 of the peak."""
    codes = next((array for array in read if array.dtype == 'u8' and len(array.dims) == 2), None)
    if codes is None:
        return None
    least = 128 if call.attribute(r'custom_call_target="([^"]*)"') == 'tpu_custom_call' else 0
    tokens = max(call.results[0].size // codes.dims[0], least)
    dtype = 'bf16' if any(array.dtype == 'bf16' for array in read) else 'f32'
    return Work(2.0 * tokens * 2 * codes.size, dtype, 0.3)


_KERNELS: tuple[tuple[str, Callable[[Instruction, list[Array], Shares], Work | None]], ...] = (
    (r'splash_m[hq]a', _splash),
    (r'fmha', _cudnn_attention),
    (r'\bflash_(forward|keys|queries)$', _triton_attention),
    (r'\bt?gmm', _grouped),
    (r'nf4_dot', _nf4),
    (r'__cublas|onednn\$matmul', _gemm),
)
