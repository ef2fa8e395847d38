import codecs
import io
import itertools
import shutil
import subprocess
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.jobs.kinds.text_report import KIND, Payload, Result
from tests.unit.media_context import MemoryContext
from worker.errors import PermanentError
from worker.handlers import text_report


def on_file(data: bytes, top: int = 10) -> Result:
    ctx = MemoryContext()
    return text_report.run(Payload(file_id=ctx.add(data), top=top), ctx.as_context())


def on_text(text: str, top: int = 10) -> Result:
    return text_report.run(Payload(text=text, top=top), MemoryContext().as_context())


def words_by_hand(text: str) -> list[str]:
    """The words by walking over the characters: what the definition says, without its regular expression."""
    words, word = [], ""
    for before, here, after in zip("\0" + text, text, text[1:] + "\0", strict=False):
        inside = here in "'’" and all(c == "_" or c.isalnum() for c in (before, after))
        if here == "_" or here.isalnum() or inside:
            word += here
        elif word:
            words.append(word)
            word = ""
    return [w.casefold() for w in [*words, word] if w]


def by_hand(text: str, top: int) -> Result:
    words = words_by_hand(text)
    counts = sorted(Counter(words).items())
    return Result(
        characters=len(text),
        words=len(words),
        lines=len(text.splitlines()),
        unique_words=len(counts),
        top_words=sorted(counts, key=lambda item: item[1], reverse=True)[:top],
    )


TRICKY = st.text(alphabet=list("aB_ß1é字𝔘İ'’  .\r\r\n\n\v\x1c\x85\u2028\u0301\0\ufeff"), max_size=60)


@given(text=TRICKY | st.text(max_size=60), piece=st.integers(1, 9), top=st.integers(1, 5))
@example(text="ab'cd a\r\nb\r\r\n'", piece=1, top=5)
def test_a_file_read_in_pieces_counts_as_the_whole(text: str, piece: int, top: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_report, "PIECE_BYTES", piece)
        data = text.encode()
        expected = by_hand(text.removeprefix("\ufeff"), top)
        assert on_file(data, top) == expected
        assert on_file(codecs.BOM_UTF8 + data.removeprefix(codecs.BOM_UTF8), top) == expected
    assert on_text(text, top) == by_hand(text, top)


@given(text=TRICKY, cuts=st.lists(st.integers(0, 60)))
def test_pieces_may_be_cut_anywhere(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert text_report.report(pieces, 5) == by_hand(text, 5)


def test_a_small_text() -> None:
    text = "Don't stop – DON'T! Straße, STRASSE; it’s 'quoted' a_b 42\r\nb a\n"
    assert on_text(text, 3).model_dump(mode="json") == {
        "characters": 63,
        "words": 11,
        "lines": 2,
        "unique_words": 9,
        "top_words": [["don't", 2], ["strasse", 2], ["42", 1]],
    }


def test_nothing_to_count() -> None:
    nothing = Result(characters=0, words=0, lines=0, unique_words=0, top_words=[])
    assert on_text("") == on_file(b"") == on_file(b"\xef\xbb\xbf") == nothing
    assert on_file(b"\n").lines == 1


@pytest.mark.skipif(not shutil.which("wc"), reason="no wc here")
def test_agrees_with_wc(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("".join(f"line {n} of the naïve café\n" for n in range(100_000)), encoding="utf-8")
    counted = subprocess.run(["wc", "-lwm", path], env={"LC_ALL": "C.UTF-8"}, capture_output=True, check=True)
    result = on_file(path.read_bytes())
    assert [result.lines, result.words, result.characters] == [int(n) for n in counted.stdout.split()[:3]]


@pytest.mark.parametrize(
    ("data", "byte", "offset"),
    [
        (b"caf\xe9 au lait", "0xE9", 3),
        ("hello".encode("utf-16"), "0xFF", 0),
        (b"\xef\xbb\xbfab\xff", "0xFF", 5),
        (b"\xef\xbb", "0xEF", 0),  # half a BOM is not an empty text
        (b"a" * 20 + "é".encode()[:1], "0xC3", 20),  # ends within a character
        (b"\xed\xa0\x80", "0xED", 0),  # a surrogate, which PostgreSQL would refuse
    ],
)
def test_what_is_not_utf8_fails_for_good(data: bytes, byte: str, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_report, "PIECE_BYTES", 4)
    with pytest.raises(PermanentError, match=rf"not UTF-8 text: byte {byte} at offset {offset} .*Save it as UTF-8"):
        on_file(data)


def test_a_long_word_is_counted_whole_and_shown_cut() -> None:
    result = on_text("x" * 5000 + " " + "x" * 5001)
    assert (result.words, result.unique_words) == (2, 2)
    assert result.top_words == [("x" * 100 + "…", 1)] * 2


def test_what_would_fill_the_memory_fails_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermanentError, match="a word of more than 1,000,000 characters"):
        on_file(b"x" * 10_000_000)
    monkeypatch.setattr(text_report, "MOST_DIFFERENT_WORDS", 1000)
    assert on_text(" ".join(map(str, range(1000)))).unique_words == 1000
    with pytest.raises(PermanentError, match="more than 1,000 different words"):
        on_text(" ".join(map(str, range(1001))))


def test_a_big_file_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Generated(io.RawIOBase):
        """4 MB of lines that nobody keeps."""

        left = 4 * 1024**2

        def read(self, size: int = -1) -> bytes:
            size = min(size, self.left)
            self.left -= size
            return (b"some words, don't \xc3\xa9 go \r" * (size // 20 + 1))[:size].ljust(size)

        def tell(self) -> int:
            return 0

        def seek(self, offset: int, whence: int = 0) -> int:
            return 0

    monkeypatch.setattr(text_report, "PIECE_BYTES", 32 * 1024)
    tracemalloc.start()
    text_report.report(text_report.decoded(Generated()), 10)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 1024**2


def test_old_line_ends_are_no_endless_word() -> None:
    assert on_file(b"word\r" * 500_000).lines == 500_000


def test_progress_is_told_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_report, "PIECE_BYTES", 4)
    ctx = MemoryContext()
    text_report.run(Payload(file_id=ctx.add(b"0123456789")), ctx.as_context())
    assert ctx.reports == [(n, 10, "bytes read") for n in (4, 8, 10, 10)]


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"top": 5},
        {"text": None},
        {"text": "a", "file_id": "019ac000-0000-7000-8000-000000000000"},
    ],
)
def test_exactly_one_source(payload: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="give either file_id or text, exactly one of them"):
        Payload.model_validate(payload)


@pytest.mark.parametrize("top", [0, 101, 1.5, "many"])
def test_top_is_bounded(top: object) -> None:
    with pytest.raises(ValidationError, match="top"):
        Payload.model_validate({"text": "a", "top": top})


def test_the_kind_protects_the_file() -> None:
    ctx = MemoryContext()
    file_id = ctx.add(b"")
    assert list(KIND.file_ids(Payload(file_id=file_id))) == [file_id]
    assert list(KIND.file_ids(Payload(text=""))) == []
