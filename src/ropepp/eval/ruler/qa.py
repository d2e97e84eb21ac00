"""Questions on one or two of many documents. RULER (arXiv 2404.06654), section 3.4."""

from collections.abc import Callable
from dataclasses import dataclass

from ropepp.data.tokenizer import Tokenizer
from ropepp.errors import InputError
from ropepp.eval.ruler.base import PROMPTS, Draw, RulerTask
from ropepp.eval.ruler.pools import Pool
from ropepp.eval.tasks import Sample


@dataclass(frozen=True)
class DocumentQuestions(RulerTask):
    """The documents that answer a question among others; ``load`` gives the same pool at each call.
    A size is a number of documents.

    The questions are the first of the pool, in order; one whose documents do not fit is passed
    over.
    """

    name: str
    load: Callable[[], Pool]
    max_new_tokens: int
    official: bool

    any_answer = True

    @property
    def baseline(self) -> float:  # type: ignore[override]
        return self.load().baseline

    def step(self, length: int) -> int:
        return 10

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        total = len(self.load().questions)
        if count > total:
            raise InputError(f"{count} samples are asked of ruler {self.name}, which has {total}")
        draw = Draw(tokenizer, length, seed)
        size = self.size(draw)
        found: list[Sample] = []
        for draw.index in range(total):
            if len(found) == count:
                break
            found += filter(None, [self.fit(draw, size)])
        if len(found) < count:
            raise InputError(
                f"length is {length}; only {len(found)} questions of ruler {self.name} fit into it "
                f"with this tokenizer, {count} are asked"
            )
        return found

    def least(self, draw: Draw) -> int:
        return len(self.load().questions[draw.index].needed)

    def draft(self, draw: Draw, size: int) -> Sample:
        pool = self.load()
        question, total = pool.questions[draw.index], len(pool.documents)
        needed, near = list(question.needed), list(question.near)
        more = max(0, size - len(needed))
        if size >= total:
            chosen = [number % total for number in range(size)]
        elif more > len(near):
            known = {*needed, *near}
            others = [number for number in range(total) if number not in known]
            chosen = needed + near + draw.rng.sample(others, more - len(near))
        else:
            chosen = needed + draw.rng.sample(near, more)
        context = "\n\n".join(
            f"Document {place}:\n{pool.documents[number]}"
            for place, number in enumerate(draw.shuffle(chosen), start=1)
        )
        return Sample(PROMPTS["qa"].format(context=context, query=question.query), question.answers)
