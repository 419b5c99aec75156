"""Where in the model an instruction comes from, by the path that JAX gives its primitive."""

import re

_SCANNED = re.compile(r'[A-Z]\w*\._scan_layers')
_WRAPPER = re.compile(r'\w+\(.*\)|')
# Parts of a path that say how something is computed, not where.
_HOW = frozenset((
    'while', 'body', 'cond', 'closed_call', 'checkpoint', 'rematted_computation', 'shard_map', 'scan', 'Block',
    'custom_vjp_call', 'custom_jvp_call', 'named_call', 'core_call', 'pjit',
))  # fmt: skip
_STEP = re.compile(r'branch_\d+_fun|(splash|flash)_\w+')
_SCOPED = re.compile(r'(?:jvp|transpose)\(\(?((?!flash_)[a-z]\w*)\)?\)')


def of(op_name: str) -> tuple[str, str]:
    """`(part, phase)` of a primitive's path; phases are `forward`, `recomputed`, `backward` and `update`.

    The part is the path of modules and named scopes without the primitive itself, such as `layers/mlp/down_proj`;
    `layers` alone is what a scan over them slices and stacks, `other` what has no path.
    """
    names = []
    for part in _split(op_name)[:-1]:
        if _SCANNED.fullmatch(part):
            names.append('layers')
        elif match := _SCOPED.search(part):
            names.append(match[1])
        elif part in _HOW or '.' in part or _WRAPPER.fullmatch(part) or _STEP.fullmatch(part):
            continue
        elif part not in names[-1:]:
            names.append(part)
    if 'rematted_computation' in op_name:
        phase = 'recomputed'
    elif 'transpose(' in op_name:
        phase = 'backward'
    else:
        phase = 'forward' if 'jvp(' in op_name else 'update'
    return '/'.join(names) or 'other', phase


def _split(path: str) -> list[str]:
    """Parts of a path; a slash inside brackets separates nothing."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(path):
        depth += (letter == '(') - (letter == ')')
        if letter == '/' and not depth:
            parts.append(path[start:index])
            start = index + 1
    return [*parts, path[start:]]
