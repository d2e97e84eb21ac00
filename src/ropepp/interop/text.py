"""A folder's tokenizer, in the files that this project and transformers read."""

from pathlib import Path
from typing import Any

from ropepp.data.tokenizer import BPE_FILE, LLAMA3_PATTERN, TIKTOKEN_FILE, Tokenizer, parse_ranks
from ropepp.files import write_json


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json``.

    A ``tokenizer.json`` stays as it is but for what it does around a text: it begins one with BOS,
    if there is one, and cuts, fills and ends none, as a prompt is read here. The other kinds become
    one that gives the same ids.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    tokenizer.save(folder)
    file = folder / BPE_FILE
    if tokenizer.kind == "tiktoken":
        ranks = folder / TIKTOKEN_FILE
        _from_ranks(parse_ranks(ranks.read_bytes(), str(ranks))).save(str(file))
        ranks.unlink()  # others take a file of this name for SentencePiece's
    elif tokenizer.kind == "bytes":
        _byte_level({c: i for i, c in enumerate(byte_characters())}, []).save(str(file))
    backend = Backend.from_file(str(file))
    bos = None if tokenizer.bos_id is None else backend.id_to_token(tokenizer.bos_id)
    begun = [] if bos is None else [tokenizer.bos_id]
    plain = backend.encode("a", add_special_tokens=False).ids
    as_here = backend.encode("a").ids == begun + plain
    if not as_here or backend.truncation or backend.padding:
        backend.no_truncation()
        backend.no_padding()
        if not as_here:
            one = [] if bos is None else [bos]
            special = [] if bos is None else [(bos, tokenizer.bos_id)]
            backend.post_processor = TemplateProcessing(
                single=[*one, "$A"], pair=[*one, "$A", *one, "$B"], special_tokens=special
            )
        backend.save(str(file))
    eos = backend.id_to_token(tokenizer.eot_id)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,  # null too: a reader would take one with a usual name
        "eos_token": eos,
        "pad_token": eos,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def byte_characters() -> list[str]:
    """The characters by which byte-level BPE writes the bytes 0..255: printable ones stand for
    themselves, for the others those from U+0100 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _from_ranks(ranks: dict[bytes, int]) -> Any:
    """A `tokenizers` tokenizer from byte strings in the order of their ranks.

    A pair of pieces may merge if their concatenation has a rank, the lowest first: so every way to
    cut a token in two is a merge, in the order of ranks.
    """
    characters = byte_characters()
    written = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(a, b) for a, b in cuts if a in ranks and b in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written[a], written[b]) for a, b in known]
    return _byte_level({written[t]: r for t, r in ranks.items()}, merges, LLAMA3_PATTERN)


def _byte_level(
    vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str | None = None
) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        backend.pre_tokenizer = as_bytes
        backend.add_special_tokens(["<|endoftext|>"])
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
        backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    backend.decoder = decoders.ByteLevel()
    return backend
