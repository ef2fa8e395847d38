"""Runs one job here and now, in this process, with a progress bar. Its row is claimed from birth: no worker takes it.

python scripts/run_job.py sleep --payload '{"seconds": 3}'
python scripts/run_job.py text_report --payload @request.json
"""

import json
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psycopg
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from uuid_utils.compat import uuid7

from app.database import Database
from app.jobs import statements
from app.jobs.kind import Kind
from app.jobs.kinds import offered_kinds
from app.jobs.requests import shown
from app.jobs.stats import CREATED
from app.queues import QUEUE_OF_PRIORITY
from app.settings import Settings
from scripts import helper
from scripts.helper import FINE, FOUND, AsJson, Script, stop
from worker.runner import Claim, Runner


def main(
    kind: Annotated[str, typer.Argument(help="The kind of job, as in GET /api/kinds.")],
    payload: Annotated[str, typer.Option(help="JSON, or @FILE with JSON in it.")] = "{}",
    as_json: AsJson = False,
) -> None:
    """Exits 0: it succeeded. 1: it ended otherwise. 2: it could not be run."""
    script = Script(as_json)
    kinds = offered_kinds(script.settings)
    if kind not in kinds:
        stop(f"There is no kind {kind!r}; there are: {', '.join(kinds)}.")
    values = _payload(kinds[kind], payload)
    _ = script.database  # named at once if it is away
    runner = Runner(script.settings, worker="run_job", may_kill=False)
    claim = _claim(runner, kinds[kind], values)
    _run(runner, claim, script.settings, quiet=as_json)
    [row] = runner.database.run(statements.GET, {"id": claim.id})
    runner.close()
    job = shown(row)
    if job.status == "succeeded":
        script.say(json.dumps(job.result, indent=2, ensure_ascii=False))
    else:
        script.say(f"{job.status} {f'{job.error.type}: {job.error.message}' if job.error else ''}", "red")
        if job.status == "queued":
            script.say(f"It will be retried by a worker after {job.run_at:%H:%M:%S} UTC.")
    script.done(FINE if job.status == "succeeded" else FOUND, job=job.model_dump(mode="json"))


def _payload(kind: Kind, text: str) -> Any:
    """The validated payload."""
    try:
        content = Path(text[1:]).read_text() if text.startswith("@") else text
        return kind.payload.model_validate(json.loads(content))
    except OSError as error:
        stop(f"The payload cannot be read: {error}")
    except json.JSONDecodeError as error:
        stop(f"The payload is not JSON: {error}")
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'payload'}: {e['msg']}" for e in error.errors())
        stop(f"The payload does not fit {kind.name}: {found}")


def _claim(runner: Runner, kind: Kind, payload: Any) -> Claim:
    try:
        [row] = runner.database.run(
            statements.CREATE_CLAIMED,
            {
                **runner.identity(),
                "id": uuid7(),
                "kind": kind.name,
                "priority": kind.priority,
                "queue": QUEUE_OF_PRIORITY[kind.priority],
                "payload": payload.model_dump_json(),
                "max_attempts": kind.max_attempts,
                "file_ids": list(dict.fromkeys(kind.file_ids(payload))),
            },
        )
    except psycopg.errors.ForeignKeyViolation:
        stop("The payload names a file that does not exist; upload it first with POST /api/files.")
    runner.stats.count(row["queue"], row["kind"], CREATED)
    return Claim(**row)


def _run(runner: Runner, claim: Claim, settings: Settings, *, quiet: bool) -> None:
    """The handler stays in the main thread, where its soft time limit works; the bar reads the row from another."""
    done = threading.Event()

    def follow() -> None:
        database = Database(settings, "run_job")
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(claim.kind, total=None)
            while not done.wait(0.3):
                [row] = database.run(statements.GET, {"id": claim.id})
                if row["progress"]:
                    bar.update(task, completed=row["progress"]["current"], total=row["progress"]["total"])
        database.close()

    watcher = threading.Thread(target=follow, daemon=True)
    if not quiet:
        watcher.start()
    runner.run(claim)
    done.set()
    if not quiet:
        watcher.join(2)


if __name__ == "__main__":
    helper.run(main)
