"""Leaves of the parameter tree and the one product that accepts any of them."""

from jaxtune.weights.grouped import Groups, grouped_dot
from jaxtune.weights.leaf import Weight, dot, eval_mode, expand, is_weight, lookup, materialise, merge_weights
from jaxtune.weights.lora import LoRA
from jaxtune.weights.new_rows import NewRows, put_rows
from jaxtune.weights.nf4 import NF4, Codec

__all__ = [
    'NF4',
    'Codec',
    'Groups',
    'LoRA',
    'NewRows',
    'Weight',
    'dot',
    'eval_mode',
    'expand',
    'grouped_dot',
    'is_weight',
    'lookup',
    'materialise',
    'merge_weights',
    'put_rows',
]
