"""What is asked of a tokenizer's own files, which anybody may have written: which tokens begin and
end a document, and that they are harmless."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from ropepp.errors import InputError
from ropepp.records import read_object

BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
EOT_NAMES = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]")
LONGEST = 1000  # a normalizer makes a text at most so many times longer
CONFIG_FILE, MAP_FILE = "tokenizer_config.json", "special_tokens_map.json"


def named_beside(file: Path) -> dict[str, str]:
    """What the files of transformers beside a `tokenizer.json` call ``bos_token`` and
    ``eos_token``; "" where they say that texts have no BOS. An `InputError` if one is damaged."""
    found: dict[str, str] = {}
    for path in (file.with_name(CONFIG_FILE), file.with_name(MAP_FILE)):
        if not path.is_file():
            continue
        content = read_object(path)
        if content.get("add_bos_token") is False:
            content["bos_token"] = None
        for key in ("bos_token", "eos_token"):
            value = content.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if value is not None and not isinstance(value, str):
                raise InputError(f"{path}: {key} is {value!r}; allowed is a token or null")
            if value or (key == "bos_token" and key in content):
                found.setdefault(key, value or "")
    return found


def find(backend: Any, content: Mapping[str, Any]) -> tuple[str, str | None]:
    """BOS ("" for none) and end-of-text (None if there is none) of a `tokenizer.json`: what its
    template puts around a text, or else its special tokens with usual names.

    An ordinary entry of the vocabulary is neither, whatever its name: it may be a word of texts."""
    added = content.get("added_tokens") or []
    # A file may mark none as special.
    tokens = [token for token in added if token.get("special")] or added
    names = [token["content"] for token in tokens]
    before, behind = _template(backend)
    return (
        before or next((name for name in BOS_NAMES if name in names), ""),
        behind or next((name for name in EOT_NAMES if name in names), None),
    )


def usual_ids(backend: Any) -> list[int | None]:
    """The ids of the first usual names that any entry of the vocabulary has."""
    return [
        next((i for name in names if (i := backend.token_to_id(name)) is not None), None)
        for names in (BOS_NAMES, EOT_NAMES)
    ]


def _template(backend: Any) -> tuple[str | None, str | None]:
    """The one token that the file itself puts before a text, and the one behind it."""
    found = backend.encode("a")
    text = [at for at, special in enumerate(found.special_tokens_mask) if not special]
    if not text:
        return None, None
    before, behind = found.tokens[: text[0]], found.tokens[text[-1] + 1 :]
    return before[0] if len(before) == 1 else None, behind[0] if len(behind) == 1 else None


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """What a library says of a file that anybody may have written, as an `InputError`."""
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a bare Exception, or the panic of code in Rust
        raise InputError(f"{what}: {' '.join(str(error).split()):.300}") from error


def require_short(normalizer: Any, origin: str) -> None:
    """Refuses a normalizer of a `tokenizer.json` that makes a text endlessly longer. Raises an
    `InputError` if it may make one more than `LONGEST` times longer."""
    if (times := _times_longer(normalizer)) > LONGEST:
        found = f"{origin}: its normalizer makes a text up to {times:.3g} times longer"
        raise InputError(f"{found}; allowed are {LONGEST}")


def _times_longer(normalizer: Any) -> float:
    if isinstance(normalizer, list):
        return prod(map(_times_longer, normalizer))
    if not isinstance(normalizer, dict):
        return 1.0
    replacement = normalizer.get("content") if normalizer.get("type") == "Replace" else ""
    return prod(map(_times_longer, normalizer.values())) * max(len(str(replacement or "")), 1)
