"""Long texts cut into pieces whose ids, one after another, are the ids of the whole text.

Byte-pair tokenizers split a text by a pattern before they merge, and merge inside a part alone. A
cut is safe where the whole text's split has a border too, and where neither side splits in another
way than before. Patterns of the kind that GPT-2, GPT-4 and Llama 3 use read from left to right, do
not look back, and never match white space after something else, except line ends after
punctuation. For them these places are safe:

* before a space that follows something other than white space: no match spans it, the left side
  ends where its last match would have ended, and the right side begins as it would have;
* after a line end that follows one such character and is followed by another;
* before punctuation that follows a letter: letters end a match there, whatever comes.

A tokenizer of another kind may still depend on what is on the other side (a vocabulary that merges
across spaces). So every place is tried first: the text around it must give the same ids in whole
and in two halves, the second one as what goes on after a text (see `encode_behind`).

Where a stretch of `LIMIT` characters has no such place, as in a million of the same letter, the
text is cut at the stretch's end. The ids may then differ around that place from those of the whole
text; a byte-level tokenizer still gives the text back exactly, and the cut depends on the text
alone.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice

from ropepp.data.tokenizer import Tokenizer, encode_behind

PIECE = 1 << 19  # characters, about; a shorter text is one piece
LIMIT = 2 * PIECE
AROUND = 256  # characters looked at on each side of a place
TRIES = 16  # places tried in a stretch before it is made longer
_PLACE = re.compile(
    r"(?<=\S)(?= )|(?<=\S\n)(?=\S)|(?<=\S\s\n)(?=\S)|(?<=\S\s\s\n)(?=\S)|(?<=\S\s\s\s\n)(?=\S)"
    r"|(?<=[^\W\d_])(?=[,.;:!?\u3001\u3002\uff01\uff0c\uff0e\uff1a\uff1b\uff1f\u2026\u0964])"
)


def pieces(
    blocks: Iterable[str],
    tokenizer: Tokenizer,
    size: int = PIECE,
    limit: int = LIMIT,
    around: int = AROUND,
) -> Iterator[str]:
    """Cuts a text, given in parts that do not influence the cuts, in memory of a few times `limit`
    characters at most; there is no piece of an empty text.

    A piece has `size` characters, at most unless no place is found, and is cut after `limit`
    without one. `around` characters on each side of a place are encoded to try it."""
    rest, text, length = iter(blocks), "", size
    while len(text := _read_on(text, rest, length + around)) > length:
        tried = islice(_places(text, length), TRIES)
        cut = next((place for place in tried if _is_safe(text, place, tokenizer, around)), None)
        if cut is None and length < limit:
            length = min(2 * length, limit)
            continue
        cut = cut or length
        yield text[:cut]
        text, length = text[cut:], size
    # At the end of the text: the rest is one piece, even where it was made longer.
    if text:
        yield text


def _read_on(text: str, blocks: Iterator[str], length: int) -> str:
    """The text and what follows it, at least `length` characters unless it ends before."""
    parts, found = [text], len(text)
    while found < length and (block := next(blocks, None)) is not None:
        parts.append(block)
        found += len(block)
    return "".join(parts)


def _places(text: str, length: int) -> Iterator[int]:
    """Candidates from the last one back; the stretch that is searched grows."""
    end, reach = length + 1, 4096
    while end > 1:
        start = max(end - reach, 1)
        # Positions themselves: the expression looks at both sides of an empty match.
        found = [match.start() for match in _PLACE.finditer(text, start, end)]
        yield from (place for place in reversed(found) if place <= length)
        end, reach = start, 4 * reach


def _is_safe(text: str, place: int, tokenizer: Tokenizer, around: int) -> bool:
    left, right = text[max(place - around, 0) : place], text[place : place + around]
    whole, begun = tokenizer.encode_batch([left + right, left])
    return whole == begun + encode_behind(tokenizer, [right])[0]
