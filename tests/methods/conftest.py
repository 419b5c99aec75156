"""A small Llama in PyTorch, saved once, for what is compared with `peft` and `bitsandbytes`."""

import pathlib

import pytest

FIELDS = {
    'vocab_size': 97, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 3, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'max_position_embeddings': 64, 'tie_word_embeddings': False, 'bos_token_id': 1,
    'eos_token_id': 2, 'pad_token_id': 0,
}  # fmt: skip


@pytest.fixture(scope='session')
def llama(tmp_path_factory) -> pathlib.Path:
    """A folder with a random Llama of three layers."""
    torch = pytest.importorskip('torch')
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**FIELDS))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp('llama')
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def token_bases(tmp_path_factory):
    """A folder of each kind of `added_tokens`, made at its first use."""
    from added_tokens import make_base

    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp('bases') / kind
            make_base(made[kind], kind)
        return made[kind]

    return make


@pytest.fixture(scope='session')
def token_texts(tmp_path_factory) -> pathlib.Path:
    """Texts that hold the tokens of `added_tokens`."""
    from added_tokens import write_texts

    folder = tmp_path_factory.mktemp('texts')
    write_texts(folder)
    return folder
