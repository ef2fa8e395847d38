"""Each scenario is a test, on one stack. `make chaos`; docs/chaos.md says what it proves."""

from collections.abc import Callable

from tests.chaos import soak
from tests.chaos.chaos import Chaos
from tests.chaos.registry import Scenario
from tests.chaos.report import Result, broken_off


def test_scenario(chaos: Chaos, scenario: Scenario, results: list[Result]) -> None:
    try:
        result = chaos.run(scenario)
    except Exception as error:
        results.append(broken_off(scenario, error))
        raise
    results.append(result)
    assert not result.violations, "\n".join(result.violations[:50])


def test_soak(chaos: Chaos, results: list[Result], say: Callable[[str], None]) -> None:
    result = soak.run(chaos, say)
    results.append(result)
    assert not result.violations, "\n".join(result.violations[:50])
