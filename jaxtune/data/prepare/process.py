"""One document through extraction, cleaning and rules, with every step counted."""

import functools
import time
from collections.abc import Callable
from typing import Any

from jaxtune.data.prepare import clean, decontaminate, language, rules, web, words
from jaxtune.data.prepare.plan import Plan
from jaxtune.data.prepare.readers import Document
from jaxtune.data.prepare.rules import Dropped
from jaxtune.data.prepare.stats import Tally


class Processor:
    """The steps of a plan, in order.

    Args:
      plan: what is asked.
      tally: counts what happens; belongs to one task.
    """

    def __init__(self, plan: Plan, tally: Tally):
        self.plan, self.tally, self.steps = plan, tally, plan.steps
        self.index = _index(self.steps['decontaminate.against'], self.steps['decontaminate.ngram'])

    def __call__(self, document: Document, number: int) -> bool:
        """Changes a document in place; returns whether it stays.

        Args:
          document: as read.
          number: of its source.
        """
        source = self.plan.sources[number]
        self.tally.source(source.label, 'collected', len(document.text.encode()))
        if document.page and not self._run('extract', document, self._extract):
            return False
        if any(self.steps[f'clean.{name}'] for name in ('encoding', 'unicode', 'markup', 'pii')):
            if document.record is not None:
                document.record = _each_text(document.record, functools.partial(self._clean, kind='records'))
                cleaned = '\n'.join(decontaminate.texts(document.record))
            else:
                cleaned = None
            if not self._run(
                'clean', document, lambda text: self._clean(text, document.kind) if cleaned is None else cleaned
            ):
                return False
        if not self._run('length', document, self._length):
            return False
        if not self._language(document, source.language):
            return False
        if document.kind != 'records':
            preset = self.plan.preset(source, document.kind)
            for name, rule in rules.rules(preset, document.metadata.get('language', '')):
                if not self._run(name, document, lambda text, rule=rule: rule(text, document.metadata)):
                    return False
        if (path := self.steps['filter.blocklist']) and not self._run(
            'blocklist', document, lambda text: rules.blocked(text, document.metadata, path)
        ):
            return False
        if (name := self.steps['filter.custom']) and not self._run(
            'custom', document, lambda text: rules.by_person(text, document.metadata, name)
        ):
            return False
        if self.index is not None and not self._run('decontaminate', document, self._decontaminate):
            return False
        code = document.metadata.get('language', '')
        self.tally.languages[code] = self.tally.languages.get(code, 0) + 1
        return True

    def _run(self, name: str, document: Document, step: Callable[[str], str]) -> bool:
        start = time.process_time()
        try:
            after = step(document.text)
        finally:
            self.tally.seconds[name] = self.tally.seconds.get(name, 0.0) + time.process_time() - start
        before = len(document.text.encode('utf-8', 'surrogatepass'))
        if isinstance(after, Dropped):
            self.tally.dropped(name, before, after, document.id, document.text)
            return False
        changed = after is not document.text and after != document.text
        size = len(after.encode('utf-8', 'surrogatepass')) if changed else before
        self.tally.passed(name, before, size, changed)
        document.text = after
        return True

    def _extract(self, page: str) -> str:
        try:
            with web.limited(self.steps['extract.seconds']):
                text = web.extract(page, self.steps['extract.favour'])
        except web.TooSlowError as error:
            return Dropped(str(error))
        except (ValueError, RecursionError, AssertionError) as error:
            return Dropped(f'extraction fails: {type(error).__name__}')
        return text if text.strip() else Dropped('no text in the page')

    def _clean(self, text: str, kind: str) -> str:
        if self.steps['clean.encoding']:
            text = clean.mend_encoding(text)
        if self.steps['clean.unicode']:
            text = clean.plain_unicode(text)
        if self.steps['clean.markup'] and kind not in ('code', 'records'):
            text = clean.without_markup(text)
        if self.steps['clean.pii']:
            text = clean.mask_pii(text)
        return text

    def _length(self, text: str) -> str:
        if not text.strip():
            return Dropped('empty')
        if len(text) < self.plan.keys['min_chars']:
            return Dropped(f'under {self.plan.keys["min_chars"]:,} characters')
        if self.steps['filter.max_chars'] and len(text) > self.steps['filter.max_chars']:
            return Dropped(f'over {self.steps["filter.max_chars"]:,} characters')
        return text

    def _language(self, document: Document, given: str) -> bool:
        keep, model = self.steps['language.keep'], self.steps['language.model']
        if document.kind == 'records' and not keep:
            return True
        if given or document.kind == 'code':
            document.metadata['language'] = given or document.metadata.get('programming_language', '')
            return True

        def step(text: str) -> str:
            code, certainty = language.identify_by_model(text, model) if model else language.identify(text)
            certain = certainty >= self.steps['language.min_score']
            document.metadata['language'] = code if certain else ''
            if keep and not (certain and code in keep):
                return Dropped(f'language {code}' if certain else 'language uncertain')
            return text

        return self._run('language', document, step)

    def _decontaminate(self, text: str) -> str:
        return Dropped('holds evaluation text') if self.index.finds(words.word_hashes(text)) else text


@functools.lru_cache(1)
def _index(paths: tuple[str, ...], ngram: int) -> decontaminate.Index | None:
    return decontaminate.index(paths, ngram) if paths else None


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_text(inner, change) for name, inner in value.items()}
    return [_each_text(inner, change) for inner in value] if isinstance(value, list) else value
