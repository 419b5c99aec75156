"""Added tokens through the trainer: old rows stay, new ones train; what is left loads in `transformers` and PEFT."""

import json
import pathlib
import random
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'trainer'))

from runs import SENTENCE, exported, full_config, metrics, recipe, start, train, write_recipe

from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.generation.generator import end_of_answer
from jaxtune.methods import apply, peft
from jaxtune.models.model import leaf_paths
from jaxtune.models.safetensors import read_header
from jaxtune.objectives.cross_entropy import cross_entropy
from jaxtune.parallel import AXES, make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.recipe.flags import Command
from jaxtune.tasks import compile as compile_task
from jaxtune.tasks import evaluate, export, generate, preflight, rewarded, specs
from jaxtune.weights import NewRows, tree

torch = pytest.importorskip('torch')
theirs = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')
torch.set_num_threads(1)

NAMES = tuple(f'<tool_{letter}>' for letter in 'abcdefgh')
ROWS = 259  # of the byte tokenizer, and of the models: no room for another
_BERT = {
    'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'max_position_embeddings': 128,
}  # fmt: skip
_LLAMA = _BERT | {'num_key_value_heads': 2}
_T5 = {'d_model': 32, 'd_kv': 8, 'd_ff': 64, 'num_layers': 2, 'num_heads': 4, 'decoder_start_token_id': 0}
# A model's type and fields, its class, and the objective that trains it here.
KINDS = {
    'tied': ('llama', _LLAMA | {'tie_word_embeddings': True}, 'AutoModelForCausalLM', 'causal_lm'),
    'untied': ('llama', _LLAMA | {'tie_word_embeddings': False}, 'AutoModelForCausalLM', 'causal_lm'),
    'padded': ('llama', _LLAMA | {'vocab_size': 320, 'tie_word_embeddings': True}, 'AutoModelForCausalLM', 'causal_lm'),
    'bert': ('bert', _BERT, 'AutoModelForMaskedLM', 'masked_lm'),
    'padded bert': ('bert', _BERT | {'vocab_size': 320}, 'AutoModelForMaskedLM', 'masked_lm'),
    't5': ('t5', _T5, 'AutoModelForSeq2SeqLM', 'seq2seq'),
}
METHODS = {
    'lora': {'method.name': 'lora', 'method.rank': 4},
    'qlora': {'method.name': 'qlora', 'method.rank': 4},
    'adapter': {'method.name': 'adapter', 'method.bottleneck': 8},
    'full': {'method.name': 'full'},
}


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    """A folder of each kind with the byte tokenizer, made at its first use."""
    made = {}

    def make(kind):
        if kind not in made:
            model_type, fields, auto, _ = KINDS[kind]
            fields = {'vocab_size': ROWS, 'pad_token_id': 256, 'eos_token_id': 257, 'bos_token_id': None} | fields
            torch.manual_seed(0)
            model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(model_type, **fields))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(0.3 * torch.randn_like(parameter) + ('norm' in name.lower()) * parameter)
            made[kind] = tmp_path_factory.mktemp('bases') / kind
            model.save_pretrained(made[kind])
            tokenizers.load('bytes').save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> pathlib.Path:
    """Texts that hold the new tokens."""
    folder = tmp_path_factory.mktemp('corpus')
    rng, vocabulary = random.Random(0), [*SENTENCE.split(), *NAMES]
    for name, documents in (('train', 40), ('eval', 6)):
        texts = [' '.join(rng.choice(vocabulary) for _ in range(12)) for _ in range(documents)]
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return folder


def keys_of(bases, corpus, kind, method, **changes):
    objective = KINDS[kind][3]
    keys = recipe(corpus, objective, train__steps=8, checkpoint__every=3, **METHODS[method] | changes)
    del keys['model.config'], keys['tokenizer.path']
    return keys | {'model.path': str(bases(kind)), 'tokenizer.add': tuple((name, '') for name in NAMES)}


def tensors(folder):
    return {name: entry.read() for name, entry in read_header(next(folder.glob('*.safetensors'))).items()}


def bundle_of(task='generate', **keys):
    config = full_config({'task': task, **keys})
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return load_model(specs.model_spec(config), mesh)


def ids_of(tokenizer):
    text = f'the {NAMES[0]} quick {NAMES[7]}{NAMES[3]} brown fox {NAMES[5]}'
    return np.asarray([tokenizer(text).input_ids], np.int32)


def logits(bundle, ids):
    batch = {'tokens': ids} | ({'decoder_tokens': ids} if bundle.model.kind == 'encdec' else {})
    return np.asarray(bundle.model.logits(bundle.params, bundle.model.apply(bundle.params, batch).hidden))


def torch_logits(model, ids):
    ids = torch.from_numpy(ids).long()
    further = {'decoder_input_ids': ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **further).logits.numpy()


def torch_base(folder, kind, rows=None):
    model = getattr(transformers, KINDS[kind][2]).from_pretrained(folder)
    if rows:
        model.resize_token_embeddings(rows)
    return model


def run(task, workdir, **keys):
    config = full_config({'task': task.__name__.rsplit('.', 1)[-1], 'data.seq_len': 64, 'mesh.data': 8, **keys})
    workdir.mkdir(parents=True, exist_ok=True)
    return task.run(config, workdir, Command('recipe.py', workdir, False, {'': config}, ('jaxtune',)))


CASES = [('tied', 'lora'), ('untied', 'lora'), ('padded', 'lora'), ('t5', 'lora'), ('bert', 'lora')]
CASES += [('padded bert', 'lora'), ('tied', 'qlora'), ('untied', 'full'), ('bert', 'full'), ('untied', 'adapter')]


@pytest.fixture(scope='module', params=CASES, ids=lambda case: '-'.join(case).replace(' ', '_'))
def trained(request, bases, corpus, tmp_path_factory):
    """`(kind, method, keys, workdir)` of a run that ended."""
    kind, method = request.param
    keys, workdir = keys_of(bases, corpus, kind, method), tmp_path_factory.mktemp(f'{kind}-{method}')
    train(keys, workdir)
    return kind, method, keys, workdir


def rows_of(kind):
    """How many a trained model has."""
    return 320 if 'padded' in kind else ROWS + len(NAMES)


def by_end(values, name):
    """The tensor of a folder that another calls by a longer or shorter name."""
    return next(value for other, value in values.items() if other.split('.')[-2:] == name.split('.')[-2:])


def test_old_rows_stay_and_new_ones_learn(trained, bases):
    kind, method, _, workdir = trained
    losses = metrics(workdir, 'train/loss')
    assert losses[-1] < losses[0]
    if method == 'adapter':
        assert not (workdir / 'export').exists()
        before, after = tensors(bases(kind)), tensors(workdir / 'adapter')
        rows = [value for name, value in after.items() if name.endswith('token_adapter.trainable_tokens_delta')]
        assert [value.shape for value in rows] == [(8, 32), (8, 32)]
        starts = [before[name][:ROWS].mean(0) for name in ('lm_head.weight', 'model.embed_tokens.weight')]
        assert all((np.abs(new - start).max(1) > 1e-3).all() for new, start in zip(rows, starts, strict=True))
        return
    before, after = tensors(bases(kind)), tensors(workdir / 'export')
    tables = [name for name, value in after.items() if value.shape == (rows_of(kind), 32)]
    assert len(tables) == 1 + (kind == 'untied')
    for name in tables:
        was, now = by_end(before, name), after[name]
        new = now[ROWS : ROWS + len(NAMES)]
        assert (np.abs(new - was[:ROWS].mean(0)).max(1) > 1e-3).all()
        if method == 'full':
            assert not np.array_equal(now[:ROWS], was[:ROWS])
            continue
        assert now[:ROWS].tobytes() == was[:ROWS].tobytes()
        assert now[ROWS + len(NAMES) :].tobytes() == was[ROWS + len(NAMES) :].tobytes()
    if 'bert' in kind and method == 'lora':  # a bias does not train, and what it begins as is the old one's mean
        was, now = (by_end(values, 'predictions.bias') for values in (before, after))
        assert now[:ROWS].tobytes() == was[:ROWS].tobytes()
        np.testing.assert_allclose(now[ROWS : ROWS + len(NAMES)], was[:ROWS].mean(), rtol=1e-5)


def test_the_export_loads_in_transformers_with_equal_logits(trained):
    kind, method, _, workdir = trained
    if method == 'adapter':
        pytest.skip('not merged')
    ours = bundle_of(**{'model.path': str(workdir)})
    tokenizer = transformers.AutoTokenizer.from_pretrained(workdir / 'export')
    ids = ids_of(tokenizer)
    assert ids_of(ours.tokenizer).tolist() == ids.tolist()
    assert {ROWS, ROWS + 7, ROWS + 3, ROWS + 5} < set(ids[0].tolist())
    model = torch_base(workdir / 'export', kind)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == rows_of(kind)
    np.testing.assert_allclose(torch_logits(model, ids), logits(ours, ids), rtol=1e-4, atol=1e-4)


def test_the_adapter_is_read_here_and_in_peft(trained, bases, tmp_path):
    kind, method, keys, workdir = trained
    if method == 'full':
        pytest.skip('has none')
    # Nothing names the tokens: the adapter and the tokenizer beside it tell.
    ours = bundle_of(**{'model.path': str(workdir / 'adapter')})
    again = bundle_of(**{'model.path': keys['model.path'], 'method.path': str(workdir)})
    ids = ids_of(ours.tokenizer)
    found = logits(ours, ids)
    assert found.shape[-1] == rows_of(kind)
    np.testing.assert_array_equal(logits(again, ids), found)
    if method == 'adapter':
        return
    if method == 'lora':
        merged = bundle_of(**{'model.path': str(workdir)})
        np.testing.assert_allclose(found, logits(merged, ids), rtol=1e-4, atol=1e-4)
        run(export, tmp_path, **{'model.path': str(workdir / 'adapter')})
        for name, value in tensors(tmp_path / 'export').items():
            np.testing.assert_allclose(value, tensors(workdir / 'export')[name], rtol=1e-5, atol=1e-6)
    if method == 'qlora' or 'bert' in kind:
        return  # on a base of 32 bits here; and PEFT leaves out the bias of a head that it wraps
    text = (workdir / 'adapter' / 'README.md').read_text()
    line = f'model.resize_token_embeddings({rows_of(kind)})'
    assert (line in text) == (kind != 'padded')
    base = torch_base(bases(kind), kind, None if kind == 'padded' else rows_of(kind))
    theirs_ = theirs.PeftModel.from_pretrained(base, workdir / 'adapter')
    np.testing.assert_allclose(torch_logits(theirs_, ids), found, rtol=1e-4, atol=1e-4)


def test_evaluating_and_writing_need_no_key(trained, corpus, tmp_path):
    kind, method, keys, workdir = trained
    scored = metrics(workdir, 'eval/loss')[-1]
    same = ('objective', 'data.eval', 'data.seq_len', 'data.source_key', 'data.target_key', 'data.target_len')
    data = {name: keys[name] for name in same if name in keys} | {'eval.batch_size': 16}
    found = run(evaluate, tmp_path / 'a', **data, **{'model.path': str(workdir)})['metrics']['eval/loss']
    assert found == pytest.approx(scored, rel=1e-4)
    if method in ('lora', 'adapter'):
        asked = {'model.path': keys['model.path'], 'method.path': str(workdir / 'adapter')}
        found = run(evaluate, tmp_path / 'b', **data, **asked)['metrics']['eval/loss']
        assert found == pytest.approx(scored, rel=1e-4)
    if 'bert' in kind:
        return
    asked = {'generate.max_new_tokens': 8, 'generate.prompts': 2, 'generate.temperature': 0.0}
    asked |= {'data.eval': str(corpus / 'eval.jsonl')}
    asked |= {'generate.prompt_tokens': 12} if kind != 't5' else {'data.source_key': 'text', 'data.target_key': 'text'}
    run(generate, tmp_path / 'c', **{'model.path': str(workdir)}, **asked)
    lines = [json.loads(line) for line in (tmp_path / 'c' / 'samples.jsonl').read_text().splitlines()]
    assert len(lines) == 2


def test_an_adapter_goes_on_with_its_rows_and_gets_further_ones(trained, bases, corpus, tmp_path):
    kind, method, keys, workdir = trained
    if (kind, method) not in (('tied', 'lora'), ('padded', 'lora'), ('untied', 'adapter')):
        pytest.skip('one of each is enough')
    begun = bundle_of('train', **keys | {'method.path': str(workdir), 'tokenizer.add': (('<more>', NAMES[2]),)})
    rows = {path: leaf for path, leaf in leaf_paths(begun.params).items() if isinstance(leaf, NewRows)}
    saved = leaf_paths(bundle_of(**{'model.path': str(workdir / 'adapter')}).params)
    for path, leaf in rows.items():
        assert leaf.ids == tuple(range(ROWS, ROWS + len(NAMES) + 1))
        np.testing.assert_array_equal(leaf.rows[:8], saved[path].rows)
    losses = metrics(workdir, 'train/loss')
    train(keys | {'method.path': str(workdir), 'train.steps': 2}, tmp_path)
    assert metrics(tmp_path, 'train/loss')[0] < losses[0] - 0.3


def test_eight_devices_train_as_one(trained, tmp_path):
    kind, method, keys, workdir = trained
    if kind not in ('tied', 'untied') or method != 'lora':
        pytest.skip('of a tied and an untied model')
    train(keys, tmp_path / 'eight', (1, 2, 2, 2))
    for name in ('train/loss', 'eval/loss'):
        np.testing.assert_allclose(metrics(tmp_path / 'eight', name), metrics(workdir, name), rtol=1e-4)
    one, eight = (tensors(folder / 'adapter') for folder in (workdir, tmp_path / 'eight'))
    for name, value in one.items():
        np.testing.assert_allclose(eight[name], value, rtol=1e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize('kind', ['tied', 'untied'])
def test_a_killed_run_ends_with_the_same_bytes(kind, bases, corpus, tmp_path):
    keys = keys_of(bases, corpus, kind, 'lora', **{'train.steps': 40, 'checkpoint.every': 5})
    path = write_recipe(tmp_path / 'recipe.py', keys)

    def ended(workdir):
        process = start(path, workdir)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors

    ended(tmp_path / 'whole')
    killed = start(path, tmp_path / 'killed')
    while not any((tmp_path / 'killed' / 'checkpoints').glob('5*')):
        assert killed.poll() is None, killed.communicate()[1]
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (tmp_path / 'killed' / 'result.json').exists()
    run(export, tmp_path / 'early', **{'model.path': str(tmp_path / 'killed')})  # of its newest checkpoint
    assert json.loads((tmp_path / 'early' / 'export' / 'config.json').read_text())['vocab_size'] == ROWS + len(NAMES)
    ended(tmp_path / 'killed')
    assert exported(tmp_path / 'killed') == exported(tmp_path / 'whole')
    one, other = ((tmp_path / name / 'adapter' / peft.WEIGHTS).read_bytes() for name in ('whole', 'killed'))
    assert one == other
    assert metrics(tmp_path / 'killed', 'train/loss') == metrics(tmp_path / 'whole', 'train/loss')


@pytest.mark.parametrize('kind', ['untied', 'bert', 't5', 'padded'])
@pytest.mark.parametrize('method', ['lora', 'full'])
def test_rows_begin_as_means(kind, method, bases):
    """Of all old rows, or of those of the description's tokens; in the table, and a head of its own. A bias: of all."""
    described = (('<search>', 'look it up'), ('<plain>', ''), ('<eos>', 'known'), ('<call>', '<search>'))
    keys = {'model.path': str(bases(kind)), 'tokenizer.add': described, 'data.seq_len': 64}
    keys |= METHODS[method] | {'objective': KINDS[kind][3]}
    bundle = bundle_of('train', **keys)
    assert bundle.tokenizer('<search><plain><call>', add_special_tokens=False).input_ids == [ROWS, ROWS + 1, ROWS + 2]
    letters, brackets = list(b'look it up'), list(b'<search>')
    before, found = tensors(bases(kind)), 0
    for path, leaf in leaf_paths(bundle.params).items():
        if path.rsplit('/', 1)[-1] not in ('embedding', 'kernel', 'bias') or not path.startswith(
            ('embed_tokens', 'shared', 'lm_head/kernel', 'lm_head/decoder', 'lm_head/bias')
        ):
            continue
        found += 1
        name = bundle.model.tensors[path].name
        was = before.get(name, before.get(name.removeprefix('model.')))
        was = by_end(before, name) if was is None else was
        assert isinstance(leaf, NewRows) == (method == 'lora' and not path.endswith('bias'))
        now = np.asarray(leaf.materialise() if isinstance(leaf, NewRows) else leaf)
        now = now.T if path.endswith('kernel') else now
        expected = np.stack([was[letters].mean(0), was[:ROWS].mean(0), was[brackets].mean(0)])
        expected = was.mean() if path.endswith('bias') else expected
        np.testing.assert_allclose(now[ROWS : ROWS + 3], expected, rtol=1e-5, atol=1e-6)
        assert now[:ROWS].tobytes() == was[:ROWS].tobytes()
    assert found == (2 if kind in ('untied', 'bert') else 1)


def halves(bases, corpus):
    bundle = bundle_of('train', **keys_of(bases, corpus, 'untied', 'lora'))
    method = specs.method(full_config(METHODS['lora'])).method
    return *apply.partition(method, bundle.params, frozenset()), bundle


def test_gradients_are_of_the_rows_alone(bases, corpus):
    trainable, frozen, bundle = halves(bases, corpus)
    paths = tree.paths(trainable)
    assert [path for path in paths if 'layers' not in path] == ['embed_tokens/embedding/rows', 'lm_head/kernel/rows']
    assert 'embed_tokens/embedding/base' in tree.paths(frozen)

    ids = jnp.asarray(ids_of(bundle.tokenizer))

    def loss(trainable):
        params = tree.combine(trainable, frozen)
        hidden = bundle.model.apply(params, {'tokens': ids[:, :-1]}).hidden
        weights = jnp.ones(ids[:, 1:].shape, jnp.float32)
        return cross_entropy(hidden, bundle.model.head(params), ids[:, 1:], weights)[0]

    def plain(trainable):
        params = tree.combine(trainable, frozen)
        hidden = bundle.model.apply(params, {'tokens': ids[:, :-1]}).hidden
        found = jax.nn.log_softmax(bundle.model.logits(params, hidden))
        return -jnp.take_along_axis(found, ids[:, 1:, None], axis=-1).sum()

    made, wanted = jax.grad(loss)(trainable), jax.grad(plain)(trainable)
    for path in ('embed_tokens', 'lm_head'):
        (one,), (other,) = jax.tree.leaves(made[path]), jax.tree.leaves(wanted[path])
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
        assert (np.abs(one).max(1) > 0).any()
    # No gradient `[vocab, d_model]` of a head that stays is ever made.
    program = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    assert 'f32[8,32]' in program
    assert not [line for line in program.splitlines() if 'dot_general' in line and f'f32[32,{ROWS + 8}]' in line]


@pytest.mark.parametrize(
    ('kind', 'indices', 'rows'),
    [
        ('tied', {'model.embed_tokens': [266, 260, 261, 262, 263, 264, 265, 259]}, 267),
        ('untied', {'model.embed_tokens': [17, 259, 260], 'lm_head': [259, 260]}, 261),
        ('untied', [5, 99], None),
        ('tied', [262, 100], 263),  # of the others PEFT keeps the resized table's rows
        ('t5', {'shared': [259, 260]}, 261),
    ],
)
def test_what_peft_saves_is_read_here(kind, indices, rows, bases, tmp_path):
    torch.manual_seed(1)
    settings = {'r': 2, 'target_modules': ['q' if kind == 't5' else 'q_proj'], 'trainable_token_indices': indices}
    model = theirs.get_peft_model(torch_base(bases(kind), kind, rows), theirs.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'tokens_delta' in name or 'lora_B' in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    ours = bundle_of(**{'model.path': str(bases(kind)), 'method.path': str(tmp_path)})
    ids = np.asarray([[1, 5, 17, 99, 100, 256, *range(ROWS, rows or ROWS), 7]], np.int32)
    np.testing.assert_allclose(logits(ours, ids), torch_logits(model, ids), rtol=1e-4, atol=1e-4)


def test_rows_of_another_base_are_refused(bases, tmp_path):
    settings = {'r': 2, 'target_modules': ['q_proj'], 'trainable_token_indices': {'model.embed_tokens': [259, 261]}}
    model = theirs.get_peft_model(torch_base(bases('tied'), 'tied', 262), theirs.LoraConfig(**settings))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    asked = {'model.path': str(bases('tied')), 'method.path': str(tmp_path)}
    with pytest.raises(UserError, match=r'its base had rows for the tokens \[260\], which neither 259 rows here'):
        bundle_of(**asked)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    for wrong, said in {'x': 'a list of token ids', (1, 1): 'each token once', (1,): r'expected \[1, 32\]'}.items():
        indices = list(wrong) if isinstance(wrong, tuple) else wrong
        (tmp_path / peft.CONFIG).write_text(json.dumps(config | {'trainable_token_indices': indices}))
        with pytest.raises(UserError, match=said):
            bundle_of(**asked)


def test_what_was_trained_with_them_goes_on_without_new_rows(bases, corpus, tmp_path):
    keys = keys_of(bases, corpus, 'tied', 'full', **{'train.steps': 2})
    train(keys, tmp_path / 'first')
    further = keys | {'model.path': str(tmp_path / 'first')}
    begun = bundle_of('train', **further)
    assert begun.model.config.vocab_size == ROWS + len(NAMES)
    was = tensors(tmp_path / 'first' / 'export')['model.embed_tokens.weight']
    np.testing.assert_array_equal(np.asarray(begun.params['embed_tokens']['embedding']), was)


def test_a_recipe_is_checked_and_compiled_with_them(bases, corpus, tmp_path):
    keys = keys_of(bases, corpus, 'untied', 'lora')
    config = full_config(keys)
    said = preflight.check(Command('recipe.py', tmp_path / 'run', False, {'': config}, ('jaxtune',), check=True))
    assert '267 tokens' in said
    config = full_config(keys | {'task': 'compile', 'data.train': '', 'data.eval': '', 'mesh.data': 8})
    (tmp_path / 'compile').mkdir()
    compile_task.run(config, tmp_path / 'compile', Command('recipe.py', tmp_path, False, {'': config}, ('jaxtune',)))
    facts = json.loads((tmp_path / 'compile' / 'run.json').read_text())
    assert facts['model']['trainable'] == sum(leaf.size for leaf in jax.tree.leaves(halves(bases, corpus)[0]))


def test_marks_of_a_chat_template_end_answers(bases, corpus, tmp_path):
    """The two tokens of ChatML, added to a base model: they are whole, are trained on, and end what it writes."""
    keys = keys_of(bases, corpus, 'tied', 'lora', **{'train.steps': 2, 'data.template': 'chatml'})
    turns = [{'role': 'user', 'content': 'the quick'}, {'role': 'assistant', 'content': 'brown fox'}]
    data = tmp_path / 'chats.jsonl'
    data.write_text((json.dumps({'messages': turns}) + '\n') * 16)
    keys |= {'data.train': str(data), 'data.eval': '', 'objective': 'sft'}
    keys |= {'tokenizer.add': (('<|im_start|>', 'user:'), ('<|im_end|>', ''))}
    train(keys, tmp_path / 'run')
    values = json.loads((tmp_path / 'run' / 'export' / 'generation_config.json').read_text())
    assert values['eos_token_id'] == [257, 260]
    bundle = bundle_of(**{'model.path': str(tmp_path / 'run' / 'adapter')})
    assert end_of_answer(bundle.tokenizer) == [260]


def test_preferences_and_rewards_learn_them(bases, tmp_path):
    """A reference that a recipe names gets the same rows: training begins at it. The sampler draws new tokens too."""
    data = tmp_path / 'pairs.jsonl'
    pair = {'prompt': f'the {NAMES[0]}', 'chosen': f' fox {NAMES[1]}', 'rejected': f' dog {NAMES[2]}'}
    data.write_text((json.dumps(pair) + '\n') * 16)
    keys = keys_of(bases, tmp_path, 'untied', 'lora', **{'train.steps': 3, 'optimizer.warmup_steps': 0})
    keys |= {'data.train': str(data), 'data.eval': ''}
    train(keys | {'objective': 'dpo', 'dpo.reference': str(bases('untied'))}, tmp_path / 'dpo')
    losses = metrics(tmp_path / 'dpo', 'train/loss')
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5)
    assert losses[-1] < losses[0]
    data = tmp_path / 'prompts.jsonl'
    data.write_text((json.dumps({'prompt': pair['prompt'], 'completion': ''}) + '\n') * 16)
    keys |= {'task': 'grpo', 'data.train': str(data), 'data.format': 'prompt', 'rl.reward': 'scores:letters'}
    keys |= {'rl.rollouts': 16, 'rl.group': 4, 'rl.epochs': 1, 'generate.batch_size': 16, 'generate.max_new_tokens': 12}
    config, mesh = full_config(keys), make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    (tmp_path / 'grpo').mkdir()
    with jax.set_mesh(mesh):
        command = Command('recipe.py', tmp_path / 'grpo', False, {'': config}, ('jaxtune',))
        trainer, first_lines, last_lines = rewarded.open_trainer(config, tmp_path / 'grpo', mesh, command)
        trainer.run(first_lines, last_lines)
    before, after = tensors(bases('untied')), tensors(tmp_path / 'grpo' / 'export')
    for name in ('lm_head.weight', 'model.embed_tokens.weight'):
        assert after[name][:ROWS].tobytes() == before[name].tobytes()
        assert (after[name][ROWS:] != before[name].mean(0)).any()


def test_from_scratch_the_vocabulary_counts_them(corpus, tmp_path):
    keys = recipe(corpus, train__steps=2) | {'tokenizer.add': (('<a>', ''), ('<b>', 'a text'))}
    keys['model.config'] = keys['model.config'] | {'vocab_size': 260}
    with pytest.raises(UserError, match=r'model\.config\.vocab_size=260: expected >= 261'):
        train(keys, tmp_path / 'a')
    del keys['model.config']['vocab_size']
    train(keys, tmp_path / 'b')
    assert json.loads((tmp_path / 'b' / 'export' / 'config.json').read_text())['vocab_size'] == 320
    assert tokenizers.load(str(tmp_path / 'b' / 'export'))('<b>').input_ids == [260]


def test_what_cannot_be_is_one_line(bases, corpus, tmp_path):
    keys = keys_of(bases, corpus, 'untied', 'lora')
    with pytest.raises(UserError, match=r'method\.targets: model\.embed_tokens is adapted.*tokenizer\.add'):
        bundle_of('train', **keys | {'method.targets': 'embed_tokens,q_proj'})
    with pytest.raises(UserError, match=r'tokenizer\.add: method\.name=prompt'):
        bundle_of('train', **keys | {'method.name': 'prompt'})
    bundle = bundle_of('train', **keys)
    assert bundle.tokenizer.get_added_vocab()[NAMES[0]] == ROWS


def test_a_text_with_a_token_that_has_no_row_is_refused_where_it_stands(bases, corpus, tmp_path, capsys):
    """The tokens are the tokenizer's, and the model has no rows for them: fine until a text holds one."""
    keys = keys_of(bases, corpus, 'tied', 'lora', **{'train.steps': 1})
    tokenizer = tokenizers.load('bytes')
    tokenizers.add_tokens(tokenizer, keys.pop('tokenizer.add'))
    tokenizer.save_pretrained(tmp_path / 'tokenizer')
    keys['tokenizer.path'] = str(tmp_path / 'tokenizer')
    lines = [{'text': SENTENCE, 'prompt': 'the', 'completion': 'fox'} for _ in range(9)]
    clean = tmp_path / 'clean.jsonl'
    clean.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    texts = {'data.train': str(clean), 'data.eval': ''}
    train(keys | texts, tmp_path / 'clean')
    assert (
        "8 added tokens of the tokenizer, '<tool_a>' the first, have no row in the model of 259"
        in capsys.readouterr().out
    )
    lines[6] |= {'text': f'{SENTENCE} {NAMES[2]}', 'completion': NAMES[2]}
    held = tmp_path / 'held.jsonl'
    held.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    said = r"held\.jsonl:7: holds the token '<tool_c>' \(id 261\).*model of 259 rows.*tokenizer\.add"
    chats = {'objective': 'sft', 'data.format': 'prompt'}
    for name, changes in {'text': {}, 'chat': chats}.items():
        with pytest.raises(UserError, match=said):
            train(keys | texts | changes | {'data.train': str(held)}, tmp_path / name)
    asked = {'model.path': keys['model.path'], 'tokenizer.path': keys['tokenizer.path'], 'data.eval': str(held)}
    with pytest.raises(UserError, match=said):
        run(generate, tmp_path / 'generate', **asked, **{'generate.max_new_tokens': 2})
    # Named, they get rows, though the tokenizer knew them.
    named = {'data.train': str(held), 'tokenizer.add': ((NAMES[2], ''),)}
    train(keys | texts | named, tmp_path / 'named')
    assert json.loads((tmp_path / 'named' / 'export' / 'config.json').read_text())['vocab_size'] == 262
