"""Combinations of model family, objective, method and mesh, drawn from a fixed seed, and random batches for them."""

import dataclasses
import functools
import itertools
import random

import jax
import numpy as np

from jaxtune import models
from jaxtune.methods import apply
from jaxtune.methods.new_tokens import NewTokens, grow
from jaxtune.models import value_head
from jaxtune.models.frozen import FrozenModel
from jaxtune.models.model import leaf_paths
from jaxtune.objectives import OBJECTIVES, TEACHER
from jaxtune.parallel import AXES, make_mesh, match_rules, place_all, shardings
from jaxtune.recipe import recipes
from jaxtune.tasks import specs
from jaxtune.training.program import make_program
from jaxtune.weights import tree

LENGTH, ROWS, VOCAB = 16, 8, 64

_TOKENS = {'vocab_size': VOCAB, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0, 'initializer_range': 0.3}
_SIZES = {
    'hidden_size': 16, 'intermediate_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2,
    'max_position_embeddings': 32, **_TOKENS,
}  # fmt: skip
_T5 = {
    'vocab_size': VOCAB, 'd_model': 16, 'd_kv': 8, 'd_ff': 32, 'num_layers': 2, 'num_heads': 2, 'pad_token_id': 0,
    'decoder_start_token_id': 0, 'eos_token_id': 1,
}  # fmt: skip
FAMILIES = {
    'llama': {'model_type': 'llama', 'num_key_value_heads': 1, **_SIZES},
    'qwen3': {'model_type': 'qwen3', 'num_key_value_heads': 2, 'head_dim': 8, 'tie_word_embeddings': True, **_SIZES},
    'qwen3_moe': {
        'model_type': 'qwen3_moe',
        'num_key_value_heads': 2,
        'num_experts': 4,
        'num_experts_per_tok': 2,
        'moe_intermediate_size': 16,
        'norm_topk_prob': True,
        **_SIZES,
    },
    'deepseek_v3': {
        'model_type': 'deepseek_v3',
        'n_routed_experts': 4,
        'n_group': 1,
        'topk_group': 1,
        'num_experts_per_tok': 2,
        'moe_intermediate_size': 16,
        'first_k_dense_replace': 1,
        'q_lora_rank': 8,
        'kv_lora_rank': 8,
        'qk_rope_head_dim': 4,
        'qk_nope_head_dim': 8,
        'v_head_dim': 8,
        'num_key_value_heads': 2,
        **_SIZES,
    },
    'gpt2': {'model_type': 'gpt2', 'n_embd': 16, 'n_layer': 2, 'n_head': 2, 'n_positions': 32, **_TOKENS},
    'bert': {'model_type': 'bert', **_SIZES},
    'modernbert': {'model_type': 'modernbert', **_SIZES, 'cls_token_id': 1, 'sep_token_id': 2},
    't5': {'model_type': 't5', **_T5},
    'umt5': {'model_type': 'umt5', **_T5},
}
DECODERS, ENCODERS, ENCDECS = (
    ('llama', 'qwen3', 'gpt2', 'qwen3_moe', 'deepseek_v3'),
    ('bert', 'modernbert'),
    ('t5', 'umt5'),
)

# What an update learns -> the families that can, and the recipe's keys.
LEARNING = {
    'causal_lm': (DECODERS, {'objective': 'causal_lm'}),
    'sft': (DECODERS, {'objective': 'sft'}),
    'reward': (DECODERS, {'objective': 'reward', 'reward.center': 0.1}),
    'dpo': (DECODERS, {'objective': 'dpo', 'dpo.label_smoothing': 0.1}),
    'ipo': (DECODERS, {'objective': 'dpo', 'dpo.loss': 'ipo'}),
    'kto': (DECODERS, {'objective': 'dpo', 'dpo.loss': 'kto'}),
    'orpo': (DECODERS, {'objective': 'dpo', 'dpo.loss': 'orpo'}),
    'simpo': (DECODERS, {'objective': 'dpo', 'dpo.loss': 'simpo'}),
    'distill': (DECODERS, {'objective': 'distill', 'distill.beta': 0.3, 'distill.temperature': 1.5}),
    'masked_lm': (ENCODERS, {'objective': 'masked_lm'}),
    'classification': (ENCODERS, {'objective': 'classification'}),
    'seq2seq': (ENCDECS, {'objective': 'seq2seq', 'data.target_len': 8}),
    'span_corruption': (ENCDECS, {'objective': 'span_corruption'}),
    'ppo': (DECODERS, {'task': 'ppo'}),
    'grpo': (DECODERS, {'task': 'grpo', 'rl.group': 2}),
}
REWARDED = ('ppo', 'grpo')
CASES = tuple((family, name) for name, (families, _) in LEARNING.items() for family in families)
# Several segments may share a row.
PACKED = ('causal_lm', 'sft', 'distill', 'masked_lm', 'seq2seq', 'span_corruption', 'ppo', 'grpo')

METHODS = {
    'full': {},
    'lora': {'method.name': 'lora'},
    'rslora': {'method.name': 'lora', 'method.rslora': True, 'method.targets': 'all-linear', 'method.lr_ratio': 2.0},
    'dora': {'method.name': 'lora', 'method.dora': True},
    'pissa': {'method.name': 'lora', 'method.init': 'pissa'},
    'some layers': {'method.name': 'lora', 'method.layers': '1:2'},
    'shared experts': {'method.name': 'lora', 'method.share_experts': True},
    'qlora': {'method.name': 'qlora', 'method.block_size': 16},
    'qlora single': {'method.name': 'qlora', 'method.block_size': 64, 'method.double_quant': False},
    'qlora dora': {'method.name': 'qlora', 'method.block_size': 16, 'method.dora': True},
    'new rows': {'method.name': 'lora', 'tokenizer.add': '<a>,<b>'},
    'houlsby': {'method.name': 'adapter', 'method.bottleneck': 4},
    'pfeiffer': {'method.name': 'adapter', 'method.bottleneck': 4, 'method.placement': 'pfeiffer'},
    'prompt': {'method.name': 'prompt', 'method.virtual_tokens': 4},
    'prefix': {'method.name': 'prompt', 'method.virtual_tokens': 4, 'method.prefix': True},
}
ONE = (1, 1, 1, 1)
# Every way to make 8 of sizes of data, fsdp, tensor and sequence, and some of expert beside them.
MESHES = tuple(sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8)
MESHES += ((1, 1, 2, 1, 4), (1, 2, 1, 2, 2), (2, 1, 1, 1, 4), (1, 2, 2, 1, 2), (1, 4, 1, 1, 2), (1, 1, 1, 2, 4))
OPTIMIZERS = ('adamw', 'adamw8bit', 'adafactor', 'lion', 'muon', 'sgd')


@dataclasses.dataclass(frozen=True)
class Combination:
    """A model family, what it learns and by which method, on a mesh, with an optimizer."""

    family: str
    learning: str
    method: str
    mesh: tuple[int, ...] = ONE
    optimizer: str = 'sgd'

    def __str__(self):
        sizes = 'x'.join(map(str, self.mesh))
        return '-'.join((self.family, self.learning, self.method.replace(' ', '_'), sizes, self.optimizer))


def draw(seed, count, cases=CASES, methods=tuple(METHODS), meshes=(ONE,), optimizers=('sgd',)):
    """`count` different combinations; on each axis no value comes again before all of its values have come."""
    rng = random.Random(seed)

    def deck(values):
        while True:
            yield from rng.sample(values, len(values))

    axes = [deck(tuple(axis)) for axis in (cases, methods, meshes, optimizers)]
    drawn = {}
    while len(drawn) < count:
        (family, learning), *rest = (next(axis) for axis in axes)
        drawn[Combination(family, learning, *rest)] = None
    return list(drawn)


@functools.cache
def config_of(c):
    """The recipe of a combination."""
    config = recipes.defaults()
    common = {'data.seq_len': LENGTH, 'train.batch_size': ROWS, 'method.rank': 4, 'optimizer.name': c.optimizer}
    # Plain descent by the gradient itself for what compares gradients.
    plain = {'optimizer.lr': 1.0, 'optimizer.new_lr': 1.0, 'optimizer.weight_decay': 0.0, 'optimizer.clip_norm': 0.0}
    rate = plain | {'optimizer.schedule': 'constant'} if c.optimizer == 'sgd' else {'optimizer.lr': 3e-3}
    recipes.apply_overrides(config, common | rate | METHODS[c.method] | LEARNING[c.learning][1])
    return config


@functools.cache
def learning_of(c):
    """The bound objective or algorithm."""
    config = config_of(c)
    return specs.bound_algorithm(config) if c.learning in REWARDED else specs.objective(config)


@functools.cache
def shared_of(c, sizes=ONE):
    """What a batch holds beside its rows: the teacher, wider and shallower than the students, on a mesh."""
    if c.learning != 'distill':
        return {}
    fields = FAMILIES['qwen3'] | {'hidden_size': 24, 'num_hidden_layers': 1}
    model, mesh = models.build(models.read_config(fields)), mesh_of(sizes)
    params = _initialise(model)
    return {TEACHER: FrozenModel(model, jax.device_put(params, shardings(match_rules(params, mesh), mesh)))}


def method_of(c):
    """The bound method."""
    return specs.method(config_of(c))


@functools.cache
def _build(family, head):
    return models.build(models.read_config(FAMILIES[family]), head=head, labels=3 if head == 'classification' else 0)


@functools.cache
def model_of(c):
    """The model, without parameters."""
    return _build(c.family, OBJECTIVES.get(LEARNING[c.learning][1].get('objective', 'causal_lm')).head)


@functools.cache
def _initialise(model):
    return jax.jit(model.init)(jax.random.key(0))


def base_of(c):
    """The model's parameters before any method."""
    params = _initialise(model_of(c))
    return value_head.with_value(params, model_of(c)) if c.learning == 'ppo' else params


def fresh_of(c):
    """Paths of what a pretrained folder would lack."""
    return frozenset(path for path in leaf_paths(model_of(c).shapes) if path.split('/')[0] in ('classifier', 'score'))


def _encode(c, params):
    return apply.encoded(params, apply.codecs(method_of(c), model_of(c), fresh_of(c)))


def _begin(c, stored):
    def begin(params):
        params = apply.begin(method_of(c), model_of(c), params, fresh_of(c))
        if c.method != 'new rows':
            return params
        # Rows that there are, and begin as what they are: so that the method begins at the model.
        new = NewTokens(VOCAB, (7, *range(VOCAB - 3, VOCAB)), np.ones(VOCAB, bool), {i: (i,) for i in range(VOCAB)})
        return grow(params, model_of(c), new, method_of(c), fresh_of(c))

    return apply.attach(begin, stored, mesh_of(ONE))


@functools.cache
def stored_of(c):
    """The base as the method stores it."""
    params = base_of(c)
    return jax.jit(lambda params: _encode(c, params))(params) if c.method.startswith('qlora') else params


@functools.cache
def tuned_of(c):
    """The tree as training begins, on one device."""
    return _begin(c, stored_of(c))


@functools.cache
def shapes_of(c):
    """The tree as training begins, as shapes: nothing is computed."""
    model = model_of(c)
    shapes = model.shapes
    if c.learning == 'ppo':
        shapes = jax.eval_shape(lambda params: value_head.with_value(params, model), shapes)
    return _begin(c, jax.eval_shape(lambda params: _encode(c, params), shapes))


@functools.cache
def random_of(c):
    """The tree with random numbers everywhere, on the host: nothing that a method adds is zero."""
    rng = np.random.default_rng(1)

    def numbers(path, leaf):
        name = path.rsplit('/', 1)[-1]
        if leaf.dtype == np.uint8:
            return rng.integers(0, 256, leaf.shape, np.uint8)
        if name in ('scale', 'weight', 'magnitude'):
            return (1 + 0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
        if name in ('scales', 'outer', 'offset'):  # of NF4
            return rng.uniform(0.1, 0.3, leaf.shape).astype(leaf.dtype)
        return (0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    shapes = shapes_of(c)
    leaves = [numbers(*pair) for pair in zip(tree.paths(shapes), jax.tree.leaves(shapes), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def halves_of(c, params):
    """`(trainable, frozen)` halves."""
    return apply.partition(method_of(c).method, params, fresh_of(c))


@functools.cache
def mesh_of(sizes):
    """A mesh of as many devices as the sizes multiply to."""
    axes = dict(zip(AXES, sizes, strict=False))
    return make_mesh(axes, jax.devices()[: int(np.prod(sizes))])


class Run:
    """The compiled update of a combination, and states that it begins from."""

    def __init__(self, c, accumulate=1):
        self.c, self.mesh = c, mesh_of(c.mesh)
        params = random_of(c)
        with jax.set_mesh(self.mesh):
            placed = jax.device_put(params, shardings(match_rules(params, self.mesh), self.mesh))
            trainable, self.frozen = halves_of(c, placed)
            self.first = to_numpy(trainable)
            self.program = make_program(
                self.mesh, model_of(c), trainable, learning_of(c), optimizer=config_of(c).optimizer, steps=4,
                batch_size=ROWS, seed=0, method=method_of(c), newly_initialized=fresh_of(c),
                shared=shared_of(c, c.mesh),
            )  # fmt: skip
            self.step = self.program.train_step(accumulate)

    def begin(self):
        """A state before the first update, which may be donated."""
        with jax.set_mesh(self.mesh):
            return self.program.init_state(jax.device_put(owned(self.first), self.program.placed['trainable']))

    def restore(self, state):
        """A state of numpy arrays on the mesh."""
        return jax.device_put(owned(state), self.program.placed)

    def updates(self, state, numbers):
        """Updates by the batches with these numbers; the state and the metrics of each."""
        found = []
        with jax.set_mesh(self.mesh):
            for number in numbers:
                batch = place_all(batch_of(self.c, number), self.mesh) | shared_of(self.c, self.c.mesh)
                state, metrics = self.step(state, self.frozen, batch)
                found.append(jax.tree.map(float, metrics))
        return state, found


@functools.cache
def run_of(c, accumulate=1):
    """One `Run` a combination."""
    return Run(c, accumulate)


def to_numpy(values):
    """Copies on the host."""
    return jax.tree.map(np.array, values)


owned = to_numpy  # a device array may share the memory of a numpy array: not of one that is compared later


def batch_of(c, number):
    """The batch with a number."""
    return random_batch(learning_of(c).batch_spec(), np.random.default_rng([number, 7]), c.learning)


def random_batch(spec, rng, learning=''):
    """Random rows of a batch_spec."""
    if 'chosen' in spec:
        return _pairs(spec, rng, learning)
    if 'labels' in spec:
        return _labelled(spec, rng)
    rows = [[segment(spec, rng, LENGTH // 2 if two else LENGTH - 3) for _ in range(1 + two)] for two in [1, 0] * 4]
    return lay_out(spec, rows, rng)


def segment(spec, rng, longest):
    """One text's own numbers, `{field: [size]}`, of at most `longest` tokens (targets in proportion)."""
    size = int(rng.integers(2, longest + 1))
    sizes = {'targets': int(rng.integers(1, max(2, longest // 2) + 1))} if 'target_segment_ids' in spec else {}
    found = {}
    for name, field in spec.items():
        if name in ('positions', 'segment_ids', 'target_segment_ids'):
            continue
        count = sizes.get(name, size)
        if name in ('tokens', 'targets'):
            found[name] = rng.integers(3, VOCAB, count)
        else:
            found[name] = rng.normal(-3 if name in ('old', 'reference') else 0, 0.3, count)
        found[name] = found[name].astype(field.dtype)
    if 'loss_mask' in found:
        weights = rng.random(size) < 0.7
        weights[0], weights[-1] = True, size == 1  # the last token of an answer predicts nothing
        found['loss_mask'] = weights.astype(np.float32)
        for name in set(found) - {'tokens', 'targets', 'loss_mask'}:
            found[name] = found[name] * found['loss_mask']
        if 'shares' in found:
            found['shares'] = found['loss_mask'] / found['loss_mask'].sum()
    return found


def lay_out(spec, rows, rng=None):
    """Rows of segments as a batch."""
    batch = {name: np.zeros((ROWS, *field.shape), field.dtype) for name, field in spec.items()}
    for row, segments in enumerate(rows):
        at = dict.fromkeys(batch, 0)
        for number, one in enumerate(segments, 1):
            size = len(one['tokens'])
            filled = one | {'segment_ids': np.full(size, number)}
            if 'positions' in batch:
                filled['positions'] = np.arange(size)
            if 'target_segment_ids' in batch:
                filled['target_segment_ids'] = np.full(len(one['targets']), number)
            for name, values in filled.items():
                batch[name][row, at[name] : at[name] + len(values)] = values
                at[name] += len(values)
    return batch


def _labelled(spec, rng):
    batch = {name: np.zeros((ROWS, *field.shape), field.dtype) for name, field in spec.items()}
    for row in range(ROWS):
        size = int(rng.integers(2, LENGTH + 1))
        batch['tokens'][row, :size] = rng.integers(3, VOCAB, size)
        batch['positions'][row, :size] = np.arange(size)
        batch['segment_ids'][row, :size] = 1
        batch['token_types'][row, size // 2 : size] = 1
    batch['labels'][:] = rng.integers(0, 3, ROWS)
    batch['loss_mask'][:] = np.arange(ROWS) != 3
    return batch


def _pairs(spec, rng, learning):
    batch = {name: np.zeros((ROWS, *field.shape), field.dtype) for name, field in spec.items()}
    batch['margin'][:] = rng.random(ROWS)
    for side in [name.removesuffix('_start') for name in spec if name.endswith('_start')]:
        end = rng.integers(3, LENGTH + 1, ROWS)
        batch[f'{side}_end'][:], batch[f'{side}_start'][:] = end, rng.integers(1, end - 1)
        batch[side][:] = rng.integers(3, VOCAB, (ROWS, LENGTH)) * (np.arange(LENGTH) < end[:, None])
        batch[f'{side}_weight'][:] = 1
        if f'reference_{side}' in spec:
            batch[f'reference_{side}'][:] = -4.0 * (end - batch[f'{side}_start']) + rng.normal(size=ROWS)
    if learning == 'kto':  # some rows have one answer only
        batch['chosen_weight'][0] = batch['rejected_weight'][1] = 0
    return batch
