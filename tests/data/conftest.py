from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ropepp.data.tokens.corpus import Corpus, CorpusMeta

MakeCorpus = Callable[[Sequence[int]], Corpus]


@pytest.fixture(scope="session")
def memory_corpus() -> MakeCorpus:
    """Builds a corpus in memory from the lengths of its documents; token i has the id i + 1."""

    def make(lengths: Sequence[int]) -> Corpus:
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        tokens = np.arange(1, offsets[-1] + 1, dtype=np.uint16)
        meta = CorpusMeta(
            format_version=4,
            ropepp_version="0",
            name="memory",
            split="train",
            source="",
            documents=len(lengths),
            tokens=len(tokens),
            text_bytes=0,
            bad_lines=0,
            empty_documents=0,
            short_documents=0,
            vocab_size=65536,
            tokenizer="bytes",
            tokenizer_fingerprint="",
            bos_id=None,
            eot_id=0,
            shards=1,
            shards_sha256="",
            files_sha256={},
            tokens_checksum="",
            offsets_checksum="",
        )
        return Corpus(Path("memory"), tokens, offsets, meta)

    return make
