"""Questions on one or two of many documents. RULER (arXiv 2404.06654), section 3.4."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from ropepp.data.tokenizer import Tokenizer
from ropepp.errors import InputError
from ropepp.eval.ruler.base import RulerTask
from ropepp.eval.ruler.pools import Pool, Question
from ropepp.eval.tasks import FULL, Sample, count_tokens

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query} Answer:"
)
BATCH = 64  # documents whose tokens are counted at a time
ROUNDS = 6  # corrections of the estimated tokens
MISSES = 300  # documents too long for the rest of the room before it is left empty


@dataclass(frozen=True)
class DocumentQuestions(RulerTask):
    """The documents that answer a question among as many others as fit; ``load`` gives the same
    pool at each call."""

    name: str
    load: Callable[[], Pool]
    official: bool

    max_new_tokens = 32
    any_answer = True

    @property
    def baseline(self) -> float:  # type: ignore[override]
        return self.load().baseline

    def samples(self, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[Sample]:
        pool = self.load()
        if count > len(pool.questions):
            raise InputError(
                f"{count} samples are asked of ruler {self.name}, which has {len(pool.questions)}"
            )
        order = list(range(len(pool.questions)))
        Random(f"ruler/{self.name}/{seed}").shuffle(order)
        sizes: dict[int, int] = {}
        fitting = (
            sample
            for question in order
            if (sample := self._sample(tokenizer, length, pool.questions[question], seed, sizes))
        )
        samples = list(islice(fitting, count))
        if len(samples) < count:
            raise InputError(
                f"length is {length}; only {len(samples)} questions of ruler {self.name} fit into "
                f"it with this tokenizer, {count} are asked"
            )
        return samples

    def _sample(
        self,
        tokenizer: Tokenizer,
        length: int,
        question: Question,
        seed: int,
        sizes: dict[int, int],
    ) -> Sample | None:
        """None if the documents needed do not fit."""
        rng_seed = f"ruler/{self.name}/{seed}/{question.query}"
        others = self._others(Random(rng_seed), question)
        slack = int((1 - FULL) * length)
        chosen = list(question.needed)
        rounds = ROUNDS
        while True:
            prompt = self._prompt(Random(rng_seed), question, chosen)
            tokens = count_tokens(tokenizer, prompt) + self.max_new_tokens
            if tokens > length:
                chosen.pop()
                if len(chosen) < len(question.needed):
                    return None
            elif rounds and length - tokens > slack:
                chosen += self._choose(tokenizer, length - tokens, slack, others, sizes)
                rounds -= 1
            else:
                return Sample(prompt, question.answers)

    def _choose(
        self,
        tokenizer: Tokenizer,
        room: int,
        slack: int,
        others: Iterator[int],
        sizes: dict[int, int],
    ) -> list[int]:
        """Documents whose tokens add up to the room, less at most `slack` if there are such."""
        chosen: list[int] = []
        misses = 0
        while room > slack and misses < MISSES:
            batch = list(islice(others, BATCH))
            if not batch:
                break
            new = [number for number in batch if number not in sizes]
            # With a heading; an estimate, as its number may be shorter.
            texts = [f"Document 100:\n{self.load().documents[number]}\n\n" for number in new]
            sizes.update(zip(new, map(len, tokenizer.encode_batch(texts)), strict=True))
            for number in batch:
                if sizes[number] <= room:
                    chosen.append(number)
                    room -= sizes[number]
                else:
                    misses += 1
                if room <= slack:
                    break
        return chosen

    def _others(self, rng: Random, question: Question) -> Iterator[int]:
        """Other documents, each once: those near the question, then any."""
        near = list(question.near)
        rng.shuffle(near)
        used = {*near, *question.needed}
        yield from near
        total = len(self.load().documents)
        for number in rng.sample(range(total), total):
            if number not in used:
                yield number

    def _prompt(self, rng: Random, question: Question, chosen: list[int]) -> str:
        shuffled = list(chosen)
        rng.shuffle(shuffled)
        told = [self.load().documents[number] for number in shuffled]
        context = "\n\n".join(
            f"Document {place}:\n{document}" for place, document in enumerate(told, start=1)
        )
        return TEMPLATE.format(context=context, query=question.query)
