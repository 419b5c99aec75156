"""The server as its clients see it: OpenAI's own client, and those who should not be answered."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from jaxtune import chat, models, serve
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.templates import open_template
from jaxtune.errors import UserError
from jaxtune.generation.engine import Full
from jaxtune.methods import lora, lora_peft
from jaxtune.models import hf
from jaxtune.objectives.cross_entropy import token_logprobs
from jaxtune.parallel import AXES, make_mesh
from jaxtune.pretrained.load import load_model
from jaxtune.recipe import recipes
from jaxtune.serving import server
from jaxtune.tasks import specs
from jaxtune.weights import tree

ASKED = [{'role': 'user', 'content': 'Hi 你'}]


def one_device():
    return make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])


def recipe(folder, **changes):
    config = recipes.defaults()
    keys = {'task': 'generate', 'model.path': str(folder), 'generate.temperature': 0.0}
    recipes.apply_overrides(config, keys | {name.replace('__', '.'): value for name, value in changes.items()})
    return config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small random model that writes bytes, with a chat template, and an adapter of it."""
    path = tmp_path_factory.mktemp('model') / 'small'
    fields = {'model_type': 'llama', 'vocab_size': 320, 'hidden_size': 32, 'intermediate_size': 64}
    fields |= {'num_hidden_layers': 2, 'num_attention_heads': 4, 'max_position_embeddings': 256}
    fields |= {'initializer_range': 0.2, 'eos_token_id': 257, 'pad_token_id': 256}
    tokenizer = tokenizers.load('bytes')
    tokenizer.chat_template = open_template('chatml', tokenizer).source
    model = models.build(models.read_config(fields))
    hf.save(path, model, jax.jit(model.init)(jax.random.key(0)), add_files=tokenizer.save_pretrained)
    config, key = recipe(path, method__rank=4), jax.random.key(1)
    parts = load_model(specs.model_spec(config), one_device())
    trainable, frozen = tree.partition(
        lora.METHOD.init(parts.params, parts.model, config.method, key), lora.METHOD.trains
    )
    moved = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(key, leaf.shape), trainable)
    tuned = path.parent / 'tuned' / 'adapter'
    lora_peft.save(tuned, tree.combine(moved, frozen), parts.model, config.method, str(path))
    return path


def flags_of(folder, **changes):
    values = {name: default for name, (default, _) in serve.FLAGS.items()}
    return types.SimpleNamespace(**values | {'model': str(folder), 'port': 0, 'slots': 4} | changes)


@contextlib.contextmanager
def running(service, key=''):
    """The port of a server in a thread."""
    bound, stop = serve.bind('127.0.0.1', 0), threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, '_close', lambda service: None)  # others go on with the engines
        args = (service, bound, '127.0.0.1', key, stop.is_set)
        thread = threading.Thread(target=server.run, args=args)
        thread.start()
        port = bound.getsockname()[1]
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(('127.0.0.1', port)):
                break
            time.sleep(0.01)
        yield port
        stop.set()
        thread.join()
        bound.close()


@pytest.fixture(scope='module')
def service(folder):
    values = flags_of(folder, adapter=str(folder.parent / 'tuned'))
    made = serve.open_service(chat.recipe_of(values), values)
    yield made
    for engine in made.engines.values():
        engine.close()
        assert not engine.alive


@pytest.fixture(scope='module')
def port(service):
    with running(service) as port:
        yield port


@pytest.fixture(scope='module')
def client(port):
    return openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none', max_retries=0, timeout=240)


def said(port, path, body=None, **headers):
    """Status, headers and JSON of one request."""
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=120)
    headers = {name.replace('_', '-'): value for name, value in headers.items()}
    if body is not None:
        headers = {'Content-Type': 'application/json'} | headers
    connection.request('GET' if body is None else 'POST', path, body, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    kind = response.getheader('content-type')
    return response.status, json.loads(text) if kind == 'application/json' else text.decode()


def test_a_conversation_is_answered_as_in_the_terminal(folder, client):
    talk = chat.Chat(recipe(folder, generate__max_new_tokens=40))
    expected = ''.join(talk.say('Hi 你'))
    settings = {'model': 'small', 'messages': ASKED, 'temperature': 0, 'max_tokens': 40}
    whole = client.chat.completions.create(**settings, n=2)
    assert [choice.message.content.rstrip('\N{REPLACEMENT CHARACTER}') for choice in whole.choices] == [expected] * 2
    assert whole.usage.prompt_tokens == len(talk.encode.prompt(chat_of(ASKED))[1])
    assert whole.usage.completion_tokens == 80 or whole.choices[0].finish_reason == 'stop'
    pieces = list(client.chat.completions.create(**settings, stream=True, stream_options={'include_usage': True}))
    assert pieces[0].choices[0].delta.role == 'assistant'
    assert ''.join(piece.choices[0].delta.content or '' for piece in pieces if piece.choices) == (
        whole.choices[0].message.content
    )
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-1] == whole.choices[0].finish_reason
    assert pieces[-1].usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens // 2
    assert len(pieces) > 5


def chat_of(turns):
    from jaxtune.data.formats import Chat

    return Chat(tuple(turns))


def test_a_stop_text_is_never_shown_nor_a_part_of_it(client):
    settings = {'model': 'small', 'prompt': 'Once', 'temperature': 0, 'max_tokens': 60}
    whole = client.completions.create(**settings).choices[0].text
    stop = whole[20:23]
    expected = whole[: whole.index(stop)]
    for n in (1, 2):
        stopped = client.completions.create(**settings, stop=[stop, 'never written'], n=n, logprobs=1)
        assert [choice.text for choice in stopped.choices] == [expected] * n
        assert stopped.choices[0].finish_reason == 'stop'
        assert all(offset < len(expected) for offset in stopped.choices[0].logprobs.text_offset)
    pieces = list(client.completions.create(**settings, stop=stop, stream=True))
    assert ''.join(piece.choices[0].text for piece in pieces) == expected
    assert pieces[-1].choices[0].finish_reason == 'stop'


def test_prompts_are_scored_as_evaluation_scores_them(folder, client, tmp_path):
    from jaxtune.recipe.flags import Command
    from jaxtune.tasks import evaluate

    text = 'A text of which each token is scored: naïve 你好.'
    parts = load_model(specs.model_spec(recipe(folder)), one_device())
    ids = [*parts.tokenizer(text).input_ids, 257]
    row = jnp.asarray([ids])
    hidden = parts.model.apply(parts.params, {'tokens': row[:, :-1]}).hidden
    expected = token_logprobs(hidden, parts.model.head(parts.params), row[:, 1:])[0]
    asked = {'model': 'small', 'max_tokens': 0, 'echo': True, 'logprobs': 3}
    (choice,) = client.completions.create(**asked, prompt=ids).choices
    assert choice.text == text
    assert choice.logprobs.token_logprobs[0] is None
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], expected, atol=1e-4)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == len(ids)
    assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)
    assert all(len(others) in (3, 4) for others in choice.logprobs.top_logprobs[1:])

    (tmp_path / 'held.jsonl').write_text(json.dumps({'text': text}) + '\n')
    config = recipe(folder, task='evaluate', objective='causal_lm', data__eval=str(tmp_path / 'held.jsonl'))
    config.data.seq_len, config.eval.batch_size = 128, 8
    evaluate.run(config, tmp_path, Command('recipe.py', tmp_path, False, {'': config}, ('jaxtune',)))
    result = json.loads((tmp_path / 'result.json').read_text())['metrics']
    assert result['eval/tokens'] == len(ids) - 1
    assert -np.mean(choice.logprobs.token_logprobs[1:]) == pytest.approx(result['eval/loss'], abs=1e-4)

    both = client.completions.create(**asked | {'max_tokens': 8, 'seed': 1}, prompt=[text, 'Another'], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text.startswith(text)
    assert both.choices[3].text.startswith('Another')
    assert both.choices[0].logprobs.token_logprobs[:20] == both.choices[1].logprobs.token_logprobs[:20]
    streamed = list(client.completions.create(**asked | {'max_tokens': 8, 'seed': 1}, prompt=text, stream=True))
    offsets = [offset for piece in streamed for offset in piece.choices[0].logprobs.text_offset]
    assert offsets == both.choices[0].logprobs.text_offset
    assert ''.join(piece.choices[0].text for piece in streamed) == both.choices[0].text


def test_many_at_once_are_answered_as_each_alone(port):
    async def ask(client, number):
        answer = await client.chat.completions.create(
            model=('small', 'tuned')[number % 8 == 7],
            messages=[{'role': 'user', 'content': 'x' * (3 * number) + str(number)}],
            temperature=(0, 0.8, 1.3)[number % 3],
            top_p=(1, 0.9)[number % 2],
            seed=number,
            max_tokens=8 + number,
            logprobs=True,
            top_logprobs=number % 4,
        )
        (choice,) = answer.choices
        content = choice.logprobs.content
        assert all(len(token.top_logprobs) == number % 4 for token in content)
        return choice.message.content, [token.token for token in content], [token.logprob for token in content]

    async def all_of():
        async with openai.AsyncOpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='x', timeout=240) as client:
            together = await asyncio.gather(*(ask(client, number) for number in range(32)))
            return together, {number: await ask(client, number) for number in range(0, 32, 3)}

    together, alone = asyncio.run(all_of())
    for number, (text, tokens, logprobs) in alone.items():
        assert together[number][:2] == (text, tokens)
        np.testing.assert_allclose(together[number][2], logprobs, atol=1e-5)


def test_adapters_are_models_beside_their_base(service, client, folder):
    assert [model.id for model in client.models.list()] == ['small', 'tuned']
    assert client.models.retrieve(str(folder.parent / 'tuned')).id == 'tuned'
    settings = {'messages': ASKED, 'temperature': 0, 'max_tokens': 30}
    answers = [client.chat.completions.create(model=name, **settings) for name in ('small', 'tuned')]
    texts = [answer.choices[0].message.content for answer in answers]
    talk = chat.Chat(recipe(folder, generate__max_new_tokens=30, method__path=str(folder.parent / 'tuned')))
    assert ''.join(talk.say('Hi 你')) == texts[1].rstrip('\N{REPLACEMENT CHARACTER}') != texts[0]
    base, tuned = (engine._laid.params for engine in service.engines.values())
    shared = {id(leaf) for leaf in jax.tree.leaves(base)}
    assert {id(leaf) for leaf in jax.tree.leaves(tuned)} > shared


def test_who_goes_away_frees_the_slot(service, port):
    body = json.dumps({'model': 'small', 'prompt': 'a', 'max_tokens': 250, 'stream': True, 'n': 4}).encode()
    head = 'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    with socket.create_connection(('127.0.0.1', port)) as connection:
        connection.sendall(f'{head}Content-Length: {len(body)}\r\n\r\n'.encode() + body)
        assert connection.recv(200).startswith(b'HTTP/1.1 200')
    wait_until_idle(service)
    assert said(port, '/health')[1] == {'status': 'ok', 'running': 0, 'waiting': 0}


def wait_until_idle(service):
    until = time.monotonic() + 60
    while any(engine.running or engine.waiting for engine in service.engines.values()):
        assert time.monotonic() < until
        time.sleep(0.01)


GOOD = json.dumps({'model': 'small', 'messages': ASKED, 'max_tokens': 2})


@pytest.mark.parametrize(
    ('change', 'status', 'message'),
    [
        ({'model': 'nowhere'}, 404, "'nowhere': no such model; expected one of small, tuned"),
        ({'model': None}, 400, 'model: expected the name of a model'),
        (
            {'messages': [{'role': 'user', 'content': 'x' * 300}]},
            400,
            r'the prompt has 3\d\d tokens and 2 .* at most 256',
        ),
        (
            {'messages': [{'role': 'user', 'content': 'x' * 300}], 'max_tokens': None},
            400,
            'expected at most 256 in all',
        ),
        ({'max_tokens': 250}, 400, 'tokens and 250 are wanted after it; expected at most 256 in all'),
        ({'messages': []}, 400, 'messages: expected a list'),
        ({'messages': [{'role': 'robot', 'content': ''}]}, 400, "messages: unknown role 'robot'"),
        ({'messages': [7]}, 400, 'messages: expected a turn with a role and a text'),
        ({'messages': [{'role': 'user', 'content': [7]}]}, 400, 'messages: '),
        ({'messages': [{'role': 'user', 'content': '\ud800'}]}, 400, 'messages: expected Unicode text'),
        ({'temperature': 3}, 400, 'temperature=3: expected a number from 0 to 2'),
        ({'temperature': True}, 400, 'temperature=True: expected a number'),
        ({'top_p': 'x'}, 400, "top_p='x': expected a number from 0 to 1"),
        ({'n': 1000}, 400, 'n=1000: expected a whole number from 1 to 128'),
        ({'stop': [1]}, 400, 'stop='),
        ({'stream': 1}, 400, 'stream=1: expected true or false'),
        ({'top_logprobs': 2}, 400, 'top_logprobs: expected logprobs=true'),
        ({'logprobs': True, 'top_logprobs': 21}, 400, 'top_logprobs=21: expected a whole number from 0 to 20'),
        ({'tools': [{'type': 'function'}]}, 400, 'tools=.*: not supported here'),
        ({'frequency_penalty': 0.5}, 400, 'frequency_penalty=0.5: not supported here'),
        ({'temprature': 0}, 400, "'temprature': no such parameter"),
        ({'\ud800': 0}, 400, 'no such parameter'),
        ({'stream_options': {'include_usage': True}}, 400, 'stream_options: expected an object, with stream=true'),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else '',
)
def test_what_is_wrong_is_said_and_where(port, change, status, message):
    got, body = said(port, '/v1/chat/completions', json.dumps(json.loads(GOOD) | change))
    assert got == status
    assert body['error'].keys() == {'message', 'type', 'param', 'code'}
    assert re.search(message, body['error']['message'])
    assert body['error']['type'] == 'invalid_request_error'


def test_parameters_that_change_nothing_are_taken(client):
    answer = client.chat.completions.create(
        model='small',
        messages=ASKED,
        max_completion_tokens=2,
        user='me',
        frequency_penalty=0,
        logit_bias={},
        response_format={'type': 'text'},
        extra_body={'top_k': 3, 'chat_template_kwargs': {'mood': 'calm'}},
    )
    assert answer.usage.completion_tokens <= 2
    with pytest.raises(openai.BadRequestError, match='the model knows 320'):
        client.completions.create(model='small', prompt=[[1, 2], [320]])
    with pytest.raises(openai.BadRequestError, match='prompt: expected a text'):
        client.completions.create(model='small', prompt=[['a']])
    assert client.completions.create(model='small', prompt='', max_tokens=3).usage.prompt_tokens == 1


def test_strangers_are_refused_and_the_server_lives_on(port, client):
    path = '/v1/chat/completions'
    for bad in ('', '{', '[]', '"x"', '{"n": NaN}', '[' * 100_000, b'\xff'):
        assert said(port, path, bad)[0] == 400
    assert said(port, path, GOOD, Origin='http://evil.example')[0] == 403
    assert said(port, path, GOOD, Origin='null')[0] == 403
    assert said(port, path, GOOD, Host='evil.example')[0] == 403
    assert said(port, '/v1/models', Host='evil.example:80')[0] == 403
    assert said(port, '/v1/models', Host='[::1')[0] == 403
    assert said(port, '/v1/models', Sec_Fetch_Site='cross-site')[0] == 403
    assert said(port, path, GOOD, Content_Type='text/plain')[0] == 415
    assert said(port, path, GOOD, Content_Type='application/x-www-form-urlencoded')[0] == 415
    assert said(port, path)[0] == 405
    assert said(port, '/v1/embeddings', GOOD)[0] == 404
    assert said(port, '/v1/models/none')[0] == 404
    assert said(port, path, GOOD, Origin=f'http://127.0.0.1:{port}')[0] == 200
    assert said(port, path, GOOD, Host='localhost:9')[0] == 200
    head = f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    for length in ('Content-Length: 100000000', 'Transfer-Encoding: chunked'):
        with socket.create_connection(('127.0.0.1', port)) as connection:
            connection.sendall(f'{head}{length}\r\n\r\n'.encode())
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 3 * 2**20:
                    connection.sendall(b'10000\r\n' + b'x' * 2**16 + b'\r\n')
                    sent += 2**16
            with contextlib.suppress(ConnectionError):
                assert connection.recv(100).startswith(b'HTTP/1.1 413')
    with pytest.raises((openai.APIConnectionError, openai.APIStatusError)):
        client.completions.create(model='small', prompt='x' * 100_000_000)
    assert said(port, path, GOOD)[0] == 200


def test_a_key_is_asked_for(service):
    with running(service, 'sésame') as port:
        assert said(port, '/v1/models')[0] == 401
        assert said(port, '/v1/models', Authorization='Bearer wrong')[0] == 401
        assert said(port, '/v1/models', Authorization='Basic s\u00e9same')[0] == 401
        status, body = said(port, '/v1/chat/completions', GOOD)
        assert (status, body['error']['code']) == (401, 'invalid_api_key')
        assert said(port, '/v1/models', Authorization='Bearer sésame'.encode())[0] == 200
        assert said(port, '/health')[0] == 200
        assert said(port, '/')[0] == 200


def test_a_full_queue_and_a_slow_answer_are_said(service, port, monkeypatch):
    def full(asks, listeners):
        raise Full

    monkeypatch.setattr(service.engines['tuned'], 'submit', full)
    body = json.loads(GOOD) | {'model': 'tuned'}
    status, answer = said(port, '/v1/chat/completions', json.dumps(body))
    assert (status, answer['error']['code']) == (429, 'queue_full')
    monkeypatch.setattr(service.engines['tuned'], 'submit', lambda asks, listeners: [])
    object.__setattr__(service, 'seconds', 0.2)
    try:
        status, answer = said(port, '/v1/chat/completions', json.dumps(body))
        assert (status, answer['error']['code']) == (504, 'timeout')
        status, events = said(port, '/v1/chat/completions', json.dumps(body | {'stream': True}))
        assert 'the answer took longer than 0.2 seconds' in events
        assert '[DONE]' not in events
    finally:
        object.__setattr__(service, 'seconds', 600.0)


def test_the_page_asks_nobody_else_and_can_be_read_aloud(port):
    status, page = said(port, '/')
    assert status == 200
    assert not re.findall(r'(?:src|href)=(?!"data:,")|https?://|@import|url\(', page)
    assert '<html lang="en">' in page
    assert 'name="viewport"' in page
    assert 'prefers-color-scheme: dark' in page
    for field in re.findall(r'<(?:input|textarea|select)\b[^>]*>', page):
        assert re.search(r'<label\b[^>]*>[^<]*' + re.escape(field), page), field
    for scheme in re.findall(r':root \{(.*?)\}', page, re.DOTALL):
        colours = dict(re.findall(r'--([\w-]+): (#\w{6})', scheme))
        for text, below in [('text', 'page'), ('text', 'card'), ('text', 'mine'), ('soft', 'card'), ('soft', 'page')]:
            assert contrast(colours[text], colours[below]) >= 4.5
        assert contrast(colours['on-accent'], colours['accent']) >= 4.5
        assert contrast(colours['wrong'], colours['card']) >= 4.5
        assert contrast(colours['line'], colours['card']) >= 3


def contrast(one, other):
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'host': '0.0.0.0'}, '--host=0.0.0.0: others can reach this address; expected --api_key'),
        ({'slots': 0}, '--slots=0: expected at least 1'),
        ({'port': 70000}, '--port=70000: expected at most 65535'),
        ({'timeout': 0.0}, '--timeout=0.0: expected seconds'),
    ],
    ids=str,
)
def test_flags_are_checked_before_a_model_is_read(change, message, monkeypatch):
    monkeypatch.delenv('JAXTUNE_API_KEY', raising=False)
    with pytest.raises(UserError, match=re.escape(message)):
        serve.check(flags_of('nowhere', **change))


def test_an_environment_without_the_extra_is_told_what_to_install(monkeypatch):
    monkeypatch.setenv('JAXTUNE_API_KEY', 'k')
    assert serve.check(flags_of('nowhere', host='0.0.0.0')) == 'k'
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=re.escape("expected pip install 'jaxtune[serve]' before")):
        serve.check(flags_of('nowhere'))
    with serve.bind('127.0.0.1', 0) as bound:
        bound.listen()
        with pytest.raises(UserError, match='already in use'):
            serve.bind('127.0.0.1', bound.getsockname()[1])


def test_the_command_serves_until_a_signal(folder):
    words = [sys.executable, '-m', 'jaxtune.main', 'serve', str(folder), '--port=0', '--slots=2']
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith('curl '):
                break
        port = int(re.search(r'http://127\.0\.0\.1:(\d+)', lines[-1])[1])
        body = json.dumps({'model': 'small', 'prompt': 'a', 'max_tokens': 250, 'stream': True, 'temperature': 1.5})
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
        connection.request('POST', '/v1/completions', body, {'Content-Type': 'application/json'})
        response = connection.getresponse()
        assert response.readline().startswith(b'data: {')
        process.send_signal(signal.SIGTERM)
        rest = response.read()
        assert process.wait(60) == 143
        assert b'the server is stopping' in rest or b'[DONE]' in rest
        assert process.stderr.read() == ''
    assert re.search(r'LlamaForCausalLM, [0-9.]+K\s+parameters', ''.join(lines)), lines
