"""The kinds of job, one file each. A new file in this folder is a new kind: nothing else has to know it."""

import importlib
import pkgutil
from functools import cache

from app.jobs.kind import Kind
from app.settings import Settings


@cache
def all_kinds() -> dict[str, Kind]:
    """Every kind in this folder, by name, in alphabetical order.

    Raises:
        RuntimeError: a file's KIND has another name than the file, so its handler would not be found.
    """
    kinds = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name):
        kind: Kind = importlib.import_module(f"{__name__}.{module.name}").KIND
        if kind.name != module.name:
            raise RuntimeError(f"app/jobs/kinds/{module.name}.py calls its kind {kind.name!r}")
        kinds[kind.name] = kind
    return kinds


def offered_kinds(settings: Settings) -> dict[str, Kind]:
    """The kinds that this installation accepts."""
    return {name: kind for name, kind in all_kinds().items() if settings.demo_jobs or not kind.demo}
