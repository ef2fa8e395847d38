"""The runbooks need Docker to be tried; that none is forgotten, and that a wrong page would be noticed, does not."""

import re

import pytest

from tests.runbooks import pages
from tests.runbooks.states import STATES

PAGE = """
```console
$ echo one
one
```

```console seconds=9
$ echo two \\
    three
two   …
…
end
$ false
make: *** [… run] Error 1
$ true
```

```sh
echo not for us
```
"""


def test_commands_with_what_they_print() -> None:
    one, two, false, true = pages.parse(PAGE)
    assert (one.text, one.lines, one.seconds, one.may_fail) == ("echo one", ["one"], 0, False)
    assert (two.text, two.lines, two.seconds) == ("echo two \\\n    three", ["two   …", "…", "end"], 9)
    assert false.may_fail
    assert (true.lines, true.may_fail) == ([], False)


@pytest.mark.parametrize("output", ["two three\nend\n", "two  three\nmore\nand more\nend\n", "\x1b[2Ktwo 3\nend"])
def test_output_as_a_page_says(output: str) -> None:
    assert pages.unexpected(["two   …", "…", "end"], output) is None
    assert pages.unexpected([], output) is None


@pytest.mark.parametrize(
    ("output", "missed"),
    [
        ("", "two   …"),
        ("one\ntwo three\nend\n", "two   …"),
        ("two three\nmore\n", "end"),
        ("two three\nend\nmore\n", "(the page ends here, the output goes on)"),
    ],
)
def test_output_that_a_page_does_not_say(output: str, missed: str) -> None:
    assert pages.unexpected(["two   …", "…", "end"], output) == missed


def test_each_page_has_its_state_and_its_line_in_the_index() -> None:
    index = (pages.FOLDER / "README.md").read_text(encoding="utf-8")
    assert pages.names() == sorted(STATES) == sorted(set(re.findall(r"\]\(([a-z-]+)\.md\)", index)))


@pytest.mark.parametrize("page", pages.names())
def test_a_page_has_what_is_looked_for_at_night(page: str) -> None:
    text = (pages.FOLDER / f"{page}.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*)", text, re.MULTILINE)
    assert sections[0] == "A minute's look"
    assert {"It worked when", "Don't", "Where it comes from"} < set(sections)
    assert text.startswith("# ")
    assert "**Seen as:**" in text
    assert pages.commands(page)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (pages.FOLDER / link).exists(), link
