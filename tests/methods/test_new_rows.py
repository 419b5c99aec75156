"""What new rows begin as, whose they are, where they come from, and what is refused."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from added_tokens import (
    KINDS,
    METHODS,
    NAMES,
    ROWS,
    bundle_of,
    by_end,
    ids_of,
    keys_of,
    logits,
    run,
    tensors,
    torch_base,
    torch_logits,
)

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'trainer'))

from runs import SENTENCE, full_config, metrics, recipe, train

from jaxtune.data import Tokens
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.generation.generator import end_of_answer
from jaxtune.methods import apply, peft
from jaxtune.models.model import leaf_paths
from jaxtune.objectives.cross_entropy import cross_entropy
from jaxtune.parallel import AXES, make_mesh
from jaxtune.recipe.flags import Command
from jaxtune.tasks import compile as compile_task
from jaxtune.tasks import generate, preflight, prepare, rewarded, specs
from jaxtune.weights import NewRows, tree

torch = pytest.importorskip('torch')
theirs = pytest.importorskip('peft')
torch.set_num_threads(1)


@pytest.mark.parametrize('kind', ['untied', 'bert', 't5', 'padded'])
@pytest.mark.parametrize('method', ['lora', 'full'])
def test_rows_begin_as_means(kind, method, token_bases):
    """Of all old rows, or of those of the description's tokens; in the table, and a head of its own. A bias: of all."""
    described = (('<search>', 'look it up'), ('<plain>', ''), ('<eos>', 'known'), ('<call>', '<search>'))
    keys = {'model.path': str(token_bases(kind)), 'tokenizer.add': described, 'data.seq_len': 64}
    keys |= METHODS[method] | {'objective': KINDS[kind][3]}
    bundle = bundle_of('train', **keys)
    assert bundle.tokenizer('<search><plain><call>', add_special_tokens=False).input_ids == [ROWS, ROWS + 1, ROWS + 2]
    letters, brackets = list(b'look it up'), list(b'<search>')
    before, found = tensors(token_bases(kind)), 0
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


def halves(token_bases, token_texts):
    bundle = bundle_of('train', **keys_of(token_bases, token_texts, 'untied', 'lora'))
    method = specs.method(full_config(METHODS['lora'])).method
    return *apply.partition(method, bundle.params, frozenset()), bundle


def test_gradients_are_of_the_rows_alone(token_bases, token_texts):
    trainable, frozen, bundle = halves(token_bases, token_texts)
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
def test_what_peft_saves_is_read_here(kind, indices, rows, token_bases, tmp_path):
    torch.manual_seed(1)
    settings = {'r': 2, 'target_modules': ['q' if kind == 't5' else 'q_proj'], 'trainable_token_indices': indices}
    model = theirs.get_peft_model(torch_base(token_bases(kind), kind, rows), theirs.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'tokens_delta' in name or 'lora_B' in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    ours = bundle_of(**{'model.path': str(token_bases(kind)), 'method.path': str(tmp_path)})
    ids = np.asarray([[1, 5, 17, 99, 100, 256, *range(ROWS, rows or ROWS), 7]], np.int32)
    np.testing.assert_allclose(logits(ours, ids), torch_logits(model, ids), rtol=1e-4, atol=1e-4)


def test_rows_of_another_base_are_refused(token_bases, tmp_path):
    settings = {'r': 2, 'target_modules': ['q_proj'], 'trainable_token_indices': {'model.embed_tokens': [259, 261]}}
    model = theirs.get_peft_model(torch_base(token_bases('tied'), 'tied', 262), theirs.LoraConfig(**settings))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    asked = {'model.path': str(token_bases('tied')), 'method.path': str(tmp_path)}
    with pytest.raises(UserError, match=r'its base had rows for the tokens \[260\], which neither 259 rows here'):
        bundle_of(**asked)
    config = json.loads((tmp_path / peft.CONFIG).read_text())
    for wrong, said in {'x': 'a list of token ids', (1, 1): 'each token once', (1,): r'expected \[1, 32\]'}.items():
        indices = list(wrong) if isinstance(wrong, tuple) else wrong
        (tmp_path / peft.CONFIG).write_text(json.dumps(config | {'trainable_token_indices': indices}))
        with pytest.raises(UserError, match=said):
            bundle_of(**asked)


def test_what_was_trained_with_them_goes_on_without_new_rows(token_bases, token_texts, tmp_path):
    keys = keys_of(token_bases, token_texts, 'tied', 'full', **{'train.steps': 2})
    train(keys, tmp_path / 'first')
    further = keys | {'model.path': str(tmp_path / 'first')}
    begun = bundle_of('train', **further)
    assert begun.model.config.vocab_size == ROWS + len(NAMES)
    was = tensors(tmp_path / 'first' / 'export')['model.embed_tokens.weight']
    np.testing.assert_array_equal(np.asarray(begun.params['embed_tokens']['embedding']), was)


def test_a_recipe_is_checked_and_compiled_with_them(token_bases, token_texts, tmp_path):
    keys = keys_of(token_bases, token_texts, 'untied', 'lora')
    config = full_config(keys)
    said = preflight.check(Command('recipe.py', tmp_path / 'run', False, {'': config}, ('jaxtune',), check=True))
    assert '267 tokens' in said
    config = full_config(keys | {'task': 'compile', 'data.train': '', 'data.eval': '', 'mesh.data': 8})
    (tmp_path / 'compile').mkdir()
    compile_task.run(config, tmp_path / 'compile', Command('recipe.py', tmp_path, False, {'': config}, ('jaxtune',)))
    facts = json.loads((tmp_path / 'compile' / 'run.json').read_text())
    assert facts['model']['trainable'] == sum(
        leaf.size for leaf in jax.tree.leaves(halves(token_bases, token_texts)[0])
    )


def test_marks_of_a_chat_template_end_answers(token_bases, token_texts, tmp_path):
    """The two tokens of ChatML, added to a base model: they are whole, are trained on, and end what it writes."""
    keys = keys_of(token_bases, token_texts, 'tied', 'lora', **{'train.steps': 2, 'data.template': 'chatml'})
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


def test_preferences_and_rewards_learn_them(token_bases, tmp_path):
    """A reference that a recipe names gets the same rows: training begins at it. The sampler draws new tokens too."""
    data = tmp_path / 'pairs.jsonl'
    pair = {'prompt': f'the {NAMES[0]}', 'chosen': f' fox {NAMES[1]}', 'rejected': f' dog {NAMES[2]}'}
    data.write_text((json.dumps(pair) + '\n') * 16)
    keys = keys_of(token_bases, tmp_path, 'untied', 'lora', **{'train.steps': 3, 'optimizer.warmup_steps': 0})
    keys |= {'data.train': str(data), 'data.eval': ''}
    train(keys | {'objective': 'dpo', 'dpo.reference': str(token_bases('untied'))}, tmp_path / 'dpo')
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
    before, after = tensors(token_bases('untied')), tensors(tmp_path / 'grpo' / 'export')
    for name in ('lm_head.weight', 'model.embed_tokens.weight'):
        assert after[name][:ROWS].tobytes() == before[name].tobytes()
        assert (after[name][ROWS:] != before[name].mean(0)).any()


def test_from_scratch_the_vocabulary_counts_them(token_texts, tmp_path):
    keys = recipe(token_texts, train__steps=2) | {'tokenizer.add': (('<a>', ''), ('<b>', 'a text'))}
    keys['model.config'] = keys['model.config'] | {'vocab_size': 260}
    with pytest.raises(UserError, match=r'model\.config\.vocab_size=260: expected >= 261'):
        train(keys, tmp_path / 'a')
    del keys['model.config']['vocab_size']
    train(keys, tmp_path / 'b')
    assert json.loads((tmp_path / 'b' / 'export' / 'config.json').read_text())['vocab_size'] == 320
    assert tokenizers.load(str(tmp_path / 'b' / 'export'))('<b>').input_ids == [260]


@pytest.mark.parametrize('steps', [{}, {'data.steps.clean.unicode': True}], ids=['streamed', 'by steps'])
def test_preparing_gives_them_to_the_tokenizer(steps, token_texts, tmp_path):
    if steps:
        pytest.importorskip('datatrove')
    keys = {'data.train': str(token_texts / 'train.jsonl'), 'data.vocab_size': 300, 'data.eval_fraction': 0.0} | steps
    run(prepare, tmp_path, **keys, **{'tokenizer.add': ((NAMES[0], 'a tool'), (NAMES[1], ''))})
    tokenizer = tokenizers.load(str(tmp_path / 'tokenizer'))
    ids = tokenizer(f'the{NAMES[0]}{NAMES[1]}').input_ids
    assert ids[-2:] == [len(tokenizer) - 2, len(tokenizer) - 1]
    tokens = Tokens.open(tmp_path / 'train')
    held = set(np.concatenate([tokens.document(i) for i in range(tokens.documents)]).tolist())
    assert set(ids[-2:]) <= held


def test_what_cannot_be_is_one_line(token_bases, token_texts, tmp_path):
    keys = keys_of(token_bases, token_texts, 'untied', 'lora')
    with pytest.raises(UserError, match=r'method\.targets: model\.embed_tokens is adapted.*tokenizer\.add'):
        bundle_of('train', **keys | {'method.targets': 'embed_tokens,q_proj'})
    with pytest.raises(UserError, match=r'tokenizer\.add: method\.name=prompt'):
        bundle_of('train', **keys | {'method.name': 'prompt'})
    bundle = bundle_of('train', **keys)
    assert bundle.tokenizer.get_added_vocab()[NAMES[0]] == ROWS


def test_a_text_with_a_token_that_has_no_row_is_refused_where_it_stands(token_bases, token_texts, tmp_path, capsys):
    """The tokens are the tokenizer's, and the model has no rows for them: fine until a text holds one."""
    keys = keys_of(token_bases, token_texts, 'tied', 'lora', **{'train.steps': 1})
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
