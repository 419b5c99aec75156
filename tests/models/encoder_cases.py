"""Small random encoders of every family, with each head. A new family joins by a row (or a few) in `CASES`."""

import dataclasses
import functools
import os
import pathlib

os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

LABELS = 5
_BERT = {
    'vocab_size': 97,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'max_position_embeddings': 64,
    'pad_token_id': 0,
}
_BASE = {
    'distilbert': {
        'vocab_size': 97,
        'dim': 32,
        'hidden_dim': 48,
        'n_layers': 3,
        'n_heads': 4,
        'max_position_embeddings': 64,
        'pad_token_id': 0,
    }
}
AUTO = {
    'lm': 'AutoModelForMaskedLM',
    'classification': 'AutoModelForSequenceClassification',
    'token_classification': 'AutoModelForTokenClassification',
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A family with one head and one choice of its options."""

    name: str
    model_type: str
    head: str
    fields: dict[str, object]

    @property
    def config(self) -> dict:
        return {'model_type': self.model_type, **_BASE.get(self.model_type, _BERT), **self.fields}


def _cases(name: str, *heads: str, **fields) -> list[Case]:
    return [Case(f'{name}-{head}', name.split('-')[0].replace('_', '-'), head, fields) for head in heads or AUTO]


CASES = (
    *_cases('bert'),
    *_cases('bert-untied', 'lm', tie_word_embeddings=False, hidden_act='relu'),
    *_cases('roberta', pad_token_id=1),
    *_cases('xlm_roberta', pad_token_id=1),
    *_cases('camembert', pad_token_id=1),
    *_cases('distilbert'),
    *_cases('modernbert', local_attention=6),
    *_cases('modernbert-mean', 'classification', local_attention=6, classifier_pooling='mean'),
    *_cases(
        'modernbert-biased-untied',
        local_attention=6,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        classifier_bias=True,
        tie_word_embeddings=False,
    ),
    *_cases('modernbert-global', 'lm', layer_types=['full_attention'] * 4, decoder_bias=False),
)


@functools.cache
def reference(case: Case, folder: pathlib.Path):
    """`transformers`' model in PyTorch with random weights, saved to `folder` as well."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {name: value for name, value in case.config.items() if name != 'model_type'}
    if case.head != 'lm':
        fields['num_labels'] = LABELS
    torch.manual_seed(0)
    config = CONFIG_MAPPING[case.model_type](**fields)
    model = getattr(transformers, AUTO[case.head]).from_config(config, attn_implementation='eager')
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            # Large enough that every bias and norm shows in the logits.
            parameter.copy_(0.2 * noise + ('norm' in name.lower() and 'weight' in name) * parameter)
    model.eval()
    model.save_pretrained(folder)
    return model
