"""EleutherAI's lm-evaluation-harness over a jaxtune model (extra `eval`).

    python -m jaxtune.lm_eval --model jaxtune --model_args path=WORKDIR_OR_FOLDER --tasks arc_easy,gsm8k

Everything after the module's name is the harness's own command line; scores equal those of its `hf` model on the
exported folder.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from jaxtune.common import console
from jaxtune.common.settings import Settings
from jaxtune.data import tokenizer as tokenizers
from jaxtune.errors import UserError
from jaxtune.generation.sampling import Sampling
from jaxtune.generation.slot_sampler import SlotSampler
from jaxtune.parallel import batch_shards, make_mesh, place_all
from jaxtune.pretrained.load import load_model
from jaxtune.recipe import recipes
from jaxtune.tasks import specs

_MULTIPLE = 64  # lengths are padded to a multiple of it, so that few shapes are compiled
_LONGEST = 2048  # for a model without a limit of its own


def _settings(keys: Mapping[str, Any]) -> Settings:
    """The defaults with these keys, flat."""
    config = recipes.defaults()
    recipes.apply_overrides(config, keys)
    return config


class JaxtuneLM(TemplateLM):
    """A decoder behind the harness's interface.

    Args:
      path: a model folder, a hub id or a workdir.
      adapter: an adapter folder, or the workdir that holds one.
      batch_size: rows per batch.
      max_length: maximum length of a row; default: the model's positions.
      dtype: `float32` or `bfloat16`.
      fsdp, tensor: sizes of the mesh; remaining devices are data parallel.
      seed: of sampling.
      recipe: further keys of a recipe, flat.

    Raises:
      UserError: no such model, or it is no decoder.
    """

    def __init__(
        self,
        path: str,
        adapter: str = '',
        batch_size: int | str = 8,
        max_length: int | None = None,
        dtype: str = 'float32',
        fsdp: int = 1,
        tensor: int = 1,
        seed: int = 0,
        recipe: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        keys = {
            'task': 'generate',
            'model.path': path,
            'method.path': adapter,
            'model.param_dtype': dtype,
            'model.compute_dtype': dtype,
        }
        config = _settings(keys | {'mesh.fsdp': fsdp, 'mesh.tensor': tensor, **(recipe or {})})
        self.mesh = make_mesh(config.mesh)
        with jax.set_mesh(self.mesh):
            bundle = load_model(specs.model_spec(config), self.mesh)
        if bundle.model.kind != 'decoder' or 'score' in bundle.params:
            raise UserError(f'path={path}: {bundle.model.architecture} writes no text; expected a decoder')
        self.model, self.params, self.tokenizer = bundle.model, bundle.params, bundle.tokenizer
        self.stop_ids = bundle.end_ids
        per = batch_shards(self.mesh)
        self.batch_size = -(-(8 if batch_size == 'auto' else int(batch_size)) // per) * per
        self.max_length = int(max_length or min(self.model.config.max_positions or _LONGEST, 2**20))
        self.key = jax.random.key(int(seed))
        self._score = jax.jit(self._scores)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without context: the tokenizer's BOS, else its EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, for the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace('/', '__')

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; a leading prefix token is not repeated.

        Raises:
          UserError: the model has no row for one of them.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        if max(ids, default=0) >= (rows := self.model.config.vocab_size):
            raise UserError(f'{string!r:.60} {tokenizers.no_row(self.tokenizer, max(ids), rows)}')
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation rendered with the tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _scores(self, params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Log-probability of every target and whether it is the most likely token, both `[batch, length]`."""
        hidden = self.model.apply(params, batch).hidden

        def score_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden, targets = row
            logits = self.model.logits(params, hidden)
            picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            return picked - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == targets

        return jax.lax.map(score_row, (hidden, batch['targets']))

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices of rows by batch, the longest first, so that rows of a batch have similar lengths."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            whole = (context + continuation)[-(self.max_length + 1) :]
            rows.append((whole[:-1], whole[1:], min(len(continuation), len(whole) - 1)))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        with console.progress(0 if disable_tqdm else len(rows), 'loglikelihood', 'request') as bar:
            for numbers in self._batches([len(row[0]) for row in rows]):
                width = -(-max(1, *(len(rows[i][0]) for i in numbers)) // _MULTIPLE) * _MULTIPLE
                batch = {
                    name: np.zeros((self.batch_size, width), np.int32) for name in ('tokens', 'targets', 'segment_ids')
                }
                for at, number in enumerate(numbers):
                    inputs, targets, _ = rows[number]
                    batch['tokens'][at, : len(inputs)] = inputs
                    batch['targets'][at, : len(targets)] = targets
                    batch['segment_ids'][at, : len(inputs)] = 1
                with jax.set_mesh(self.mesh):
                    placed = place_all(batch, self.mesh)
                    logprobs, greedy = (np.asarray(x) for x in self._score(self.params, placed))
                for at, number in enumerate(numbers):
                    _, targets, scored = rows[number]
                    span = slice(len(targets) - scored, len(targets))
                    answers[number] = (float(logprobs[at, span].sum(dtype=np.float64)), bool(greedy[at, span].all()))
                bar.advance(len(numbers))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of which each token is scored once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions up to the first stop text."""
        answers = [''] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        with console.progress(0 if disable_tqdm else len(requests), 'generate', 'request') as bar:
            for numbers in groups.values():
                kwargs: dict[str, Any] = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], 256))
                eos = self.tokenizer.decode(self.eot_token_id)
                until = handle_stop_sequences(kwargs.get('until'), eos=eos)
                room = kwargs['max_gen_toks']
                if room >= self.max_length:
                    raise UserError(f'max_gen_toks={room}: expected less than the {self.max_length} positions')
                prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - room) :] for i in numbers]
                pad = self.tokenizer.pad_token_id or 0
                sampling = Sampling(
                    max_new_tokens=room,
                    temperature=float(kwargs.get('temperature') or 0.0),
                    top_k=int(kwargs.get('top_k') or 0),
                    top_p=float(kwargs.get('top_p') or 1.0),
                    stop_ids=self.stop_ids,
                    pad_id=pad if pad < self.model.config.vocab_size else 0,
                )
                texts = self._complete(prompts, sampling)
                for i, text in zip(numbers, texts, strict=True):
                    answers[i] = postprocess_generated_text(text, until, None)
                bar.advance(len(numbers))
        return answers

    def _complete(self, prompts: list[list[int]], sampling: Sampling) -> list[str]:
        self.key, key = jax.random.split(self.key)
        with jax.set_mesh(self.mesh):
            sampler = SlotSampler(self.model, sampling, self.mesh, self.batch_size, key)
            done = sampler([self.params], prompts)
        rows = zip(done.tokens, done.lengths, strict=True)
        return [self.tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True) for tokens, length in rows]


def main() -> None:
    """The harness's own command line, with the model `jaxtune`."""
    from lm_eval.__main__ import cli_evaluate  # of the eval extra

    cli_evaluate()


if __name__ == '__main__':
    # Read a second time, under its importable name, which alone registers the class.
    import jaxtune.lm_eval  # registers the model

    jaxtune.lm_eval.main()
else:
    register_model('jaxtune')(JaxtuneLM)
