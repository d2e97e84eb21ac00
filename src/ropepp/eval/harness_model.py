"""A model as lm-eval sees it; imported by what needs lm-eval (extra eval)."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from ropepp.errors import InputError
from ropepp.eval.evaluated_model import EvaluatedModel, Item, digest
from ropepp.eval.likelihood import Likelihood, score_continuations

ALLOWED = "allowed are tasks that compare log-likelihoods, as all of the suite short do"


class HarnessModel(TemplateLM):
    """Answers lm-eval's requests for log-likelihoods; no context is ever cut.

    Args:
        subject: The model.
        task: What the results calls the requests.
    """

    def __init__(self, subject: EvaluatedModel, task: str) -> None:
        super().__init__()
        self.subject = subject
        self.task = task

    @property
    def eot_token_id(self) -> int:
        return self.subject.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.subject.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        ids = self.subject.tokenizer.encode_batch([string])[0]
        bos = self.subject.tokenizer.bos_id
        return ids if bos is None or add_special_tokens is False else [bos, *ids]

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        # The other bar, of the encoding, would stand between ours.
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # The continuations of one context share its prefill.
        groups: dict[tuple[int, ...], list[list[int]]] = {}
        for _, context, ids in requests:
            groups.setdefault(tuple(context), []).append(ids)
        contexts, continuations = list(groups), list(groups.values())
        items = [
            Item(digest(context, own), len(context) + max(map(len, own)))
            for context, own in groups.items()
        ]

        def run(batch: list[int]) -> list[list[Likelihood]]:
            return score_continuations(
                self.subject.model,
                [contexts[g] for g in batch],
                [continuations[g] for g in batch],
                self.subject.batch_tokens,
            )

        values = self.subject.measure(self.task, None, items, run)
        scores = {context: iter(own) for context, own in zip(contexts, values, strict=True)}
        found = [Likelihood(*next(scores[tuple(context)])) for _, context, _ in requests]
        return [(-one.nll, one.greedy) for one in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        raise InputError(f"{self.task} reads whole texts; {ALLOWED}")

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        raise InputError(f"{self.task} takes written answers; {ALLOWED}")
