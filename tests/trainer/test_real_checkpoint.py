"""A real small model, scored and sampled as PyTorch does it."""

import itertools
import json

import pytest
from runs import write_recipe

from jaxtune import main

SEQ_LEN = 512
LONGER, BUCKETS = 4 * SEQ_LEN, 8


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


def nll_by_position(model, tokenizer, texts, width):
    """Bucket of positions in a window -> (mean nats, tokens), from PyTorch's logits."""
    import torch

    sums = {}
    for text in texts:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        for low in range(0, len(ids), LONGER):
            window = torch.tensor(ids[low : low + LONGER])
            with torch.no_grad():
                logits = model(window[None]).logits[0, :-1].double()
            losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction='none').tolist()
            for position, loss in enumerate(losses, 1):
                total, count = sums.get(position // width, (0.0, 0))
                sums[position // width] = total + loss, count + 1
    return {bucket: (total / count, count) for bucket, (total, count) in sums.items()}


@pytest.mark.parametrize('scaled', [False, True], ids=['as trained', 'yarn'])
def test_loss_by_position_beyond_the_trained_length_is_that_of_transformers(torch_model, shared, tmp_path, scaled):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, _, tokenizer = torch_model
    with open(shared / 'data' / 'pretrain' / 'tinystories.jsonl', encoding='utf-8') as file:
        stories = [json.loads(line)['text'] for line in itertools.islice(file, 24)]
    texts = [' '.join(stories[low : low + 8]) for low in range(0, 24, 8)]
    (tmp_path / 'eval.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts), encoding='utf-8')
    fields = {'max_position_embeddings': LONGER}
    if scaled:
        fields['rope_scaling'] = {'rope_type': 'yarn', 'factor': LONGER / SEQ_LEN}
    keys = {'task': 'evaluate', 'model.path': str(folder), 'model.config': fields}
    keys |= {'data.eval': str(tmp_path / 'eval.jsonl'), 'data.seq_len': LONGER, 'eval.by_position': BUCKETS}
    found = command(tmp_path, keys)['metrics']
    theirs = {'max_position_embeddings': LONGER}
    if scaled:
        yarn = {**fields['rope_scaling'], 'original_max_position_embeddings': SEQ_LEN, 'rope_theta': 10000.0}
        theirs['rope_parameters'] = yarn
    model = AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder, **theirs))
    width = LONGER // BUCKETS
    expected = nll_by_position(model, tokenizer, texts, width)
    assert len(expected) == BUCKETS
    for bucket, (loss, count) in expected.items():
        name = f'{bucket * width}-{(bucket + 1) * width - 1}'
        assert found[f'eval/tokens_by_position/{name}'] == count
        assert found[f'eval/loss_by_position/{name}'] == pytest.approx(loss, abs=1e-4)
    inside, beyond = expected[0][0], expected[BUCKETS - 1][0]
    assert beyond > inside + (0.1 if scaled else 0.5)  # it was trained at a quarter of this length


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
