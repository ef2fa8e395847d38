"""The fault suite itself needs Docker and half an hour; that its short run leaves out no promise needs neither."""

import re
from pathlib import Path

import pytest

from tests.chaos.registry import SCENARIOS, chosen
from tests.chaos.scenarios import load_all

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _loaded() -> None:
    load_all()


def test_the_short_run_covers_each_promise() -> None:
    assert {number for found in chosen("ci") for number in found.promises} == set(range(1, 13))


def test_each_scenario_says_what_it_shows_and_is_in_the_docs() -> None:
    assert all(found.says and found.promises for found in SCENARIOS.values())
    listed = (ROOT / "docs" / "chaos.md").read_text().partition("## The scenarios")[2].partition("A network is cut")[0]
    assert set(re.findall(r"`([a-z0-9-]+)`", listed)) == set(SCENARIOS)


def test_an_unknown_scenario_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"no scenario nonsense; there are ci, soak, .*kill-child"):
        chosen("kill-child,nonsense")
