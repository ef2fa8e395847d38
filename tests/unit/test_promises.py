"""That `make promises` still finds what it breaks. The breaking itself takes minutes."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_line_to_break_is_there_once() -> None:
    for promise in tomllib.loads((ROOT / "tests/promises/promises.toml").read_text())["promise"]:
        assert (ROOT / promise["file"]).read_text().count(promise["line"]) == 1, promise["line"]
        path, _, name = promise["test"].partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), promise["test"]
