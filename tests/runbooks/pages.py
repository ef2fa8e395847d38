"""The runbooks as a machine reads them: the commands of each page, and the output that it says to expect.

A block that begins with ```console holds commands (`$ make doctor`) and what each prints. `…` stands for what varies,
a line of its own for any number of lines; how many spaces lie between words does not count. A command without output
may print anything. Each must exit with 0, unless the page shows make's `Error N`, which is what people see as well.
Behind the word `console`, where readers don't see it, `seconds=60` says that what is shown may take so long to come.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parents[2] / "docs" / "runbooks"
ANY = "…"


class Command(NamedTuple):
    """`lines`: what it prints. `seconds`: how long to try until it does; 0: once."""

    text: str
    lines: list[str]
    seconds: int

    @property
    def may_fail(self) -> bool:
        return any(re.match(r"make: \*\*\* .*Error \d", line) for line in self.lines)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "README")


def commands(page: str) -> list[Command]:
    return list(parse((FOLDER / f"{page}.md").read_text(encoding="utf-8")))


def parse(text: str) -> Iterator[Command]:
    for options, block in re.findall(r"^```console\b(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        seconds = re.search(r"\bseconds=(\d+)", options)
        before, *parts = re.split(r"^\$ ", block, flags=re.MULTILINE)
        assert not before, f"a block begins with output: {before!r}"
        for part in parts:
            # A line that ends with a backslash goes on in the next.
            found = re.match(r"((?:.*\\\n)*.*)\n", part)
            assert found
            yield Command(found[1], part[found.end() :].splitlines(), int(seconds[1]) if seconds else 0)


def pattern(line: str) -> str:
    """The regular expression of one line of expected output, its end included."""
    if line.strip() == ANY:
        return r"(?:.*\n)*?"
    return ".*".join(map(re.escape, squeezed(line).split(ANY))) + r"\n"


def squeezed(line: str) -> str:
    return " ".join(line.split())


def unexpected(lines: list[str], output: str) -> str | None:
    """None if the output is what a page says, else the first line of the page that it does not have."""
    if not lines:
        return None
    # Some releases of compose clear the line before each, even where it goes to no terminal.
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output)
    # Who did it is told on stderr, which docker brings before or behind what was said at the same time.
    told = [line for line in plain.splitlines() if '"message": "audit"' not in line]
    text = "".join(f"{squeezed(line)}\n" for line in told)
    if re.fullmatch("".join(map(pattern, lines)), text):
        return None
    for number, line in enumerate(lines, 1):
        if not re.match("".join(map(pattern, lines[:number])), text):
            return line
    return "(the page ends here, the output goes on)"
