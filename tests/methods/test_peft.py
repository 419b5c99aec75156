"""Adapters go to Hugging Face's `peft` and come back, and train there and here alike."""

import json
import re

import jax
import numpy as np
import pytest

from jaxtune import models
from jaxtune.methods import apply, lora_init, lora_peft, peft, prompt
from jaxtune.models import hf
from jaxtune.optim.optimizers import make_optimizer, schedule
from jaxtune.parallel import make_mesh, match_rules, shardings
from jaxtune.pretrained.save import merged
from jaxtune.recipe import recipes
from jaxtune.tasks import specs
from jaxtune.training.step import init_state, make_train_step
from jaxtune.weights import LoRA, tree

torch = pytest.importorskip('torch')
theirs = pytest.importorskip('peft')
torch.set_num_threads(1)

STEPS, LR = 30, 3e-3
TOKENS = np.random.default_rng(0).integers(3, 97, (4, 24)).astype(np.int32)
LINEAR = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
VARIANTS = {
    'plain': {},
    'rslora, two targets': {'use_rslora': True, 'target_modules': ['q_proj', 'v_proj']},
    'dora': {'use_dora': True},
    'rank patterns, some layers': {
        'rank_pattern': {'q_proj': 2, 'layers.1.mlp.down_proj': 6},
        'alpha_pattern': {'v_proj': 3},
        'layers_to_transform': [0, 1],
    },
    'embedding': {'target_modules': ['q_proj', 'embed_tokens']},
}


def mesh():
    return make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}, jax.devices()[:1])


def base(folder, method='lora'):
    """The model, and its parameters as a method stores them."""
    config = recipes.defaults()
    recipes.apply_overrides(config, {'method.name': method})
    model = models.build(models.read_config(str(folder)))
    codecs = apply.codecs(specs.method(config), model)
    shapes = jax.eval_shape(lambda params: apply.encoded(params, codecs), model.shapes)
    placed = shardings(match_rules(shapes, mesh()), mesh())
    return config, model, hf.load(folder, model, placed, codecs=codecs)[0]


def read(folder, model, params):
    init, arrays = peft.reader(str(folder), model)
    return apply.attach(init, params, mesh(), arrays)


def logits(model, params):
    return np.asarray(jax.jit(lambda p: model.logits(p, model.apply(p, {'tokens': TOKENS}).hidden))(params))


def train(config, model, params):
    """Losses of AdamW's updates, and the trained tree."""
    recipes.apply_overrides(
        config, {'optimizer.lr': LR, 'optimizer.schedule': 'constant', 'optimizer.weight_decay': 0.0}
    )
    optimizer = make_optimizer(config.optimizer, STEPS)
    trainable, frozen = apply.partition(specs.method(config).method, params, frozenset())
    objective = specs.objective(config)
    step = make_train_step(
        lambda params, batch, rng: objective.loss(model, params, batch, rng),
        optimizer, schedule(config.optimizer, STEPS), seed=0,
    )  # fmt: skip
    batch = {
        'tokens': TOKENS,
        'targets': np.roll(TOKENS, -1, 1),
        'loss_mask': np.broadcast_to(np.arange(24) < 23, TOKENS.shape).astype(np.float32),
    }
    state, step, losses = init_state(trainable, optimizer), jax.jit(step), []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics['loss']))
    return losses, tree.combine(state['trainable'], frozen)


def train_theirs(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0), []
    tokens = torch.from_numpy(TOKENS).long()
    labels = tokens.clone()
    labels[:, 0] = -100  # which PEFT would let a prompt's last token predict
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def torch_logits(model):
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()


def torch_base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager')


@pytest.mark.parametrize('variant', VARIANTS)
def test_lora_goes_there_and_back_and_trains_alike(variant, llama, tmp_path):
    settings = {'r': 4, 'lora_alpha': 8, 'target_modules': LINEAR, 'init_lora_weights': False, **VARIANTS[variant]}
    torch.manual_seed(1)
    model_theirs = theirs.get_peft_model(torch_base(llama), theirs.LoraConfig(task_type='CAUSAL_LM', **settings))
    with torch.no_grad():
        for name, parameter in model_theirs.named_parameters():
            if 'lora_B' in name:
                parameter.mul_(0.1)
    model_theirs.save_pretrained(tmp_path / 'theirs')

    config, model, params = base(llama)
    params = read(tmp_path / 'theirs', model, params)
    np.testing.assert_allclose(logits(model, params), torch_logits(model_theirs), rtol=1e-4, atol=1e-4)

    expected = train_theirs(model_theirs)
    losses, params = train(config, model, params)
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses, expected, rtol=1e-4)

    recipes.apply_overrides(config, {'method.rslora': settings.get('use_rslora', False)})
    lora_peft.save(tmp_path / 'ours', params, model, config.method, str(llama))
    again = theirs.PeftModel.from_pretrained(torch_base(llama), tmp_path / 'ours')
    ours = logits(model, params)
    np.testing.assert_allclose(torch_logits(again), ours, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits(model, merged(params, '')), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('changes', [{'method.init': 'pissa'}, {'method.targets': 'q_proj', 'method.layers': '1:'}])
def test_lora_made_here_loads_there(changes, llama, tmp_path):
    config, model, params = base(llama)
    recipes.apply_overrides(config, {'method.rank': 3, **changes})
    params = apply.attach(lambda params: apply.begin(specs.method(config), model, params, frozenset()), params, mesh())
    key = iter(jax.random.split(jax.random.key(0), 99))
    trainable, frozen = apply.partition(specs.method(config).method, params, frozenset())
    moved = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(next(key), leaf.shape), trainable)
    params = tree.combine(moved, frozen)
    lora_peft.save(tmp_path / 'ours', params, model, config.method, str(llama))
    there = torch_logits(theirs.PeftModel.from_pretrained(torch_base(llama), tmp_path / 'ours'))
    np.testing.assert_allclose(there, logits(model, params), rtol=1e-4, atol=1e-4)


def test_qlora_trains_as_bitsandbytes_and_peft(llama, tmp_path):
    bnb = pytest.importorskip('bitsandbytes')
    plain = torch_base(llama)
    for name, module in list(plain.named_modules()):
        if isinstance(module, torch.nn.Linear) and 'lm_head' not in name:
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type='nf4'
            )
            new.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, compress_statistics=True, quant_type='nf4'
            )
            setattr(plain.get_submodule(name.rsplit('.', 1)[0]), name.rsplit('.', 1)[1], new)
    plain.to('cpu')
    torch.manual_seed(1)
    settings = theirs.LoraConfig(task_type='CAUSAL_LM', r=4, lora_alpha=8, target_modules=LINEAR)
    model_theirs = theirs.get_peft_model(plain, settings)
    model_theirs.save_pretrained(tmp_path / 'theirs')
    config, model, params = base(llama, 'qlora')
    params = read(tmp_path / 'theirs', model, params)
    assert isinstance(params['layers']['mlp']['up_proj']['kernel'], LoRA)
    np.testing.assert_allclose(logits(model, params), torch_logits(model_theirs), rtol=1e-4, atol=1e-4)
    expected = train_theirs(model_theirs)
    losses, params = train(config, model, params)
    assert expected[-1] < expected[0] - 0.1
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    # Merged onto the weights that it was trained against.
    np.testing.assert_allclose(logits(model, merged(params, '')), logits(model, params), rtol=1e-5, atol=1e-5)


def test_loftq_makes_up_for_quantisation(llama):
    """It begins nearer to the model before quantisation than plain QLoRA, on the very same quantised base."""
    config, model, params = base(llama, 'qlora')
    exact = logits(model, hf.load(llama, model)[0])
    recipes.apply_overrides(config, {'method.rank': 16, 'method.init': 'loftq', 'method.layers': '0:2'})
    tuned = apply.attach(lambda params: apply.begin(specs.method(config), model, params, frozenset()), params, mesh())
    plain = np.abs(logits(model, tuned) - exact).mean()
    made_up = np.abs(logits(model, lora_init.loftq_init(tuned, hf.kernels(llama, model))) - exact).mean()
    assert made_up < 0.9 * plain


@pytest.mark.parametrize(
    ('kind', 'before'), [(theirs.PromptTuningConfig, 5), (theirs.PrefixTuningConfig, 0)], ids=['prompt', 'prefix']
)
def test_prompts_go_there_and_back_and_train_alike(kind, before, llama, tmp_path):
    """`before`: how many logits PEFT gives for the virtual tokens themselves."""
    settings = kind(task_type='CAUSAL_LM', num_virtual_tokens=5)
    torch.manual_seed(1)
    model_theirs = theirs.get_peft_model(torch_base(llama), settings)
    model_theirs.save_pretrained(tmp_path / 'theirs')
    config, model, params = base(llama, 'prompt')
    params = read(tmp_path / 'theirs', model, params)
    np.testing.assert_allclose(logits(model, params), torch_logits(model_theirs)[:, before:], rtol=1e-4, atol=1e-4)
    losses, params = train(config, model, params)
    np.testing.assert_allclose(losses, train_theirs(model_theirs), rtol=1e-4)
    prompt.save(tmp_path / 'ours', params, model, config.method, str(llama))
    again = theirs.PeftModel.from_pretrained(torch_base(llama), tmp_path / 'ours')
    np.testing.assert_allclose(torch_logits(again)[:, before:], logits(model, params), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', ['encoder', 'encdec'])
def test_prefixes_that_peft_does_not_have_come_back(kind, tmp_path):
    from test_methods import build, one_device, outputs, settings, tuned

    config = settings(**{'method.name': 'prompt', 'method.prefix': True, 'method.virtual_tokens': 3})
    model, params = build(kind)
    _, prefixed = tuned(config, model, params, one_device())
    prompt.save(tmp_path / 'ours', prefixed, model, config.method, 'base')
    again = read(tmp_path / 'ours', model, params)
    np.testing.assert_array_equal(outputs(model, again, kind), outputs(model, prefixed, kind))


def test_what_cannot_be_read_is_one_line(llama, tmp_path):
    _, model, _ = base(llama)
    folder = tmp_path / 'adapter'
    settings = theirs.LoraConfig(task_type='CAUSAL_LM', r=2, target_modules=['q_proj'])
    theirs.get_peft_model(torch_base(llama), settings).save_pretrained(folder)
    config = json.loads((folder / 'adapter_config.json').read_text())

    def refused(*words, **changes):
        (folder / 'adapter_config.json').write_text(json.dumps(config | changes))
        with pytest.raises(peft.UserError) as caught:
            peft.reader(str(folder), model)
        assert all(re.search(word, str(caught.value)) for word in words), str(caught.value)

    refused('peft_type', 'LORA', peft_type='VERA')
    refused('use_qalora', use_qalora=True)
    other = models.build(models.read_config({**models.read_config(str(llama)), 'num_hidden_layers': 2}))
    wide = models.build(models.read_config({**models.read_config(str(llama)), 'hidden_size': 32}))
    for another, word in ((other, 'layers.2'), (wide, '32 x')):
        (folder / 'adapter_config.json').write_text(json.dumps(config))
        with pytest.raises(peft.UserError, match=f'another base.*{word}'):
            peft.reader(str(folder), another)
    (folder / 'adapter_model.safetensors').rename(folder / 'adapter_model.bin')
    refused('pickled', 'adapter_model.safetensors')
