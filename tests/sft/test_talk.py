"""Talking to a trained model: the chat, and the evaluation harness beside its own backend."""

import json
import runpy
import shutil
import subprocess
import sys
import types

import jax
import pytest

from jaxtune import chat, models
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.methods import lora, lora_peft
from jaxtune.models import hf
from jaxtune.pretrained.load import load_model
from jaxtune.recipe import recipes
from jaxtune.tasks import specs
from jaxtune.weights import tree


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small random model that writes bytes, with a chat template."""
    path = tmp_path_factory.mktemp('model') / 'small'
    fields = {'model_type': 'llama', 'vocab_size': 320, 'hidden_size': 32, 'intermediate_size': 64}
    fields |= {
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'max_position_embeddings': 256,
        'initializer_range': 0.2,
    }
    tokenizer = tokenizers.load('bytes')
    from jaxtune.data.templates import open_template

    tokenizer.chat_template = open_template('chatml', tokenizer).source
    model = models.build(models.read_config(fields | {'eos_token_id': 257, 'pad_token_id': 256}))
    hf.save(path, model, jax.jit(model.init)(jax.random.key(0)), add_files=tokenizer.save_pretrained)
    return path


def _config(folder, **changes):
    config = recipes.defaults()
    keys = {'task': 'generate', 'model.path': str(folder), 'generate.max_new_tokens': 24, 'generate.temperature': 0.0}
    recipes.apply_overrides(config, keys | {name.replace('__', '.'): value for name, value in changes.items()})
    return config


def test_a_conversation_goes_on_and_answers_as_transformers_does(folder):
    torch = pytest.importorskip('torch')
    import transformers

    talk = chat.Chat(_config(folder))
    written: list[str] = []
    chat.run(talk, iter(['Hi\n', '/system Be kind.\n', 'And 你?\n', '\n', '/exit\n', 'never read\n']), written.append)
    assert talk.system == 'Be kind.'
    assert [turn['role'] for turn in talk.turns] == ['user', 'assistant']
    assert ''.join(written).endswith(talk.turns[1]['content'] + '\n')
    assert len(written) > 4  # piece by piece

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    turns = [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'And 你?'}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors='pt', return_dict=True)
    with torch.no_grad():
        new = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs['input_ids'].shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    assert talk.turns[1]['content'].rstrip('�') == expected.rstrip('�')


def test_the_template_is_given_what_the_command_names(folder):
    source = (
        "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"
    )
    talk = chat.Chat(_config(folder, data__template=source, **{'data.template_args': {'mood': 'calm: '}}))
    talk.turns.append({'role': 'user', 'content': 'Hi'})
    assert talk.tokenizer.decode(talk._prompt()) == 'calm: Hi>'
    flags = {name: default for name, (default, _) in chat.FLAGS.items()} | {'model': str(folder)}
    config = chat.recipe_of(types.SimpleNamespace(**flags | {'template_args': '{"mood": "calm"}'}))
    assert config.data.template_args.mood == 'calm'
    with pytest.raises(UserError, match='--template_args=x: expected JSON'):
        chat.recipe_of(types.SimpleNamespace(**flags | {'template_args': 'x'}))


def test_old_turns_are_forgotten_where_a_conversation_grows_too_long(folder):
    talk = chat.Chat(_config(folder))
    for _ in range(3):
        list(talk.say('x' * 60))
    assert len(talk.turns) == 2 * 1  # only the newest fits
    written: list[str] = []
    chat.run(talk, iter(['x' * 300]), written.append)
    assert 'expected at most 232' in ''.join(written)


def test_the_command_refuses_what_is_no_model(tmp_path):
    words = [sys.executable, '-m', 'jaxtune.chat', f'--model={tmp_path}']
    done = subprocess.run(words, input='Hi\n', capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('jaxtune: ')
    assert len(done.stderr.splitlines()) == 1


def test_generate_answers_conversations_of_every_format(folder, tmp_path):
    from jaxtune.recipe.flags import Command
    from jaxtune.tasks import generate

    asked = {'role': 'user', 'content': 'Hi'}
    records = [
        {'messages': [asked, {'role': 'assistant', 'content': 'not read'}]},
        {'conversations': [{'from': 'human', 'value': 'Hi'}]},
        {'instruction': 'Hi', 'input': ''},
    ]
    (tmp_path / 'asked.jsonl').write_text('\n'.join(map(json.dumps, records)) + '\n')
    config = _config(folder, data__eval=str(tmp_path / 'asked.jsonl'), generate__batch_size=1)
    config.mesh.data = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, 'make_mesh', lambda sizes: _one_device())
        generate.run(config, tmp_path, Command('recipe.py', tmp_path, False, {'': config}, ('jaxtune',)))
    lines = [json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().splitlines()]
    assert [line['prompt'] for line in lines] == [[asked]] * 3
    talk = chat.Chat(_config(folder))
    assert {line['completion'].rstrip('�') for line in lines} == {''.join(talk.say('Hi')).rstrip('�')}


def _adapter(folder, path, seed):
    """A LoRA with random factors."""
    config, mesh, key = _config(folder, method__rank=4), _one_device(), jax.random.key(seed)
    parts = load_model(specs.model_spec(config), mesh)
    params = lora.METHOD.init(parts.params, parts.model, config.method, key)
    trainable, frozen = tree.partition(params, lora.METHOD.trains)
    moved = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(key, leaf.shape), trainable)
    lora_peft.save(path, tree.combine(moved, frozen), parts.model, config.method, str(folder))
    return str(path)


def test_a_chat_switches_between_adapters(folder, tmp_path):
    paths = [_adapter(folder, tmp_path / str(seed), seed) for seed in (0, 1)]
    alone = [''.join(chat.Chat(_config(folder, method__path=path)).say('Hi')) for path in paths]
    talk = chat.Chat(_config(folder, method__path=','.join(paths)))
    shown: list[str] = []
    chat.run(talk, iter(['Hi', '/reset', f'/adapter {paths[1]}', 'Hi', '/adapter nowhere']), shown.append)
    assert alone[0] != alone[1]
    assert ''.join(shown).startswith(f'{alone[0]}\n{alone[1]}\n(/adapter nowhere: expected one of')


def _one_device():
    from jaxtune.parallel import AXES
    from jaxtune.parallel import make_mesh as make

    return make(dict.fromkeys(AXES, 1), jax.devices()[:1])


def test_the_harness_scores_as_its_own_backend_does(folder, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip('lm_eval')
    pytest.importorskip('torch')
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from jaxtune.lm_eval import JaxtuneLM

    # One end token more than the tokenizer has would be met rarely: here every third byte is one.
    folder = shutil.copytree(folder, tmp_path / 'model')
    ends = [257, *range(0, 256, 3)]
    (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': ends}))
    words = ['red', 'green', 'blue', 'round', 'heavy', 'old']
    records = [
        {
            'question': f'Is {a} like {b}?',
            'choices': [f' {a}', f' {b} indeed', ' no'],
            'answer': i % 3,
            'text': f'{a} {b} ' * i,
        }
        for i, (a, b) in enumerate((a, b) for a in words for b in words if a < b)
    ]
    file = tmp_path / 'test.jsonl'
    file.write_text('\n'.join(map(json.dumps, records[1:])) + '\n')
    data = {'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(file)}}, 'test_split': 'test'}
    tasks = [
        data
        | {
            'task': 'choices',
            'output_type': 'multiple_choice',
            'doc_to_text': '{{question}}',
            'doc_to_choice': '{{choices}}',
            'doc_to_target': 'answer',
            'target_delimiter': '',
            'metric_list': [{'metric': 'acc'}, {'metric': 'acc_norm'}],
        },
        data
        | {
            'task': 'rolling',
            'output_type': 'loglikelihood_rolling',
            'doc_to_text': '',
            'doc_to_target': '{{text}}',
            'metric_list': [{'metric': 'word_perplexity'}, {'metric': 'bits_per_byte'}],
        },
        data
        | {
            'task': 'written',
            'output_type': 'generate_until',
            'doc_to_text': '{{question}}',
            'doc_to_target': '{{choices[0]}}',
            'generation_kwargs': {'until': ['\n'], 'max_gen_toks': 8, 'do_sample': False},
            'metric_list': [{'metric': 'exact_match'}],
        },
    ]
    manager = TaskManager(include_defaults=False)  # its own thirteen thousand files take half a minute
    ours = JaxtuneLM(path=str(folder), batch_size=8, max_length=64)
    theirs = HFLM(pretrained=str(folder), device='cpu', dtype='float32', batch_size=4, max_length=64)
    found, expected = (
        lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True)
        for model in (ours, theirs)
    )
    for task in ('choices', 'rolling', 'written'):
        for name, value in expected['results'][task].items():
            if isinstance(value, float):
                assert found['results'][task][name] == pytest.approx(value, rel=1e-4), (task, name)
    written = [[sample['resps'] for sample in result['samples']['written']] for result in (found, expected)]
    assert written[0] == written[1]
    assert any(text for ((text,),) in written[0])
    assert chat.Chat(_config(folder)).stops >= {*ends}

    monkeypatch.setattr(sys, 'argv', ['lm_eval', '--help'])
    with pytest.raises(SystemExit, match=r'^0$'):
        runpy.run_module('jaxtune.lm_eval', run_name='__main__')


def test_end_tokens_that_are_none_are_refused(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / 'model')
    for wrong in ({'eos_token_id': ['<eos>']}, {'eos_token_id': {'a': 1}}, [1]):
        (folder / 'generation_config.json').write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r'generation_config.json:.*expected'):
            load_model(specs.model_spec(_config(folder)), _one_device())
