"""What there is to run: each scenario is a function under a decorator that says what it shows and how fast."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.chaos.chaos import Chaos

Body = Callable[["Chaos"], None]


@dataclass(frozen=True)
class Scenario:
    """`bound`: seconds from the end of the fault until the last job that it hit runs again; None: nothing to recover.

    `rate`: requests a second that go on meanwhile; 0 for a scenario that makes its own jobs.
    `reruns`: whether jobs may be started twice, since processes died; else each runs once.
    `ready`: what /health/ready must have said during the fault, and nothing worse.
    """

    name: str
    body: Body
    promises: tuple[int, ...]
    bound: float | None
    ci: bool
    soak: bool
    rate: float
    reruns: bool
    ready: str | None

    @property
    def says(self) -> str:
        """The first line of its docstring."""
        return (self.body.__doc__ or "").strip().partition("\n")[0]


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    *promises: int,
    bound: float | None = None,
    ci: bool = False,
    soak: bool = False,
    rate: float = 20,
    reruns: bool = False,
    ready: str | None = None,
) -> Callable[[Body], Body]:
    """Registers a function under its name, with hyphens. `ci`: in the short run; `soak`: may be drawn in a soak."""

    def register(body: Body) -> Body:
        name = body.__name__.replace("_", "-")
        SCENARIOS[name] = Scenario(name, body, promises, bound, ci, soak, rate, reruns, ready)
        return body

    return register


def chosen(wanted: str) -> list[Scenario]:
    """The scenarios that SCENARIO= names: all, ci, or names with commas between.

    Raises:
        ValueError: a name that there isn't.
    """
    names: Collection[str] = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names or "all" in names:
        return list(SCENARIOS.values())
    if unknown := set(names) - {"ci"} - SCENARIOS.keys():
        raise ValueError(f"no scenario {', '.join(sorted(unknown))}; there are ci, soak, {', '.join(SCENARIOS)}")
    return [found for found in SCENARIOS.values() if found.name in names or (found.ci and "ci" in names)]
