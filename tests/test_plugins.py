"""An objective, a method and an algorithm of one's own, in a package outside the repository, named in a recipe."""

import json
import pathlib

import numpy as np
import pytest

from jaxtune import main
from jaxtune.models.safetensors import read_header

PLUGINS = """
import dataclasses
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtune.methods import AdapterArrays, Method, peft, targets
from jaxtune.models.model import leaf_paths
from jaxtune.objectives import Objective, causal_lm
from jaxtune.objectives.cross_entropy import token_logprobs
from jaxtune.rl import grpo
from jaxtune.weights import Weight, dot, materialise
from jaxtune.weights.tree import nested


def focal_loss(settings, model, params, batch, rng):
    hidden = model.apply(params, batch, rng=rng).hidden
    logps = token_logprobs(hidden, model.head(params), batch['targets']) * batch['loss_mask']
    nll = -((1 - jnp.exp(logps)) ** settings.gamma * logps)
    return nll.sum(), batch['loss_mask'].sum(), {'confidence': (jnp.exp(logps) * batch['loss_mask']).sum()}


OBJECTIVE = Objective('focal', causal_lm.batch_spec, causal_lm.dataset, focal_loss, kinds=('decoder',))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Weight):
    base: jax.Array
    vector: jax.Array  # [layers, out]

    shape = property(lambda self: self.base.shape)
    ndim = property(lambda self: self.base.ndim)
    dtype = property(lambda self: self.base.dtype)
    original = property(lambda self: self.base)

    @property
    def size(self):
        return sum(leaf.size for leaf in (self.base, self.vector) if leaf is not None)

    def dot(self, x, rng):
        return dot(x, self.base) * self.vector.astype(x.dtype)

    def materialise(self):
        return (materialise(self.base) * self.vector[..., None, :]).astype(self.dtype)

    def specs(self, spec, fit):
        base = None if self.base is None else fit(spec, self.base.shape)
        vector = None if self.vector is None else fit(P(spec[-1]), self.vector.shape, may_copy=True)
        return Scaled(base, vector)


def ia3_init(params, model, settings, rng, tokenizer):
    leaves = leaf_paths(params)
    for path, layers in targets.select(model, ('k_proj', 'v_proj'), 'all').items():
        leaves[path] = Scaled(leaves[path], jnp.ones((len(layers), leaves[path].shape[-1]), jnp.float32))
    return nested(leaves)


def ia3_save(folder, params, model, settings, base, whole):
    names, tensors = targets.modules(model), {}
    for path, leaf in leaf_paths(params).items():
        if isinstance(leaf, Scaled):
            for name, row in zip(names[path], peft.host_array(leaf.vector), strict=True):
                tensors[f'{peft.NAME_PREFIX}{name}.ia3_l'] = row[:, None]
    fields = {'peft_type': 'IA3', 'target_modules': ['k_proj', 'v_proj'], 'feedforward_modules': []}
    peft.write(folder, fields, tensors, model, base)


def ia3_read(folder, config, entries, model):
    stacks = {}
    for path, names in targets.modules(model).items():
        rows = [entries[f'{name}.ia3_l'] for name in names if f'{name}.ia3_l' in entries]
        if rows:
            stacks[path] = jnp.stack([peft.float_values(row)[:, 0] for row in rows])

    def attach(params, arrays):
        leaves = leaf_paths(params)
        return nested(leaves | {path: Scaled(leaves[path], vector) for path, vector in arrays.added.items()})

    return attach, AdapterArrays(stacks, {})


METHOD = Method(
    'ia3', ia3_init, lambda path: path.endswith('/vector'), save_adapter=ia3_save, read_adapter={'IA3': ia3_read}
)


def leave_one_out(settings, rollouts):
    scores = rollouts.scores.reshape(-1, settings.group)
    others = (scores.sum(-1, keepdims=True) - scores) / (settings.group - 1)
    fields = {'old': rollouts.old, 'reference': rollouts.reference}
    return fields | {'advantages': (scores - others).reshape(-1, 1) * rollouts.mask}, {}


ALGORITHM = dataclasses.replace(grpo.ALGORITHM, name='rloo', compute_advantages=leave_one_out)


def letters(completions, **_):
    return [text.count('e') for text in completions]
"""

COMMON = {
    'tokenizer.path': 'bytes', 'data.train': 'train.jsonl', 'data.eval': 'eval.jsonl', 'data.seq_len': 32,
    'train.batch_size': 8, 'train.accumulate': 1, 'optimizer.lr': 1e-2, 'optimizer.schedule': 'constant',
    'log.every': 1,
    'model.config': {
        'model_type': 'llama', 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2,
        'num_attention_heads': 4, 'num_key_value_heads': 2, 'max_position_embeddings': 64,
    },
}  # fmt: skip
RECIPES = {
    'objective': {'objective': 'own_plugins:OBJECTIVE', 'custom': {'gamma': 2.0}},
    'method': {'method.name': 'own_plugins:METHOD', 'optimizer.lr': 0.1},
    'algorithm': {
        'task': 'own_plugins:ALGORITHM', 'data.format': 'prompt', 'rl.reward': 'own_plugins:letters',
        'rl.rollouts': 16, 'rl.group': 4, 'rl.epochs': 1, 'generate.max_new_tokens': 8, 'generate.batch_size': 8,
    },
}  # fmt: skip
STEPS = 6


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with the package, a recipe for each kind, and the data."""
    folder = tmp_path_factory.mktemp('plugins')
    (folder / 'own_plugins.py').write_text(PLUGINS)
    for name, keys in RECIPES.items():
        lines = [f'config[{key.split(".")[0]!r}] = ConfigDict()' for key in COMMON | keys if '.' in key]
        lines = list(dict.fromkeys(lines))
        lines += [f'config.{key} = {value!r}' for key, value in (COMMON | keys).items()]
        body = '\n    '.join(lines)
        (folder / f'{name}.py').write_text(
            'from ml_collections import ConfigDict\n\n\ndef get_config():\n    config = ConfigDict()\n'
            f'    {body}\n    return config\n'
        )
    rng, words = np.random.default_rng(0), ('the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog')
    for name, count in (('train', 40), ('eval', 8)):
        texts = [' '.join(rng.choice(words, 12)) for _ in range(count)]
        lines = [json.dumps({'text': text, 'prompt': text[:10], 'completion': text[10:20]}) for text in texts]
        (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)


def run(recipe: str, workdir: str, *words: str) -> int:
    return main.main(['jaxtune', f'--config={recipe}.py', f'--workdir={workdir}', *words])


def tensors(file: pathlib.Path) -> dict[str, bytes]:
    return {name: entry.read().tobytes() for name, entry in read_header(file).items()}


def metrics(workdir: pathlib.Path, name: str) -> list[float]:
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize('kind', RECIPES)
def test_trains_resumes_bit_for_bit_reports_and_exports(place, kind):
    assert run(kind, f'{kind}-whole', f'--config.train.steps={STEPS}') == 0
    assert run(kind, f'{kind}-cut', '--config.train.steps=2') == 0
    assert run(kind, f'{kind}-cut', f'--config.train.steps={STEPS}') == 0
    whole, cut = place / f'{kind}-whole', place / f'{kind}-cut'
    assert tensors(whole / 'export' / 'model.safetensors') == tensors(cut / 'export' / 'model.safetensors')
    assert metrics(whole, 'train/loss') == metrics(cut, 'train/loss')
    assert (whole / 'report.html').is_file()
    result = json.loads((whole / 'result.json').read_text())
    assert (result['status'], result['step']) == ('done', STEPS)
    if kind == 'objective':
        losses = metrics(whole, 'train/loss')
        assert losses[-1] < losses[0]
        assert metrics(whole, 'train/confidence')[-1] > metrics(whole, 'train/confidence')[0]
        assert 'eval/confidence' in result['metrics']
    if kind == 'algorithm':
        assert result['task'] == 'rloo'
        assert len(metrics(whole, 'rloo/reward')) == STEPS
        assert 'rloo/reward' in (whole / 'report.html').read_text()


def test_the_methods_adapter_is_one_that_peft_loads_and_that_loads_here_again(place):
    peft, torch = pytest.importorskip('peft'), pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    assert run('method', 'adapted', f'--config.train.steps={STEPS}') == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(place / 'adapted' / 'base')
    ids = torch.tensor([list(b'the quick brown fox')])
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(place / 'adapted' / 'export')(ids).logits
        plain = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, place / 'adapted' / 'adapter').eval()(ids).logits
    assert (merged - plain).abs().max() > 1e-3
    np.testing.assert_allclose(theirs.numpy(), merged.numpy(), atol=1e-5)
    words = ['--config.task=evaluate', '--config.tokenizer.path=']
    assert run('method', 'scored', '--config.model.path=adapted/adapter', *words) == 0
    again = json.loads((place / 'scored' / 'result.json').read_text())['metrics']['eval/loss']
    before = json.loads((place / 'adapted' / 'result.json').read_text())['metrics']['eval/loss']
    assert again == pytest.approx(before, rel=1e-5)


def test_what_is_no_plugin_is_said_in_a_line(place, capsys):
    for recipe, words in (
        ('objective', ('--config.objective=own_plugins:METHOD', 'expected a jaxtune Objective, found Method')),
        ('objective', ('--config.objective=own_plugins:GONE', "has no 'GONE'")),
        ('method', ('--config.method.name=gone:METHOD', 'method.name=gone:METHOD')),
    ):
        flag, said = words
        assert run(recipe, 'refused', flag) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count('\n') == 1
