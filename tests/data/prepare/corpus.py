"""Planted truth: texts of made-up words, and what is hidden among them."""

import random

_SYLLABLES = (
    'ba be bi bo da de di do fa fe ga go ka ki la le lo ma mi mo na ne ni no pa po ra re ri ro sa se si ta te to'
)


def words(count, seed):
    """Words as English as such words can be: function words between them."""
    source = random.Random(seed)
    found = []
    for i in range(count):
        if i % 3 == 0:
            found.append(source.choice(('the', 'of', 'and', 'to', 'that', 'have', 'with', 'be')))
        else:
            found.append(''.join(source.choices(_SYLLABLES.split(), k=source.randint(2, 4))))
    return found


def prose(count, seed):
    """Sentences of about twelve words, in paragraphs of five sentences."""
    found, source = words(count, seed), random.Random(f'{seed} lengths')
    sentences, i = [], 0
    while i < len(found):
        length = source.randint(8, 16)
        sentences.append(' '.join(found[i : i + length]).capitalize() + '.')
        i += length
    return '\n\n'.join(' '.join(sentences[j : j + 5]) for j in range(0, len(sentences), 5))


def altered(text, similarity, seed):
    """A copy in which words are replaced until the 5-word shingles have about this Jaccard similarity."""
    # Of n words, k replaced ones spoil some 5k shingles: J = (n - 5k) / (n + 5k).
    found, source = text.split(' '), random.Random(f'{seed} altered')
    count = round(len(found) * (1 - similarity) / (1 + similarity) / 5)
    step = len(found) / max(1, count)
    for i in range(count):
        found[int((i + source.random() * 0.2 + 0.4) * step)] = f'zu{source.randrange(10**6)}'
    return ' '.join(found)


def shingles(text, n=5):
    found = text.lower().replace('.', '').split()
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def jaccard(left, right):
    left, right = shingles(left), shingles(right)
    return len(left & right) / len(left | right)
