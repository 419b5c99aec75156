"""One weight for table and head: PEFT's adapters of it here, and ours there; heads that differ or are missing."""

import json

import jax
import numpy as np
import pytest

from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.methods import lora, lora_peft, peft
from jaxtune.models import hf
from jaxtune.parallel import AXES, make_mesh
from jaxtune.pretrained import load, save
from jaxtune.recipe import recipes
from jaxtune.tasks import specs
from jaxtune.weights import LoRA, tree

torch = pytest.importorskip('torch')
theirs = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')
torch.set_num_threads(1)

TOKENS = np.random.default_rng(0).integers(0, 256, (2, 12)).astype(np.int32)
_BERT = {
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'max_position_embeddings': 32,
}
_T5 = {'d_model': 16, 'd_kv': 8, 'd_ff': 24, 'num_layers': 2, 'num_heads': 2, 'decoder_start_token_id': 0}
_LLAMA = _BERT | {'num_key_value_heads': 2, 'tie_word_embeddings': True}
_GPT2 = {'n_embd': 16, 'n_layer': 2, 'n_head': 2, 'n_positions': 32}
# A model's fields, its table and its head, what else is adapted, the task's name in PEFT.
KINDS = {
    'llama': (_LLAMA, 'model.embed_tokens', 'lm_head', 'q_proj', 'CAUSAL_LM'),
    'gpt2': (_GPT2, 'transformer.wte', 'lm_head', 'c_attn', 'CAUSAL_LM'),
    'bert': (_BERT, 'bert.embeddings.word_embeddings', 'cls.predictions.decoder', 'query', None),
    't5': (_T5, 'encoder.embed_tokens', 'lm_head', 'wo', 'SEQ_2_SEQ_LM'),
}  # fmt: skip
AUTO = {'bert': 'AutoModelForMaskedLM', 't5': 'AutoModelForSeq2SeqLM'}


def torch_base(folder, kind):
    return getattr(transformers, AUTO.get(kind, 'AutoModelForCausalLM')).from_pretrained(folder).eval()


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    """A folder of each kind, made at its first use."""
    made = {}

    def make(kind):
        if kind not in made:
            fields = KINDS[kind][0] | {
                'vocab_size': 260,
                'pad_token_id': 256,
                'eos_token_id': 257,
                'bos_token_id': None,
            }
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **fields)
            model = getattr(transformers, AUTO.get(kind, 'AutoModelForCausalLM')).from_config(config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(0.3 * torch.randn_like(parameter) + ('norm' in name.lower()) * parameter)
            made[kind] = tmp_path_factory.mktemp('tied') / kind
            model.save_pretrained(made[kind])
            tokenizers.load('bytes').save_pretrained(made[kind])
        return made[kind]

    return make


def mesh():
    return make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])


def opened(folder, kind, adapter='', **changes):
    config = recipes.defaults()
    objective = {'bert': 'masked_lm', 't5': 'seq2seq'}.get(kind, 'causal_lm')
    keys = {'task': 'evaluate', 'model.path': str(folder), 'method.path': str(adapter), 'objective': objective}
    keys |= {'data.seq_len': 16, **{name.replace('__', '.'): value for name, value in changes.items()}}
    recipes.apply_overrides(config, keys)
    return config, load.load_model(specs.model_spec(config), mesh())


def batch(kind):
    if kind == 't5':
        return {'tokens': TOKENS, 'decoder_tokens': TOKENS[:, ::-1]}
    return {'tokens': TOKENS}


def logits(model, params, kind):
    return np.asarray(jax.jit(lambda p: model.logits(p, model.apply(p, batch(kind)).hidden))(params))


def torch_logits(model, kind):
    inputs = {'input_ids': torch.from_numpy(TOKENS).long()}
    if kind == 't5':
        inputs['decoder_input_ids'] = torch.from_numpy(TOKENS[:, ::-1].copy()).long()
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def assert_same(ours, expected, tolerance=2e-5):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def adapted(folder, kind, path, targets=(), whole=(), **settings):
    """PEFT's adapter with random numbers, saved and opened again."""
    _, _, _, other, task = KINDS[kind]
    torch.manual_seed(1)
    config = theirs.LoraConfig(
        task_type=task, r=2, lora_alpha=4, init_lora_weights=False, target_modules=[other, *targets],
        modules_to_save=list(whole) or None, **settings,
    )  # fmt: skip
    model = theirs.get_peft_model(torch_base(folder, kind), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'modules_to_save' in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return theirs.PeftModel.from_pretrained(torch_base(folder, kind), path).eval()


def last(name):
    return name.rsplit('.', 1)[-1]


WAYS = {
    'table': lambda table, head: {'targets': [last(table)]},
    'head': lambda table, head: {'targets': [last(head)]},
    'table, tied': lambda table, head: {'targets': [last(table)], 'ensure_weight_tying': True},
    'table and head': lambda table, head: {'targets': [last(table), last(head)]},
    'whole table': lambda table, head: {'whole': [last(table)]},
    'whole head': lambda table, head: {'whole': [last(head)]},
    'whole table, tied': lambda table, head: {'whole': [last(table)], 'ensure_weight_tying': True},
}


@pytest.mark.parametrize(
    ('kind', 'way'),
    [*(('llama', way) for way in WAYS), ('gpt2', 'table'), ('gpt2', 'table, tied'), ('gpt2', 'whole table'),
     ('bert', 'table'), ('bert', 'whole head'), ('t5', 'head')],
)  # fmt: skip
def test_an_adapter_of_peft_changes_what_it_changes_there(kind, way, bases, tmp_path):
    _, table, head, _, _ = KINDS[kind]
    expected = torch_logits(adapted(bases(kind), kind, tmp_path / 'theirs', **WAYS[way](table, head)), kind)
    _, parts = opened(bases(kind), kind, tmp_path / 'theirs')
    assert_same(logits(parts.model, parts.params, kind), expected)
    assert (parts.model.tie is None) == (kind != 'llama' or 'tied' not in way)
    save.save(tmp_path / 'out', parts.model, save.merged(parts.params, ''), parts.tokenizer, parts.folder)
    assert_same(torch_logits(torch_base(tmp_path / 'out', kind), kind), expected)
    # What it brings along whole is trained further, and goes out with it.
    assert bool(parts.brought) == ('whole' in way)
    again = tmp_path / 'again'
    whole = sorted(parts.trained_whole & set(parts.model.tensors))
    lora_peft.save(again, parts.params, parts.model, recipes.defaults().method, str(bases(kind)), whole)
    assert_same(
        torch_logits(theirs.PeftModel.from_pretrained(torch_base(bases(kind), kind), again).eval(), kind), expected
    )


@pytest.mark.parametrize('kind', KINDS)
def test_a_table_trained_here_is_one_weight_everywhere(kind, bases, tmp_path):
    _, table, _, other, _ = KINDS[kind]
    target = 'shared' if kind == 't5' else last(table)
    config, parts = opened(bases(kind), kind, method__rank=2, method__targets=f'{other},{target}')
    params = lora.METHOD.init(parts.params, parts.model, config.method, jax.random.key(0))
    trainable, frozen = tree.partition(params, lora.METHOD.trains)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    params = tree.combine(jax.tree.map(lambda x: 0.3 * jax.random.normal(next(keys), x.shape), trainable), frozen)
    assert isinstance(params['shared' if kind == 't5' else 'embed_tokens']['embedding'], LoRA)
    ours = logits(parts.model, params, kind)

    lora_peft.save(tmp_path / 'ours', params, parts.model, config.method, str(bases(kind)))
    there = theirs.PeftModel.from_pretrained(torch_base(bases(kind), kind), tmp_path / 'ours').eval()
    assert_same(torch_logits(there, kind), ours)
    _, again = opened(bases(kind), kind, tmp_path / 'ours')
    assert again.model.tie is not None
    assert_same(logits(again.model, again.params, kind), ours)
    save.save(tmp_path / 'out', parts.model, save.merged(params, ''), parts.tokenizer, parts.folder)
    assert_same(torch_logits(torch_base(tmp_path / 'out', kind), kind), ours)


@pytest.mark.parametrize('kind', KINDS)
def test_a_head_of_the_folder_is_believed_and_a_missing_one_is_no_random_one(kind, bases, tmp_path):
    from safetensors.torch import load_file, save_file

    torch_base(bases(kind), kind).save_pretrained(tmp_path)
    tokenizers.load('bytes').save_pretrained(tmp_path)
    file, head = tmp_path / 'model.safetensors', f'{KINDS[kind][2]}.weight'
    tensors = load_file(file)
    table = next(
        name
        for name in tensors
        if name.endswith(('embed_tokens.weight', 'wte.weight', 'shared.weight', 'word_embeddings.weight'))
    )
    tensors[head] = tensors[table].clone()

    def compare(own_head):
        save_file(tensors, file, metadata={'format': 'pt'})
        _, parts = opened(tmp_path, kind)
        expected = torch_logits(torch_base(tmp_path, kind), kind)
        assert_same(logits(parts.model, parts.params, kind), expected)
        assert (parts.model.tie is None) == own_head
        save.save(tmp_path / 'out', parts.model, parts.params, parts.tokenizer, parts.folder)
        assert_same(torch_logits(torch_base(tmp_path / 'out', kind), kind), expected)
        return parts

    compare(own_head=False)  # stored twice
    tensors[head][3] += 0.5
    compare(own_head=True)
    del tensors[table]
    compare(own_head=False)  # under the head's name alone

    if kind == 't5':  # which `transformers` ties whatever the folder says
        return
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | {'tie_word_embeddings': False}))
    tensors[table] = tensors.pop(head)
    save_file(tensors, file, metadata={'format': 'pt'})
    for task in ('evaluate', 'export', 'generate', 'ppo')[: 2 if kind == 'bert' else None]:
        with pytest.raises(UserError, match=rf'holds no .*{head}.*expected'):
            opened(tmp_path, kind, task=task)
    _, parts = opened(tmp_path, kind, task='train')
    assert parts.newly_initialized


def test_what_pissa_and_olora_took_off_the_base_is_taken_off_again(bases, tmp_path):
    base = bases('llama')
    for init, settings in (
        ('pissa', {'rank_pattern': {'layers.0.self_attn.q_proj': 3}}),
        ('olora', {'layers_to_transform': [1]}),
    ):
        config = theirs.LoraConfig(
            task_type='CAUSAL_LM', r=4, lora_alpha=6, target_modules=['q_proj', 'down_proj'], init_lora_weights=init,
            **settings,
        )  # fmt: skip
        model = theirs.get_peft_model(torch_base(base, 'llama'), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if 'lora_' in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / init)
        again = theirs.PeftModel.from_pretrained(torch_base(base, 'llama'), tmp_path / init).eval()
        _, parts = opened(base, 'llama', tmp_path / init)
        ours = logits(parts.model, parts.params, 'llama')
        # Each side decomposes the base by itself, in float32 and by another LAPACK.
        assert_same(ours, torch_logits(again, 'llama'), tolerance=1e-4)
        with pytest.raises(UserError, match=r'method.name=qlora'):
            opened(base, 'llama', tmp_path / init, method__name='qlora', task='train')


def test_fields_of_an_adapter_are_read_or_refused_by_name_or_harmless(bases, tmp_path):
    model = theirs.get_peft_model(
        torch_base(bases('llama'), 'llama'),
        theirs.LoraConfig(
            task_type='CAUSAL_LM',
            r=2,
            target_modules='all-linear',
            exclude_modules=['down_proj'],
            init_lora_weights=False,
        ),
    ).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'adapter_config.json').read_text())

    def write(**changes):
        (tmp_path / 'adapter_config.json').write_text(json.dumps(config | changes))

    for harmless in ({}, {'init_lora_weights': 'eva', 'eva_config': {'rho': 2.0}}, {'loftq_config': {'loftq_bits': 4}}):
        write(**harmless)
        _, parts = opened(bases('llama'), 'llama', tmp_path)
        assert_same(logits(parts.model, parts.params, 'llama'), torch_logits(model, 'llama'))
    for name, value in (
        ('init_lora_weights', 'corda'), ('init_lora_weights', 'lora_ga'), ('init_lora_weights', 'loftq'),
        ('init_lora_weights', 'pissa_niter_4'), ('kasa_config', {'beta': 1e-4}), ('use_something_new', True),
        ('new_config', {'a': 1}),
    ):  # fmt: skip
        write(**{name: value})
        with pytest.raises(UserError, match=rf'adapter_config.json: {name}={value!r}'.replace('{', r'\{')):
            peft.read_config(tmp_path)
    assert hf.newly_initialized_paths(bases('llama'), parts.model) == set()
