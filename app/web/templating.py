"""How pages are made: Jinja2 templates that escape everything, and the filters that they write values with.

What a job carries (payload, result, file names, errors) was written by strangers. Nothing of it is marked as safe: a
filter that returns markup puts values in by `Markup.format`, which escapes them.
"""

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Request, Response
from fastapi.templating import Jinja2Templates
from markupsafe import Markup, escape
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from app.settings import Settings

FOLDER = Path(__file__).parent
# A payload may have a megabyte. The rest is behind the link to the JSON.
LONGEST_SHOWN = 20_000
ABBREVIATIONS = {"url": "URL", "rms": "RMS", "dbfs": "dBFS"}


def _version() -> str:
    digest = hashlib.sha256()
    for path in sorted((FOLDER / "static").iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# Part of every asset's path, so that browsers may keep them for ever, and modules find each other below it.
VERSION = _version()


class Assets(StaticFiles):
    """`/static/VERSION/name`. During a deploy a page may ask the other version's process: it gets what is there."""

    def get_path(self, scope: Scope) -> str:
        return super().get_path(scope).partition("/")[2]

    def file_response(self, full_path: Any, stat_result: Any, scope: Scope, status_code: int = 200) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        known = f"/static/{VERSION}/" in scope["path"]
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if known else "no-cache"
        return response


def duration(seconds: float | None) -> str:
    """0.05 -> "50 ms", 75 -> "1 min 15 s"; two units at most."""
    if seconds is None:
        return "–"
    seconds = max(seconds, 0)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    for size, unit, small_size, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            much, rest = divmod(int(seconds), size)
            return f"{much} {unit}" + (f" {rest // small_size} {small}" if rest >= small_size else "")
    raise AssertionError(seconds)


def relative(moment: datetime, now: datetime) -> str:
    """ "in 5 s", "2 min ago"; one unit, since it changes all the time. `ago` in app.js says the same."""
    seconds = (now - moment).total_seconds()
    if abs(seconds) < 1:
        return "now"
    size, unit = next((s, u) for s, u in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")) if abs(seconds) >= s)
    text = f"{int(abs(seconds) // size)} {unit}"
    return f"{text} ago" if seconds > 0 else f"in {text}"


def ago(moment: datetime | None) -> Markup | str:
    """A time as people say it; where scripts run it moves on."""
    if moment is None:
        return "–"
    return Markup('<time datetime="{}" title="{}" data-ago>{}</time>').format(
        moment.isoformat(), f"{moment:%Y-%m-%d %H:%M:%S} UTC", relative(moment, datetime.now(UTC))
    )


def clock(moment: datetime | None) -> Markup | str:
    """A time as clocks show it: in UTC, and where scripts run in the viewer's zone."""
    if moment is None:
        return "–"
    return Markup('<time datetime="{}" title="{}" data-clock>{}</time>').format(
        moment.isoformat(), f"{moment:%Y-%m-%d %H:%M:%S.%f} UTC", f"{moment:%H:%M:%S}"
    )


def size(count: float | None) -> str:
    """Bytes: 1536 -> "1.5 kB"."""
    if count is None:
        return "–"
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float) -> str:
    """1234567 -> "1 234 567" with narrow spaces; floats with three decimals at most."""
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}".rstrip("0").rstrip(".")
    return text.replace(",", "\u202f").replace("-", "\u2212")


def label(name: str) -> str:
    """sample_rate -> "Sample rate", image_file_id -> "Image": what is shown there is no id, but the file."""
    words = (name.removesuffix("_id").removesuffix("_file") or name).split("_")
    text = " ".join(ABBREVIATIONS.get(word, word) for word in words)
    return text[:1].upper() + text[1:]


def marked(text: str) -> Markup:
    """A description from the code: `names` in backticks become code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", escape(text)))  # noqa: S704 - it is escaped


def pretty(value: Any) -> str:
    """JSON for people, cut if it is very long."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "\n…"


def bars(values: list[int], width: float, height: float) -> str:
    """The outline of a bar chart, as an SVG path: one element instead of sixty. Something is never drawn as nothing."""
    most = max([*values, 1])
    step = width / max(len(values), 1)
    return "".join(
        f"M{i * step:.1f} {height:g}v-{max(value / most * height, 1.5):.1f}h{step * 0.72:.1f}V{height:g}z"
        for i, value in enumerate(values)
        if value
    )


def _common(request: Request) -> dict[str, Any]:
    """What the frame around every page shows."""
    settings: Settings | None = getattr(request.app.state, "settings", None)
    return {"flower_url": settings and settings.flower_url, "logged_in": "jobstack_session" in request.cookies}


templates = Jinja2Templates(FOLDER / "templates", context_processors=[_common])
templates.env.trim_blocks = templates.env.lstrip_blocks = True
templates.env.filters |= {
    function.__name__: function for function in (ago, bars, clock, duration, label, marked, number, pretty, size)
}
templates.env.globals |= {"static": f"/static/{VERSION}", "now": lambda: datetime.now(UTC).isoformat()}


def page(
    request: Request, name: str, context: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A template's answer. It is not kept by browsers or proxies: it shows what is now, to who may see it."""
    headers = {"Cache-Control": "no-store", **(headers or {})}
    return templates.TemplateResponse(request, name, context, status, headers)


def wants_page(request: Request) -> bool:
    """Whether a person looks at this answer: a browser that opens an address which is not the API's."""
    return "text/html" in request.headers.get("accept", "") and not request.url.path.startswith(
        ("/api/", "/health", "/metrics", "/events", "/static/", "/openapi.json")
    )
