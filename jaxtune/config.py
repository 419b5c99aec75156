"""Every key of a recipe: its default, the values it takes, and what it means."""

import dataclasses
from typing import Any

from jaxtune.common import sources
from jaxtune.common.checks import (
    Check,
    axis_size,
    boolean,
    counts,
    described,
    integer,
    layers,
    names,
    names_if_any,
    number,
    one_of,
    one_or_several,
    path,
    path_list,
    path_names,
    pattern,
    plugin,
    ranks,
    template,
    text,
    updates,
)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    default: Any
    check: Check
    comment: str


class Sources(Key):
    """A key whose value is a path, or a mapping of sources, whose fields may be named: `data.train.LABEL.weight`."""


class OpenSubtree:
    """A subtree with keys of its own, which this schema does not name (Hugging Face fields, labels of sources)."""

    def __init__(self, comment: str) -> None:
        self.comment = comment


_dtype = one_of('float32', 'bfloat16')
_WIDE, _LONG = 2**20, 2**24  # limits of rows and of tokens per row, beyond what any machine holds

TASKS = ('prepare', 'train', 'evaluate', 'generate', 'export', 'compile')  # beside the algorithms of `rl`


def is_rewarded(task: str) -> bool:
    """Whether a task learns from rewards: it names an algorithm, or `module:NAME`."""
    return task not in TASKS


def trains(task: str) -> bool:
    """Whether a task changes weights."""
    return task == 'train' or is_rewarded(task)


SCHEMA: dict[str, Key | OpenSubtree] = {
    'task': Key(
        'train',
        plugin('prepare', 'train', 'jaxtune.rl:ALGORITHMS', 'evaluate', 'generate', 'export', 'compile'),
        'the task to run',
    ),
    'seed': Key(0, integer(0, high=2**32 - 1), 'seed of initialisation, data order and sampling'),
    'model.path': Key('', path, 'a Hugging Face folder, a hub id, a jaxtune workdir, @STAGE; empty = from scratch'),
    'model.config': OpenSubtree(
        "Hugging Face config fields: from scratch with model_type; with model.path, over its config.json's"
    ),
    'model.family': Key('', text, 'module:NAME of your own Family, for a model_type that is not shipped'),
    'model.param_dtype': Key('float32', _dtype, 'dtype of the weights; norms, biases and optimizer state stay float32'),
    'model.compute_dtype': Key('float32', _dtype, 'dtype of activations and matrix products'),
    'model.remat': Key(
        'dots',
        one_or_several('none', 'full', 'dots', 'offload', names='jaxtune.models.remat:NAMES'),
        "activation checkpointing, what a layer keeps beside its input: none = all, full = attention's output, dots = "
        "that and matmul outputs, offload = full's, all in the host's memory; or names with commas: qkv, attn_out, "
        'attn_proj (after o_proj), mlp_in (gate and up), mlp_out',
    ),
    'model.attention': Key('auto', one_of('auto', 'xla', 'flash'), 'attention kernel; the one used is logged'),
    'model.matmul': Key(
        '',
        one_of('', 'fp8', 'int8'),
        'what linear layers multiply in, quantised as they go: fp8, int8; empty = model.compute_dtype',
    ),
    'tokenizer.path': Key('', path, "default: the model's own; @prepare; bytes = UTF-8 bytes, no file needed"),
    'tokenizer.add': Key(
        (),
        described,
        'tokens to add, which the model grows by: names, or name -> description whose mean embedding they begin as',
    ),
    'objective': Key(
        'causal_lm',
        plugin('jaxtune.objectives:OBJECTIVES'),
        'training objective',
    ),
    'masked_lm.probability': Key(0.15, number(above=0, high=1), 'masked_lm: share of the tokens that are masked'),
    'masked_lm.whole_word': Key(False, boolean, 'masked_lm: mask all tokens of a word together'),
    'span_corruption.mode': Key(
        'spans', one_of('spans', 'prefix', 'ul2'), "span_corruption: T5's spans, prefix LM, or UL2's mixture"
    ),
    'span_corruption.density': Key(0.15, number(above=0, high=0.9), 'spans: share of the tokens that are corrupted'),
    'span_corruption.mean_length': Key(3.0, number(1), 'spans: mean length of a corrupted span'),
    'seq2seq.prefix': Key('', text, 'seq2seq: task prefix, put before every source'),
    'sft.train_on': Key(
        'all',
        one_of('all', 'last', 'marked'),
        'sft: train on every answer of a conversation but those with train: false, the last, or those with train: true',
    ),
    'sft.system': Key('', text, 'system prompt of conversations without one; for preferences and generate too'),
    'sft.demonstrations': Key('', path, 'few-shot conversations put before every other one; never trained on'),
    'sft.neftune_alpha': Key(0.0, number(0), 'sft: noise on the embeddings in training (NEFTune); 5 is usual, 0 = off'),
    'reward.center': Key(0.0, number(0), 'reward: weight of the squared sum of both rewards, which centers them on 0'),
    'reward.label_smoothing': Key(0.0, number(0, 0.5), 'reward: assumed share of pairs labelled the wrong way round'),
    'dpo.loss': Key('sigmoid', one_of('sigmoid', 'ipo', 'hinge', 'kto', 'orpo', 'simpo'), 'preference loss'),
    'dpo.beta': Key(
        0.1, number(above=0), 'dpo: strength of the KL penalty to the reference (orpo: weight of the odds ratio)'
    ),
    'dpo.reference': Key('', path, 'dpo: reference model: folder, workdir, @STAGE; empty = the initial model'),
    'dpo.label_smoothing': Key(
        0.0, number(0, 0.49), 'sigmoid, simpo: assumed share of pairs labelled the wrong way round'
    ),
    'dpo.gamma': Key(0.5, number(0), 'simpo: reward margin'),
    'dpo.chosen_weight': Key(1.0, number(0), 'kto: weight of desirable answers'),
    'dpo.rejected_weight': Key(1.0, number(0), 'kto: weight of undesirable answers'),
    'distill.teacher': Key('', path, "distill: teacher: folder, workdir, hub id, @STAGE; with the student's tokenizer"),
    'distill.beta': Key(
        0.0,
        number(0, 1),
        'distill: divergence from the teacher: 0 = forward KL, 1 = reverse KL, between = generalised Jensen-Shannon',
    ),
    'distill.temperature': Key(
        1.0, number(above=0), "distill: both sides' logits are divided by it in the divergence, which is not rescaled"
    ),
    'distill.weight': Key(
        0.5,
        number(0, 1),
        "distill: the loss is (1 - weight) x the data's cross-entropy + weight x the divergence; 1 = the teacher alone",
    ),
    'custom': OpenSubtree('settings of your own objective, named as module:NAME'),
    'method.name': Key('full', plugin('jaxtune.methods:METHODS'), 'tuning method'),
    'method.rank': Key(16, integer(1, high=_WIDE), 'LoRA: rank of the update'),
    'method.alpha': Key(32.0, number(above=0), 'LoRA: the update is scaled by alpha / rank'),
    'method.dropout': Key(0.0, number(0, 0.99), 'LoRA: dropout on the input of the update'),
    'method.targets': Key(
        'all-linear', names, "LoRA: target modules: 'all-linear', Hugging Face module names, or both"
    ),
    'method.also_train': Key(
        '',
        names_if_any,
        'modules that train whole beside what the method adds, by Hugging Face names such as gate,lm_head',
    ),
    'method.layers': Key('all', layers, "LoRA: layers to adapt: 'all' or a range such as 4:8"),
    'method.rslora': Key(False, boolean, 'LoRA: scale by alpha / sqrt(rank) (rsLoRA)'),
    'method.dora': Key(False, boolean, 'LoRA: train magnitudes and directions separately (DoRA)'),
    'method.ranks': Key('', ranks, 'LoRA: ranks by module, such as q_proj=4,layers.0.mlp.up_proj=2'),
    'method.init': Key(
        'default', one_of('default', 'pissa', 'loftq'), 'LoRA: initialisation: update of zero, PiSSA, or LoftQ'
    ),
    'method.lr_ratio': Key(1.0, number(above=0), 'LoRA+: ratio of the learning rates of B and A'),
    'method.path': Key(
        '', path_list, 'adapter folder or workdir to start from; generate: several, separated by commas'
    ),
    'method.share_experts': Key(False, boolean, 'LoRA: one update for all experts of a layer, not one for each'),
    'method.block_size': Key(64, integer(16, high=_WIDE), 'NF4: block size, the number of weights that share a scale'),
    'method.double_quant': Key(True, boolean, 'NF4: double quantisation, of the scales too'),
    'method.bottleneck': Key(64, integer(1, high=_WIDE), 'adapter: bottleneck width'),
    'method.placement': Key(
        'houlsby',
        one_of('houlsby', 'pfeiffer'),
        'adapter: after attention and feed-forward, or after feed-forward only',
    ),
    'method.virtual_tokens': Key(20, integer(1, high=_WIDE), 'prompt tuning: number of virtual tokens'),
    'method.init_text': Key('', text, 'prompt tuning: text whose embeddings initialise them; empty = random'),
    'method.prefix': Key(False, boolean, 'prompt tuning: train keys and values of every layer instead (prefix tuning)'),
    'data.train': Sources(
        '',
        sources.check,
        'training data: a path, glob, folder, dataset id, python-stdlib or @STAGE; several by weight: a mapping, label '
        "-> a path, or path, weight, format, text_key, source_key, target_key; or 'a.jsonl:0.7,b.jsonl:0.3'",
    ),
    'data.eval': Sources(
        '',
        sources.check,
        'held-out data, given the same way; auto = a share of data.train; prompts of generate',
    ),
    'data.format': Key('auto', one_of(*sources.FORMATS), 'format of the records'),
    'data.template': Key('auto', template, "chat template: auto (the tokenizer's), a name, or Jinja"),
    'data.template_args': OpenSubtree('what else the template is given: enable_thinking, a date, tools, documents, …'),
    'data.seq_len': Key(512, integer(2, high=_LONG), 'sequence length, in tokens'),
    'data.packing': Key(True, boolean, 'pack several documents into a row; attention stays within each'),
    'data.append_eos': Key(True, boolean, 'append EOS to each text document'),
    'data.text_key': Key('text', text, 'field of a record that holds its text'),
    'data.source_key': Key('source', text, 'field of a pair that holds the source'),
    'data.target_key': Key('target', text, 'field of a pair that holds the target'),
    'data.target_len': Key(0, integer(0, high=_LONG), 'target length, in tokens; 0 = data.seq_len'),
    'data.eval_fraction': Key(0.02, number(0, 0.5), 'prepare, and data.eval=auto: share of the records to hold out'),
    'data.min_chars': Key(1, integer(0), 'prepare: minimum length of a document, in characters'),
    'data.vocab_size': Key(8192, integer(300, high=_LONG), 'prepare: size of the vocabulary to train'),
    'data.sources': OpenSubtree('prepare: sources, label -> a path, or path, kind, weight, preset, language, text_key'),
    'data.steps.extract.favour': Key(
        'balance', one_of('balance', 'precision', 'recall'), 'web pages: what extraction favours'
    ),
    'data.steps.extract.seconds': Key(
        30.0, number(above=0), 'web pages: time limit of a page in seconds; slower ones are set aside'
    ),
    'data.steps.clean.encoding': Key(False, boolean, 'prepare: fix text decoded with the wrong encoding (ftfy)'),
    'data.steps.clean.unicode': Key(
        False, boolean, 'prepare: normalise to Unicode NFC and \\n, remove control characters'
    ),
    'data.steps.clean.markup': Key(False, boolean, 'prepare: remove markup remnants, bare URLs and e-book licences'),
    'data.steps.clean.pii': Key(False, boolean, 'prepare: mask email addresses, IP addresses and telephone numbers'),
    'data.steps.language.keep': Key((), names, "prepare: languages to keep, such as ('en', 'zh'); () = all"),
    'data.steps.language.model': Key('', path, "prepare: fastText model file; '' = identify by scripts and stop words"),
    'data.steps.language.min_score': Key(0.5, number(0, 1), 'prepare: minimum confidence of the identified language'),
    'data.steps.filter.preset': Key(
        'none',
        one_of('none', 'auto', 'web', 'books', 'code', 'zh'),
        "prepare: quality rules; auto = by the source's kind",
    ),
    'data.steps.filter.max_chars': Key(
        0, integer(0), 'prepare: maximum length of a document, in characters; 0 = no limit'
    ),
    'data.steps.filter.blocklist': Key('', path, 'prepare: file of words, phrases and domains to block, one per line'),
    'data.steps.filter.custom': Key('', text, 'prepare: module:function of a text and its metadata; False drops it'),
    'data.custom_steps': Key(
        (), names, 'prepare: your own steps, run after the filters: module:NAME or file.py:NAME of a Step'
    ),
    'data.steps.dedup.near': Key(
        0.0, number(0, 1), 'prepare: Jaccard similarity threshold of near-duplicates; 0 = off'
    ),
    'data.steps.dedup.ngram': Key(5, integer(1, high=1000), 'prepare: words per shingle'),
    'data.steps.dedup.hashes': Key(
        256, integer(16, high=2**13), 'prepare: MinHash values per document; bands follow from the threshold'
    ),
    'data.steps.dedup.paragraphs': Key(
        0, integer(0), 'prepare: remove repeats of a paragraph that more documents than this contain; 0 = off'
    ),
    'data.steps.dedup.substring': Key(
        0, integer(0), 'prepare: remove repeated substrings of this many words; 50 is usual, 0 = off'
    ),
    'data.steps.decontaminate.against': Key(
        (), path_names, 'prepare: evaluation files; documents that overlap with them are removed'
    ),
    'data.steps.decontaminate.ngram': Key(13, integer(3, high=1000), 'prepare: length of an overlap, in words'),
    'data.steps.tokenizer.model': Key('bpe', one_of('bpe', 'unigram'), 'prepare: tokenizer algorithm'),
    'data.steps.tokenizer.special_tokens': Key((), names, 'prepare: additional special tokens of the vocabulary'),
    'data.steps.tokenizer.sample_bytes': Key(
        1 << 30, integer(1, high=2**62), 'prepare: bytes of text to train the tokenizer on'
    ),
    'data.steps.limits.broken': Key(
        1000, integer(0), 'prepare: maximum number of broken files and records before it fails'
    ),
    'data.steps.limits.document_bytes': Key(
        32 << 20, integer(1, high=2**62), 'prepare: maximum size of a record or page; larger ones are set aside'
    ),
    'data.steps.build.shard_tokens': Key(1 << 30, integer(1, high=2**62), 'prepare: maximum number of tokens per file'),
    'data.engine': Key('local', one_of('local', 'slurm', 'ray'), 'prepare: executor'),
    'data.workers': Key(0, integer(0, high=2**12), 'prepare: number of processes; 0 = one per core'),
    'data.slurm.partition': Key('', text, 'slurm: partition'),
    'data.slurm.time': Key('24:00:00', text, 'slurm: time limit per task'),
    'data.slurm.memory_gb': Key(4, integer(1), 'slurm: memory per task'),
    'data.slurm.setup': Key('', text, 'slurm: shell command that makes jaxtune importable'),
    'data.slurm.dry_run': Key(False, boolean, 'slurm: print the scripts instead of submitting them'),
    'train.steps': Key(0, integer(0), 'number of updates; 0 = from train.epochs'),
    'train.epochs': Key(
        1.0,
        number(above=0, high=1e6),
        'passes over the data if train.steps is 0; one of a mixture has as many rows as its sources together',
    ),
    'train.batch_size': Key(8, integer(1, high=_WIDE), 'global batch size, in sequences per update'),
    'train.accumulate': Key(
        'auto',
        integer(1, 'auto', high=_WIDE),
        'gradient accumulation: micro-batches per update; auto = the fewest that fit in memory',
    ),
    'optimizer.name': Key('adamw', one_of('adamw', 'adamw8bit', 'adafactor', 'lion', 'muon', 'sgd'), 'optimizer'),
    'optimizer.lr': Key(2e-5, number(above=0), 'peak learning rate of pretrained weights (from scratch: of all)'),
    'optimizer.new_lr': Key(
        1e-4, number(above=0), 'peak learning rate of newly initialised heads; rows of tokenizer.add have optimizer.lr'
    ),
    'optimizer.schedule': Key(
        'cosine', one_of('cosine', 'linear', 'constant', 'wsd'), 'learning-rate schedule after the warm-up'
    ),
    'optimizer.warmup_steps': Key(0, integer(0), 'number of warm-up updates, from 0'),
    'optimizer.min_ratio': Key(0.1, number(0, 1), 'cosine: final learning rate as a share of the peak'),
    'optimizer.decay_ratio': Key(0.2, number(0, 1), 'wsd: share of the updates, at the end, over which it decays to 0'),
    'optimizer.weight_decay': Key(0.01, number(0), 'decoupled weight decay; kernels and embeddings only'),
    'optimizer.b1': Key(
        'auto',
        number(0, 0.99999, 'auto'),
        "decay of the first moment (sgd, muon: momentum); auto = the optimizer's paper's",
    ),
    'optimizer.b2': Key(
        'auto',
        number(0, 0.99999, 'auto'),
        "decay of the second moment (lion: of its only one); auto = the optimizer's paper's",
    ),
    'optimizer.eps': Key(
        'auto',
        number(None, None, 'auto', above=0),
        'added to the root of the second moment (adafactor: to the squared gradient); auto as above',
    ),
    'optimizer.clip_norm': Key(1.0, number(0), 'gradient clipping by global norm; 0 = off'),
    'optimizer.offload': Key(
        False, boolean, 'keep optimizer state in pinned host memory: a layer of it on the device at a time'
    ),
    'eval.every': Key(0, integer(0), 'updates between evaluations; 0 = only at the end'),
    'eval.batches': Key(0, integer(0), 'maximum number of batches per evaluation, of each source; 0 = all'),
    'eval.batch_size': Key(0, integer(0, high=_WIDE), 'sequences per batch; 0 = as in a training micro-batch'),
    'eval.by_position': Key(
        0,
        integer(0, high=2**12),
        'causal_lm, sft: loss by position in a document, in so many equal buckets of data.seq_len; 0 = off',
    ),
    'eval.patience': Key(0, integer(0), 'early stopping: evaluations without improvement; 0 = off'),
    'eval.samples': Key(
        0, integer(0, high=_WIDE), 'held-out prompts to sample before and after training, for the report; 0 = off'
    ),
    'eval.metric': Key(
        'eval/loss', text, 'metric of the best checkpoint; higher is better for accuracies and rewards, lower otherwise'
    ),
    'checkpoint.every': Key(0, integer(0), 'updates between checkpoints; 0 = at evaluations and at the end'),
    'checkpoint.keep': Key(1, integer(1), 'number of newest checkpoints to keep, besides the best by eval.metric'),
    'generate.max_new_tokens': Key(128, integer(1, high=_LONG), 'maximum length of a completion'),
    'generate.temperature': Key(1.0, number(0), 'sampling temperature; 0 = greedy'),
    'generate.top_k': Key(0, integer(0), 'sample from the k most likely tokens; 0 = all'),
    'generate.top_p': Key(
        1.0, number(above=0, high=1), 'nucleus sampling: from the most likely tokens of this total probability'
    ),
    'generate.samples': Key(1, integer(1, high=_WIDE), 'completions per prompt'),
    'generate.prompts': Key(0, integer(0), 'maximum number of prompts; 0 = all'),
    'generate.prompt_tokens': Key(
        0, integer(0), 'number of leading tokens of each text that are the prompt; 0 = the whole text'
    ),
    'generate.beams': Key(1, integer(1, high=2**10), 'beam search: number of beams; 1 = off'),
    'generate.length_penalty': Key(1.0, number(), 'beam search: log-probabilities are divided by length to this power'),
    'generate.batch_size': Key(
        8, integer(1, high=_WIDE), 'completions written at a time: slots that are refilled; prompts per batch of beams'
    ),
    'generate.bleu_tokenize': Key(
        '13a', one_of('13a', 'zh', 'intl', 'char', 'none'), 'tokenizer of BLEU; zh for Chinese'
    ),
    'rl.reward': Key(
        '',
        path_list,
        'reward: a reward model (workdir, folder, @STAGE), module:function, file.py:function, math, format, exact, '
        'length, code; or several with weights, NAME:WEIGHT,NAME:WEIGHT',
    ),
    'rl.reward_timeout': Key(
        600.0, number(above=0), 'time limit of a reward function, or an environment, per call, in seconds'
    ),
    'rl.format_pattern': Key(
        'think', pattern, 'format: tags in their order, such as think,answer; or a regular expression of whole answers'
    ),
    'rl.length_target': Key(
        1000, integer(1), 'length: characters up to which an answer is worth 1; it is worth 0 from twice as many on'
    ),
    'rl.code_seconds': Key(5.0, number(above=0, high=3600), "code: time limit of an answer's program"),
    'rl.code_memory': Key(512, integer(64, high=2**20), 'code: MiB of memory that the program may have'),
    'rl.code_unsafe': Key(
        False, boolean, 'code: run programs without namespaces where the system has none: they can read and send files'
    ),
    'rl.environment': Key(
        '',
        plugin('', 'jaxtune.rl:ENVIRONMENTS'),
        'what answers the turns of a completion: calculator, python, guess, module:NAME or file.py:NAME; its rewards '
        "are added to rl.reward, which may then be ''",
    ),
    'rl.max_turns': Key(8, integer(1, high=1024), 'environment: turns of the model at most'),
    'rl.rollouts': Key(64, integer(1, high=_WIDE), 'completions sampled per step'),
    'rl.group': Key(8, integer(2, high=_WIDE), 'completions per prompt, but with rl.advantage=gae'),
    'rl.advantage': Key(
        'auto',
        one_of('auto', 'gae', 'group', 'group_mean', 'leave_one_out'),
        'what a completion is measured by: a value head (gae; auto for ppo), the mean and deviation of its group '
        '(group; auto for grpo), the mean (group_mean: Dr. GRPO), the others (leave_one_out: RLOO)',
    ),
    'rl.ratio': Key(
        'token', one_of('token', 'sequence'), 'probability ratio that is clipped: of a token, or of a completion (GSPO)'
    ),
    'rl.normalise': Key(
        'auto',
        one_of('auto', 'answer', 'token', 'constant'),
        'what counts the same in the loss: a completion (answer; auto for grpo), a token (token; auto for ppo), or a '
        'token over generate.max_new_tokens (constant: Dr. GRPO)',
    ),
    'rl.epochs': Key(
        4, integer(1, high=_WIDE), 'passes over the completions of a step, in updates of train.batch_size'
    ),
    'rl.kl_coef': Key(0.05, number(0), 'strength of the KL penalty to the initial policy'),
    'rl.kl': Key(
        'auto',
        one_of('auto', 'k1', 'k2', 'k3'),
        'estimator of that divergence (Schulman 2020): auto = k1 in the reward, k3 in the loss',
    ),
    'rl.kl_in': Key(
        'auto', one_of('auto', 'reward', 'loss'), 'where the KL penalty is: auto = in the reward for ppo, else the loss'
    ),
    'rl.clip': Key(0.2, number(above=0), 'clip range of the probability ratio'),
    'rl.clip_high': Key('auto', number(0, None, 'auto'), 'its range above 1 (DAPO); 0 or auto = rl.clip'),
    'rl.dual_clip': Key(
        0.0, number(0), 'limit of the ratio where the advantage is negative (dual-clip PPO), such as 3; 0 = off'
    ),
    'rl.entropy_coef': Key(0.0, number(0), 'weight of the entropy of the policy, which the loss then raises'),
    'rl.skip_equal': Key(
        False, boolean, 'learn nothing from groups whose rewards are all equal (DAPO), nor count them in the mean'
    ),
    'rl.resample': Key(
        0,
        integer(0, high=100),
        'rounds, at most, that ask new prompts in the place of those whose rewards are all equal (DAPO); 0 = none',
    ),
    'rl.overlong': Key(
        '',
        one_of('', 'mask', 'soft'),
        'completions cut at max_new_tokens: mask = not learnt from; soft = a growing penalty before it (DAPO)',
    ),
    'rl.overlong_buffer': Key(
        0, integer(0), 'soft: last tokens of max_new_tokens over which the penalty grows to 1; 0 = a fifth of them'
    ),
    'rl.value_coef': Key(0.1, number(0), 'ppo: weight of the value loss'),
    'rl.value_clip': Key(0.2, number(0), 'ppo: clip range of the values; 0 = off'),
    'rl.gamma': Key(1.0, number(0, 1), 'ppo: discount factor'),
    'rl.gae_lambda': Key(0.95, number(0, 1), 'ppo: lambda of generalised advantage estimation'),
    'rl.missing_eos_penalty': Key(0.0, number(0), 'penalty on the reward of completions cut at max_new_tokens'),
    'moe.aux_loss': Key(
        'auto',
        number(0, None, 'auto'),
        "weight of the experts' load-balancing loss; auto = the config's router_aux_loss_coef if output_router_logits",
    ),
    'moe.z_loss': Key(0.0, number(0), "weight of the z-loss of the routers' logits"),
    'moe.bias_rate': Key(0.0, number(0), 'step of the bias that evens out experts without a loss (DeepSeek-V3)'),
    'mesh.data': Key(-1, axis_size, 'data parallelism: copies of the model'),
    'mesh.fsdp': Key(1, axis_size, 'fully sharded data parallelism: parameters and rows are sharded'),
    'mesh.tensor': Key(1, axis_size, 'tensor parallelism: heads and widths are sharded'),
    'mesh.sequence': Key(1, axis_size, 'sequence parallelism: length and parameters are sharded'),
    'mesh.expert': Key(1, axis_size, 'expert parallelism: experts are sharded, and rows'),
    'mesh.auto': Key(
        False, boolean, 'train, compile: sizes that are not given are those of the least estimated seconds, compiled'
    ),
    'mesh.slices': Key(
        1, axis_size, 'groups of chips joined by a slower network; data runs over them; -1 = as the devices say'
    ),
    'compile.topology': Key(
        '',
        text,
        'hardware to compile for without having it: v5e-16, v5p:2x2x1, h200x8, …; several, with commas, make a table',
    ),
    'compile.methods': Key('', names_if_any, 'tuning methods of the table, such as full,lora; empty = method.name'),
    'compile.seq_lens': Key('', counts, 'sequence lengths of the table, such as 2048,8192; empty = data.seq_len'),
    'compile.rows_per_device': Key(
        0, integer(0, high=_WIDE), 'sequences of an update for each device; 0 = train.batch_size over all of them'
    ),
    'export.dtype': Key(
        'auto', one_of('auto', 'float32', 'bfloat16'), 'dtype of exported weights; auto = that of model.path'
    ),
    'export.format': Key(
        'safetensors', one_of('safetensors', 'gguf'), "export: gguf writes llama.cpp's model.gguf into the folder too"
    ),
    'export.quantise': Key(
        '', one_of('', 'q8_0', 'q4_0', 'q4_k'), 'gguf: format of its matrices: q8_0, q4_0, q4_k; empty = export.dtype'
    ),
    'export.requantise': Key(False, boolean, 'export: quantise merged kernels to NF4 again, and report the error'),
    'log.every': Key(10, integer(1), 'updates between lines of metrics.jsonl'),
    'log.wandb': Key(False, boolean, 'log metrics to Weights & Biases too'),
    'log.profile': Key('', updates, "profile these updates, the first to the last, such as '10:15'; '' = none"),
    'log.hang_seconds': Key(
        600.0, number(0), 'report an update that takes longer, and ten times longer than the last ones; 0 = off'
    ),
}
