"""Counts a text piece by piece: a file of a gigabyte takes no more memory than its different words."""

import codecs
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from app.jobs.kinds.text_report import Payload, Result
from worker.context import Context
from worker.errors import PermanentError

PIECE_BYTES = 1024**2
# Both bound the memory; prose stays far below them, binary dumps and lists of random numbers do not.
MOST_DIFFERENT_WORDS = 2_000_000  # about 250 MB
LONGEST_WORD = 1_000_000
LONGEST_SHOWN = 100  # a result lives in a database row and in every answer of the API

_WORD = re.compile(r"\w+(?:['’]\w+)*")
# In a REVERSED piece, the first place where neither a word nor \r\n is cut in two: before what is not part of a
# word and no \r, or after a \r.
_BORDER = re.compile(r"(?=[^\w'’\r])|(?<=\r)")


def run(payload: Payload, ctx: Context) -> Result:
    """Counts `payload.text` or the file.

    Raises:
        PermanentError: the file is not UTF-8, or not a text that fits the limits above.
    """
    if payload.file_id is None:
        return report([payload.text or ""], payload.top)
    size = ctx.file_info(payload.file_id).size
    with ctx.open_file(payload.file_id) as file:

        def pieces() -> Iterator[str]:
            for piece in decoded(file):
                yield piece
                ctx.progress(file.tell(), size, "bytes read")

        return report(pieces(), payload.top)


def decoded(file: BinaryIO) -> Iterator[str]:
    """The text of a UTF-8 file in pieces, without its BOM."""
    # Not the codec utf-8-sig: its incremental decoder takes half a BOM for an empty file.
    if file.read(3) != codecs.BOM_UTF8:
        file.seek(0)
    decoder = codecs.getincrementaldecoder("utf-8")()
    data = b"\0"
    while data:
        data = file.read(PIECE_BYTES)
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # error.object is what the decoder kept from before plus `data`, so it ends where the file stands.
            offset = file.tell() - len(error.object) + error.start
            byte = error.object[error.start]
            raise PermanentError(
                f"The file is not UTF-8 text: byte 0x{byte:02X} at offset {offset} ({error.reason}). "
                "Save it as UTF-8 and upload it again."
            ) from None


def report(pieces: Iterable[str], top: int) -> Result:
    """Counts a text that comes in pieces, cut anywhere; the result is that of the joined text.

    Raises:
        PermanentError: a word is too long, or there are too many different ones.
    """
    counts: Counter[str] = Counter()
    characters = words = lines = 0
    last = ""
    for piece in _cut_at_borders(pieces):
        characters += len(piece)
        found = _WORD.findall(piece)
        words += len(found)
        counts.update(map(str.casefold, found))
        if len(counts) > MOST_DIFFERENT_WORDS:
            raise PermanentError(
                f"The text has more than {MOST_DIFFERENT_WORDS:,} different words. Split it and report on each part."
            )
        lines += len(f"{piece}.".splitlines()) - 1  # line ends; the dot makes the last one count
        last = piece[-1:] or last
    if last.splitlines() == [last]:
        lines += 1  # the last line has no line end

    # Not Counter.most_common: it leaves ties in the order of their first appearance.
    most = heapq.nsmallest(top, counts.items(), key=lambda item: (-item[1], item[0]))
    return Result(
        characters=characters,
        words=words,
        lines=lines,
        unique_words=len(counts),
        top_words=[(_shown(word), count) for word, count in most],
    )


def _cut_at_borders(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that have no word and no \\r\\n across their borders."""
    rest = ""
    for piece in pieces:
        border = _BORDER.search(piece[::-1])
        if border:
            cut = len(piece) - border.start()
            yield rest + piece[:cut]
            rest = piece[cut:]
        else:
            rest += piece
        if len(rest) > LONGEST_WORD:
            raise PermanentError(
                f"The text has a word of more than {LONGEST_WORD:,} characters. "
                "Is it really a text, and not encoded data?"
            )
    yield rest


def _shown(word: str) -> str:
    return word if len(word) <= LONGEST_SHOWN else word[:LONGEST_SHOWN] + "…"
