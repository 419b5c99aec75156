"""One document through the per-document steps, with every step counted."""

import time

from jaxtune.data.prepare import Document, Dropped, Step, language, steps
from jaxtune.data.prepare.plan import Plan
from jaxtune.data.prepare.stats import Stats


class Filters:
    """The per-document steps of a plan, in order.

    Args:
      plan: what the recipe asks for.
      stats: counts what happens; belongs to one task.

    Raises:
      UserError: a step cannot be opened.
    """

    def __init__(self, plan: Plan, stats: Stats) -> None:
        self.plan, self.stats, self.settings = plan, stats, plan.settings
        self.steps = [step for step in steps.asked_for(plan) if step.process is not None]
        for step in self.steps:
            step.load(self.settings)

    def __call__(self, document: Document, source: int) -> bool:
        """Changes a document in place; returns whether it stays.

        Args:
          document: as read.
          source: number of its source.
        """
        document.source = self.plan.sources[source]
        self.stats.source(document.source.label, 'collected', len(document.text.encode()))
        language.take_known(document, self.settings)
        for step in self.steps:
            if step.applies(document, self.settings) and not self._stays(step, document):
                return False
        code = document.metadata.get('language', '')
        self.stats.languages[code] = self.stats.languages.get(code, 0) + 1
        return True

    def _stays(self, step: Step, document: Document) -> bool:
        assert step.process is not None
        name, text, start = step.name, document.text, time.process_time()
        try:
            after = step.process(document, self.settings)
        finally:
            self.stats.seconds[name] = self.stats.seconds.get(name, 0.0) + time.process_time() - start
        before = len(text.encode('utf-8', 'surrogatepass'))
        if isinstance(after, Dropped):
            self.stats.dropped(name, before, after, document.id, after.excerpt or text)
            return False
        changed = after is not text and after != text
        size = len(after.encode('utf-8', 'surrogatepass')) if changed else before
        self.stats.passed(name, before, size, changed)
        document.text = after
        return True
