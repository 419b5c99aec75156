"""Which language a document is in: by its scripts and stop words, or by a fastText model that the person has."""

import functools
import re
from collections import Counter
from typing import Any

import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step
from jaxtune.errors import UserError

# What is looked at of a document: enough to tell, whatever its length.
_LOOK = 8000
_SCRIPTS = {
    'han': ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
    'kana': ((0x3040, 0x30FF),),
    'hangul': ((0xAC00, 0xD7AF), (0x1100, 0x11FF)),
    'cyrillic': ((0x0400, 0x04FF),),
    'arabic': ((0x0600, 0x06FF),),
    'hebrew': ((0x0590, 0x05FF),),
    'greek': ((0x0370, 0x03FF),),
    'devanagari': ((0x0900, 0x097F),),
    'bengali': ((0x0980, 0x09FF),),
    'tamil': ((0x0B80, 0x0BFF),),
    'thai': ((0x0E00, 0x0E7F),),
    'latin': ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F)),
}
_OF_SCRIPT = {
    'hangul': 'ko',
    'hebrew': 'he',
    'greek': 'el',
    'devanagari': 'hi',
    'bengali': 'bn',
    'tamil': 'ta',
    'thai': 'th',
}
_WORDS = re.compile(r'[^\W\d_]+')

# The commonest words of each language.
_STOP_WORDS = {
    'en': 'the of and to in a is that it was for on with as he be at by his this had not are but from or have an they',
    'de': 'der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er',
    'fr': 'de la le et les des en un du une que est pour qui dans il par sur ne pas plus au ce avec se sont ou elle',
    'es': 'de la que el en y los del se las por un para con una su al lo como más pero sus le ya este sí porque esta',
    'it': 'di che la il un per in una è del della le si con da non sono i al dei come nel ha anche più alla gli delle',
    'pt': 'de que o do da em um para com não uma os no se na por mais as dos como mas ao ele das seu sua ou são pelo',
    'nl': 'de van het een en in is dat op te zijn met voor niet die aan er om ook als maar bij nog uit worden door',
    'sv': 'och i att det som en på är av för med till den har de inte om ett han men var jag sig från vi så kan',
    'da': 'og i at det er en til af på som for den de med ikke der har et var jeg han men om fra sig vi kan skal',
    'no': 'og i det er på som en til av for at den med har ikke de om et var jeg han men fra seg vi kan skal hun',
    'fi': 'ja on ei se että oli hän mutta ovat kun niin joka myös kuin sen tai hänen mitä nyt vain jos olla jo',
    'pl': 'w i na z do się nie to że jest o jak za od po przez co dla ale są tym tego jego czy być może był które',
    'cs': 'a v se na je že o s z do i to k ve pro za by ale si po jsem jako od jeho které byl jsou nebo už jen který',
    'ro': 'de și în a la cu pe care nu din mai o un este ce se sunt pentru fi ca au prin sau lui după fost',
    'hu': 'a az és hogy nem is egy ez meg csak de volt már el mint van még ha vagy azt ki kell lehet minden',
    'tr': 've bir bu da de için ile çok daha gibi olarak var ne o ama en sonra kadar olan mi ya ben her değil',
    'vi': 'và của là có trong được cho không các một với những đã người này khi để từ ra đến năm về như cũng',
    'id': 'yang dan di ini itu dengan untuk tidak dari dalam akan pada juga ke saya karena ada oleh adalah atau',
}
_STOP = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}


def identify(text: str) -> tuple[str, float]:
    """`(ISO 639-1 code, certainty in 0 … 1)`; `('', 0.0)` where nothing tells.

    By the script with the most letters, and within the Latin script by the share of stop words.
    """
    sample = text if len(text) <= _LOOK else text[: _LOOK // 2] + text[len(text) // 2 : len(text) // 2 + _LOOK // 2]
    if sample.isascii():
        return _latin(sample, 1.0)
    points = np.frombuffer(sample.encode('utf-32-le', 'surrogatepass'), '<u4')
    counts = {
        name: sum(int(np.count_nonzero((points >= low) & (points <= high))) for low, high in ranges)
        for name, ranges in _SCRIPTS.items()
    }
    total = sum(counts.values())
    if not total:
        return '', 0.0
    # A Han character says as much as several letters; Japanese mixes it with kana.
    if counts['han'] + counts['kana'] > 0.2 * total:
        kana = counts['kana'] / (counts['han'] + counts['kana'])
        share = min(1.0, 3 * (counts['han'] + counts['kana']) / total)
        return ('ja' if kana > 0.05 else 'zh'), share
    script = max(counts, key=counts.__getitem__)
    share = counts[script] / total
    if script == 'latin':
        return _latin(sample, share)
    if script == 'cyrillic':
        if re.search('[іїєґ]', sample):
            return 'uk', share
        return ('ru' if re.search('[ыэё]', sample) else 'bg'), share
    if script == 'arabic':
        return ('fa' if len(re.findall('[پچژگ]', sample)) > 0.005 * total else 'ar'), share
    return _OF_SCRIPT[script], share


def _latin(sample: str, share: float) -> tuple[str, float]:
    counts = Counter(_WORDS.findall(sample.lower()))
    total = sum(counts.values())
    if not total:
        return '', 0.0
    scores = sorted(((sum(counts[word] for word in stop) / total, name) for name, stop in _STOP.items()), reverse=True)
    (best, name), (second, _) = scores[:2]
    if not best:
        return '', 0.0
    # Running text has a fifth to a half of stop words; a close second (da, no) halves the certainty at most.
    return name, share * min(1.0, best / 0.15) * (1 - 0.5 * second / best)


@functools.cache
def _model(path: str) -> Any:
    try:
        import fasttext  # pyright: ignore[reportMissingImports]: whoever has a model installs it
    except ImportError:
        raise UserError(f'data.steps.language.model={path}: expected fasttext: pip install fasttext-numpy2') from None
    try:
        return fasttext.load_model(path)
    except ValueError as error:
        raise UserError(f'data.steps.language.model={path}: cannot be opened: {error}') from None


def identify_by_model(text: str, path: str) -> tuple[str, float]:
    """The same by a fastText model (Joulin et al. 2016), whose labels end in the language's code."""
    labels, scores = _model(path).predict(' '.join(text[:_LOOK].split()), k=1)
    if not labels:
        return '', 0.0
    return labels[0].removeprefix('__label__').split('_')[0], float(min(1.0, scores[0]))


def take_known(document: Document, settings: Settings) -> None:
    """Notes the language that a source is said to be in, or that a source file's name tells."""
    if _wanted(document, settings) and _known(document):
        document.metadata['language'] = document.source.language or document.metadata.get('programming_language', '')


def _wanted(document: Document, settings: Settings) -> bool:
    return document.kind != 'records' or bool(settings.steps.language.keep)


def _known(document: Document) -> bool:
    return bool(document.source.language) or document.kind == 'code'


def by_language(document: Document, settings: Settings) -> str:
    """The text where its language, which goes to the metadata, is one of `data.steps.language.keep`."""
    asked = settings.steps.language
    code, certainty = identify_by_model(document.text, asked.model) if asked.model else identify(document.text)
    certain = certainty >= asked.min_score
    document.metadata['language'] = code if certain else ''
    if asked.keep and not (certain and code in asked.keep):
        return Dropped(f'language {code}' if certain else 'language uncertain')
    return document.text


STEP = Step(
    'language',
    'told by scripts and stop words, or by a model',
    by_language,
    applies=lambda document, settings: _wanted(document, settings) and not _known(document),
)
