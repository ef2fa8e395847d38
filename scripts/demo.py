"""Sends a job of each kind, with the files in samples/, and follows them to their ends: `make demo`."""

import os
import time
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import httpx
import typer
from PIL import Image
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

SAMPLES = Path(__file__).parent.parent / "samples"
FINISHED = {"succeeded": "green", "failed": "red", "cancelled": "yellow"}
FINE, FOUND, COULD_NOT = 0, 1, 2

console = Console()


class Wanted(NamedTuple):
    """A job to hand in, and how it should end."""

    kind: str
    payload: dict[str, Any]
    shows: str
    ends: str = "succeeded"


def main(
    url: Annotated[str, typer.Option(envvar="API_URL", help="Where the API is.")] = "http://127.0.0.1:8000",
    shown_url: Annotated[str, typer.Option(envvar="SHOWN_URL", help="Where you reach it, for links.")] = "",
) -> None:
    """Exit code 0: every job ended as it should. 1: one did not. 2: the API could not be asked."""
    key = os.environ.get("API_KEYS", "").split(",")[0].partition(":")[2]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        # trust_env: a proxy for the outside world has no business here.
        with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as api:
            jobs = _follow(api, _hand_in(api))
            _show(api, jobs, shown_url or url)
    except httpx.HTTPStatusError as error:
        console.print(f"{error.request.method} {error.request.url}: {error.response.status_code} {error.response.text}")
        raise typer.Exit(COULD_NOT) from None
    except httpx.TransportError as error:
        console.print(f"The API at {url} does not answer ({error}). Is the stack up? make up, make ps")
        raise typer.Exit(COULD_NOT) from None
    raise typer.Exit(FINE if all(job["status"] == wanted.ends for wanted, job in jobs) else FOUND)


def _call(api: httpx.Client, method: str, path: str, **options: Any) -> Any:
    return api.request(method, path, **options).raise_for_status().json()


def _upload(api: httpx.Client, name: str) -> str:
    with (SAMPLES / name).open("rb") as file:
        return str(_call(api, "POST", "/api/files", files={"file": (name, file)})["id"])


def _hand_in(api: httpx.Client) -> list[tuple[Wanted, dict[str, Any]]]:
    text, image, sound = (_upload(api, name) for name in ("story.txt", "landscape.jpg", "speech.wav"))
    wanted = [
        Wanted("text_report", {"file_id": text, "top": 8}, "a short job on an upload"),
        Wanted("thumbnail", {"file_id": image, "width": 360}, "a file as result"),
        Wanted("waveform", {"file_id": sound, "chunk_seconds": 1}, "chunks, each of them done once"),
        Wanted("sleep", {"seconds": 6, "steps": 60}, "progress"),
        Wanted("flaky", {"failures": 1, "error": "transient"}, "an error, then a retry"),
        Wanted("webhook", {"url": "http://169.254.169.254/", "body": {}}, "must not reach private networks", "failed"),
    ]
    # `flaky` is not offered in production.
    offered = {kind["kind"] for kind in _call(api, "GET", "/api/kinds")["kinds"]}
    return [
        (job, _call(api, "POST", "/api/jobs", json={"kind": job.kind, "payload": job.payload}))
        for job in wanted
        if job.kind in offered
    ]


def _follow(api: httpx.Client, jobs: list[tuple[Wanted, dict[str, Any]]]) -> list[tuple[Wanted, dict[str, Any]]]:
    """Poll until all have ended."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(12),
        TextColumn("{task.fields[status]}"),
        TextColumn("[dim]{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        rows = {job["id"]: bars.add_task(wanted.kind, total=None, status="", note=wanted.shows) for wanted, job in jobs}
        while True:
            jobs = [(wanted, _call(api, "GET", f"/api/jobs/{job['id']}")) for wanted, job in jobs]
            for _, job in jobs:
                _draw(bars, rows[job["id"]], job)
            if all(job["status"] in FINISHED for _, job in jobs):
                return jobs
            time.sleep(0.2)


def _draw(bars: Progress, row: TaskID, job: dict[str, Any]) -> None:
    colour = FINISHED.get(job["status"], "cyan")
    attempt = f" ({job['attempt']})" if job["attempt"] > 1 else ""
    bars.update(row, status=f"[{colour}]{job['status']}{attempt}[/]")
    if job["status"] in FINISHED:
        bars.update(row, total=1, completed=1)
        bars.stop_task(row)
    elif job["progress"]:
        bars.update(row, total=job["progress"]["total"], completed=job["progress"]["current"])


def _show(api: httpx.Client, jobs: list[tuple[Wanted, dict[str, Any]]], url: str) -> None:
    for wanted, job in jobs:
        result = job["result"] or {}
        shown: Any = _table(job["error"] or result)
        if job["kind"] == "thumbnail" and result and console.is_terminal:
            shown = _picture(api.get(f"/api/files/{result['file_id']}/content").raise_for_status().content)
        verdict = "" if wanted.ends == "succeeded" else ", as it should" if job["status"] == wanted.ends else "!"
        console.print(Panel(shown, title=f"{job['kind']}: {job['status']}{verdict}", expand=False))
    for _, job in jobs:
        for name in ("file_id", "image_file_id"):
            if name in (job["result"] or {}):
                console.print(f"{job['kind']}: {url}/api/files/{job['result'][name]}/content", soft_wrap=True)


def _table(values: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False)
    for name, value in values.items():
        lines = value if isinstance(value, list) else [[value]]
        text = "\n".join(" ".join(f"{part:.2f}" if isinstance(part, float) else str(part) for part in x) for x in lines)
        table.add_row(f"[dim]{name}", Text(text, overflow="fold"))
    return table


def _picture(content: bytes, width: int = 44) -> Text:
    """An image as coloured half blocks, two pixels a character."""
    image = Image.open(BytesIO(content)).convert("RGB")
    image = image.resize((width, max(2, round(image.height * width / image.width / 2) * 2)))
    text = Text(no_wrap=True)
    for y in range(0, image.height, 2):
        for x in range(width):
            upper, lower = ("#{:02x}{:02x}{:02x}".format(*image.getpixel((x, y + half))) for half in (0, 1))  # type: ignore[misc]
            text.append("▀", style=f"{upper} on {lower}")
        text.append("\n")
    return text


if __name__ == "__main__":
    typer.run(main)
