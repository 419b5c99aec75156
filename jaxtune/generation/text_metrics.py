"""Scores of generated texts against what the data expected.

Exact match is computed here; BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's, where it is installed
(the extra `eval`).
"""

import importlib.util
from collections.abc import Sequence


def exact(completion: str, reference: str) -> float:
    """1.0 if both texts are equal without surrounding white space, else 0.0."""
    return float(completion.strip() == reference.strip())


def scores(completions: Sequence[str], references: Sequence[str], tokenize: str) -> dict[str, float]:
    """Corpus-level scores of completions, by name.

    Args:
      completions: the generated texts.
      references: one for each.
      tokenize: BLEU's tokenizer: `13a`, `zh`, `ja-mecab`, `char`, …

    Returns:
      `exact_match` between 0 and 1, and `bleu` and `chrf` between 0 and 100 if sacrebleu is installed.
    """
    pairs = zip(completions, references, strict=True)
    values = {'exact_match': sum(exact(*pair) for pair in pairs) / len(references)}
    if importlib.util.find_spec('sacrebleu'):
        import sacrebleu  # of the eval extra

        texts = [text.strip() for text in completions]
        # force: no warning where references look tokenised.
        bleu = sacrebleu.corpus_bleu(texts, [list(references)], tokenize=tokenize, force=True)
        values |= {'bleu': bleu.score, 'chrf': sacrebleu.corpus_chrf(texts, [list(references)]).score}
    return values
