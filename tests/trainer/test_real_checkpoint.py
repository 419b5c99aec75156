"""A real small model, scored and sampled as PyTorch does it."""

import itertools
import json

import pytest
from runs import write_recipe

from jaxtune import main

SEQ_LEN = 512


@pytest.fixture(scope='module')
def torch_model(shared):
    folder = shared / 'data' / 'checkpoints' / 'stories260K' / 'hf'
    pytest.importorskip('torch')
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return folder, AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def mean_nll(model, tokenizer, texts):
    """Nats a scored token: each document with its EOS, in windows whose first token is not scored."""
    import torch

    total, count = 0.0, 0
    for text in texts:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        for low in range(0, len(ids), SEQ_LEN):
            window = torch.tensor([ids[low : low + SEQ_LEN]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    loss = model(window, labels=window).loss.item()
                total, count = total + loss * (window.shape[1] - 1), count + window.shape[1] - 1
    return total / count, count


def command(tmp_path, keys):
    path = write_recipe(tmp_path / 'recipe.py', keys)
    assert main.main(['jaxtune', '--config', str(path), '--workdir', str(tmp_path / 'run')]) == 0
    return json.loads((tmp_path / 'run' / 'result.json').read_text())


@pytest.mark.parametrize(('name', 'documents'), [('tinystories', 40), ('wikipedia_en', 1)])
def test_evaluate_gives_the_loss_of_pytorch(torch_model, shared, tmp_path, name, documents):
    folder, model, tokenizer = torch_model
    with open(shared / 'data' / 'pretrain' / f'{name}.jsonl', encoding='utf-8') as file:
        lines = list(itertools.islice(file, documents))
    (tmp_path / 'eval.jsonl').write_text(''.join(lines), encoding='utf-8')
    keys = {'task': 'evaluate', 'model.path': str(folder), 'data.eval': str(tmp_path / 'eval.jsonl')}
    result = command(tmp_path, {**keys, 'data.seq_len': SEQ_LEN})
    expected, count = mean_nll(model, tokenizer, [json.loads(line)['text'] for line in lines])
    assert result['metrics']['eval/tokens'] == count
    assert result['metrics']['eval/loss'] == pytest.approx(expected, rel=1e-5)


def test_greedy_is_that_of_transformers_for_200_tokens(torch_model, tmp_path):
    import torch

    folder, model, tokenizer = torch_model
    prompts = ['Once upon a time', 'The little dog', 'Lily and Ben went to the park. They saw']
    (tmp_path / 'prompts.jsonl').write_text('\n'.join(json.dumps({'prompt': prompt}) for prompt in prompts))
    keys = {'task': 'generate', 'model.path': str(folder), 'data.eval': str(tmp_path / 'prompts.jsonl')}
    keys |= {'data.format': 'prompt', 'generate.max_new_tokens': 200, 'generate.temperature': 0.0}
    command(tmp_path, keys)
    samples = [json.loads(line) for line in (tmp_path / 'run' / 'samples.jsonl').read_text().splitlines()]
    assert [sample['prompt'] for sample in samples] == prompts
    for sample in samples:
        ids = tokenizer(sample['prompt'], return_tensors='pt').input_ids
        whole = model.generate(ids, max_new_tokens=200, do_sample=False, pad_token_id=0)[0]
        assert isinstance(whole, torch.Tensor)
        text = tokenizer.decode(whole, skip_special_tokens=True)
        before = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert sample['completion'] == text[len(before) :]
        assert len(whole) == 200 + ids.shape[1]
