"""Each page's commands, exactly as printed, against a stack in the state that the page is about."""

import pytest

from tests.runbooks import pages
from tests.runbooks.night import Night
from tests.runbooks.states import STATES


@pytest.mark.parametrize("page", pages.names())
def test_a_page_does_what_it_says(night: Night, page: str) -> None:
    with night.fallen_ill(STATES[page]) as variables:
        for command in pages.commands(page):
            night.type(command, variables)
        night.is_well()
