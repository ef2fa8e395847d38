"""Which files go, which stay, and what a broken upload, a crash or a wrong setting leaves to the next run."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
from psycopg.rows import DictRow
from uuid_utils.compat import uuid7

from app.database import Database
from app.files import store
from app.files.store import OWNER_MARK, FileStore
from app.settings import Settings
from tests.integration.conftest import Jobs
from tests.processes import ROOT, Process
from tests.servers import Redis
from tests.waiting import until
from worker.maintenance import _slice, cleanup_old_files

Connection = psycopg.Connection[DictRow]
Upload = Callable[..., str]
Run = Callable[..., dict[str, Any]]
DAY = 86_400


@pytest.fixture
def folder(settings: Settings, db: object, redis: object) -> Iterator[Path]:
    """The storage, empty."""
    folder = Path(settings.storage_url.removeprefix("file://"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def run(folder: Path, database: Database, redis: Redis, settings: Settings) -> Run:
    """run(file_retention_days=30) -> what one run did, in a storage that is known to be ours."""
    assert cleanup_old_files.run(database, redis.client, settings) == {}

    def run(**changes: Any) -> dict[str, Any]:
        return cleanup_old_files.run(database, redis.client, settings.model_copy(update=changes))

    return run


@pytest.fixture
def old(folder: Path, db: Connection, upload: Upload) -> Callable[..., UUID]:
    """old(days=31) -> a stored file of that age."""

    def put(days: float = 31) -> UUID:
        file_id = UUID(upload("a.txt", b"bytes"))
        db.execute("UPDATE files SET created_at = now() - %s * interval '1 day' WHERE id = %s", [days, file_id])
        age(folder / str(file_id), days)
        return file_id

    return put


def age(path: Path, days: float) -> None:
    moment = time.time() - days * DAY
    os.utime(path, (moment, moment))


def needs(db: Connection, job_id: UUID, file_id: UUID) -> None:
    db.execute("INSERT INTO job_files VALUES (%s, %s)", [job_id, file_id])


def ended(jobs: Jobs, db: Connection, days: float, status: str = "failed") -> UUID:
    error = {"error": '{"type": "E", "message": "m"}'} if status == "failed" else {"result": "{}"}
    job_id = jobs.insert(status=status, finished_at="now()", **error)
    db.execute(
        "UPDATE jobs SET created_at = now() - interval '90 days', finished_at = now() - %s * interval '1 day' "
        "WHERE id = %s",
        [days, job_id],
    )
    return job_id


def rows(db: Connection) -> set[UUID]:
    return {row["id"] for row in db.execute("SELECT id FROM files")}


def stored(folder: Path) -> set[UUID]:
    return {UUID(path.name) for path in folder.iterdir() if len(path.name) == 36}


def test_a_file_stays_while_a_job_needs_it(
    run: Run, old: Callable[..., UUID], jobs: Jobs, db: Connection, folder: Path
) -> None:
    young = old(29)
    queued, running, lately, long_ago, both = (old() for _ in range(5))
    old()  # that no job ever named
    needs(db, jobs.insert(), queued)
    claimed = jobs.insert(status="running", attempt=1, lease_token=uuid7(), lease_expires_at="2100-01-01")
    needs(db, claimed, running)
    needs(db, ended(jobs, db, 29, "succeeded"), lately)
    needs(db, ended(jobs, db, 31), long_ago)
    needs(db, (kept := ended(jobs, db, 31)), both)
    needs(db, jobs.insert(), both)
    assert run() == {"expired": 2}
    assert rows(db) == stored(folder) == {young, queued, running, lately, both}
    # The job itself stays, and so do the links of a file that stays.
    links = db.execute("SELECT job_id FROM job_files WHERE file_id = %s", [both]).fetchall()
    assert kept in {row["job_id"] for row in links}
    assert run() == {}


def test_zero_days_keep_files_for_ever(run: Run, old: Callable[..., UUID], db: Connection) -> None:
    old(10_000)
    assert run(file_retention_days=0) == {}
    assert run(file_retention_days=1) == {"expired": 1}


def test_bytes_and_rows_without_the_other_go_after_a_day(
    run: Run, old: Callable[..., UUID], jobs: Jobs, db: Connection, folder: Path
) -> None:
    whole = old(2)
    for days in (0.9, 1.1):
        (path := folder / str(uuid7())).write_bytes(b"its row never came")
        age(path, days)
    lost_young, lost, lost_but_needed = old(0.9), old(1.1), old(1.1)
    for file_id in (lost_young, lost, lost_but_needed):
        (folder / str(file_id)).unlink()
    needs(db, ended(jobs, db, 0), lost_but_needed)
    assert run() == {"bytes_without_row": 1, "rows_without_bytes": 1}
    assert rows(db) == {whole, lost_young, lost_but_needed}
    assert len(stored(folder)) == 2
    assert run() == {}


def test_names_that_are_not_ours_stay(run: Run, folder: Path) -> None:
    id_ = str(uuid7())
    names = [OWNER_MARK, "photo.jpg", id_.upper(), f"{id_}.bak", f"x{id_}", id_.replace("-", ""), f"{id_}#draft"]
    for name in names:
        if name != OWNER_MARK:
            (folder / name).write_bytes(b"somebody's")
        age(folder / name, 400)
    below = folder / "below"
    below.mkdir()
    (below / str(uuid7())).write_bytes(b"somebody's")
    age(below / next(below.iterdir()).name, 400)
    assert run() == {}
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "below"])
    assert len(list(below.iterdir())) == 1


def test_an_upload_that_was_killed_leaves_nothing_for_ever(
    run: Run, folder: Path, tmp_path: Path, settings: Settings
) -> None:
    code = """
import asyncio, uuid
from app.files.store import FileStore
from app.settings import get_settings
async def slow():
    while True:
        yield bytes(6 * 1024 * 1024)
        await asyncio.sleep(0.1)
async def main():
    await FileStore(get_settings()).write(uuid.uuid4(), slow())
asyncio.run(main())
"""
    uploading = Process([sys.executable, "-c", code], tmp_path, PYTHONPATH=ROOT)
    begun = until(lambda: [path for path in folder.iterdir() if "#" in path.name], "the upload has begun")
    uploading.kill()
    assert run() == {}
    for path in begun:
        age(path, 1.1)
    assert run() == {"broken_uploads": len(begun)}
    assert [path.name for path in folder.iterdir()] == [OWNER_MARK]


def test_a_crash_between_row_and_bytes_is_made_up_for(
    run: Run, old: Callable[..., UUID], db: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {old() for _ in range(3)}

    def crash(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "remove", crash)
        with pytest.raises(MemoryError):
            run()
    assert rows(db) == set()
    assert stored(folder) == files
    newer = old(2)
    assert run() == {"bytes_without_row": 3}
    assert stored(folder) == {newer}


def test_an_emptied_table_does_not_cost_the_files_as_well(
    run: Run, old: Callable[..., UUID], db: Connection, folder: Path
) -> None:
    """Somebody is about to load the backup. Only when life has gone on for a day they are left over for good."""
    files = {old(400) for _ in range(3)}
    db.execute("DELETE FROM files")
    assert run() == {}
    young = old(0.9)
    assert run() == {}
    assert stored(folder) == {*files, young}
    settled = old(1.1)
    assert run() == {"bytes_without_row": 3}
    assert stored(folder) == {young, settled}


@pytest.mark.parametrize("client", ["with Redis", "without"])
def test_slices_and_pages_cover_everything_once(
    client: str,
    run: Run,
    old: Callable[..., UUID],
    folder: Path,
    db: Connection,
    database: Database,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows, bytes and both, of all sorts, so that the edges of pages fall everywhere."""
    monkeypatch.setattr(cleanup_old_files, "PAGE", 3)
    whole = [old(days) for days in (2, 31) * 10]
    for file_id in [old(2) for _ in range(7)]:
        (folder / str(file_id)).unlink()
    for _ in range(8):
        (path := folder / str(uuid7())).touch()
        age(path, 2)
    for file_id in [old(2) for _ in range(7)]:
        (folder / str(file_id)).unlink()
    whole += [old(days) for days in (2, 31) * 5]
    total: dict[str, int] = {}
    slices = 0
    if client == "with Redis":
        monkeypatch.setattr(_slice, "SLICE_SECONDS", 0)
    while True:
        done = run() if client == "with Redis" else cleanup_old_files.run(database, None, settings)
        unfinished = done.pop("unfinished", False)
        total = {name: total.get(name, 0) + done.get(name, 0) for name in {*total, *done}}
        slices += 1
        if not unfinished:
            break
    assert total == {"expired": 15, "bytes_without_row": 8, "rows_without_bytes": 14}
    assert rows(db) == stored(folder) == set(whole[::2])
    assert (slices > 10) == (client == "with Redis")
    monkeypatch.undo()
    assert run() == {}


def test_another_databases_storage_is_left_alone(
    run: Run, old: Callable[..., UUID], db: Connection, folder: Path
) -> None:
    old()
    (orphan := folder / str(uuid7())).touch()
    age(orphan, 400)
    old(2)
    mark = folder / OWNER_MARK
    ours = mark.read_text()
    mark.write_text("7000000000000000000/production")
    assert "skipped" in run()
    assert len(stored(folder)) == 3
    assert len(rows(db)) == 2
    mark.write_text(ours + "\n")  # the remedy, with an editor
    assert run() == {"expired": 1, "bytes_without_row": 1}


def test_a_storage_is_only_claimed_if_both_sides_fit(
    old: Callable[..., UUID], folder: Path, database: Database, redis: Redis, settings: Settings, db: Connection
) -> None:
    def run() -> dict[str, Any]:
        return cleanup_old_files.run(database, redis.client, settings)

    # Staging's empty database and production's bucket.
    for _ in range(3):
        age_me = folder / str(uuid7())
        age_me.touch()
        age(age_me, 400)
    assert "skipped" in run()
    assert len(stored(folder)) == 3
    # The right bucket, before any clean-up ever ran: most files are known.
    known = {old(2) for _ in range(3)}
    assert run() == {"bytes_without_row": 3}
    assert stored(folder) == known
    # A new, empty bucket while the files are elsewhere.
    shutil.rmtree(folder)
    folder.mkdir()
    assert "skipped" in run()
    assert rows(db) == known
    assert not (folder / OWNER_MARK).exists()


def test_who_asks_first_owns_an_empty_storage(folder: Path, settings: Settings) -> None:
    files = FileStore(settings)
    assert files.owner() is None
    files.claim("first")
    files.claim("second")
    assert files.owner() == "first"


def test_a_retry_at_the_same_moment_keeps_its_files(
    run: Run, old: Callable[..., UUID], jobs: Jobs, db: Connection, settings: Settings
) -> None:
    file_id, other = old(), old()
    job_id = ended(jobs, db, 31)
    needs(db, job_id, file_id)
    with psycopg.connect(settings.database_conninfo) as person:
        # The statement RETRY, not yet committed.
        person.execute(
            "UPDATE jobs SET status = 'queued', finished_at = NULL, error = NULL, lease_token = NULL WHERE id = %s",
            [job_id],
        )
        assert run() == {"expired": 1}
    assert rows(db) == {file_id}
    assert other not in rows(db)
    assert run() == {}


@pytest.mark.timeout(180)
def test_a_post_keeps_its_file_or_gets_its_422(
    run: Run, old: Callable[..., UUID], api: httpx.Client, db: Connection, folder: Path
) -> None:
    """Posts against clean-ups: whoever was accepted finds its file."""
    seen = set[int]()
    for _ in range(6):
        files = [old() for _ in range(40)]
        started = threading.Barrier(3, timeout=60)
        answers: dict[UUID, int] = {}

        def post(part: list[UUID], started: threading.Barrier = started, answers: dict[UUID, int] = answers) -> None:
            with httpx.Client(base_url=api.base_url, timeout=20) as client:
                client.get("/health/live")
                started.wait()
                for file_id in part:
                    body = {"kind": "text_report", "payload": {"file_id": str(file_id)}}
                    answers[file_id] = client.post("/api/jobs", json=body).status_code

        threads = [threading.Thread(target=post, args=(files[start::2],)) for start in (0, 1)]
        for thread in threads:
            thread.start()
        started.wait()
        run()
        for thread in threads:
            thread.join()
        seen |= set(answers.values())
        kept = {file_id for file_id, status in answers.items() if status == 202}
        assert {file_id for file_id, status in answers.items() if status == 422} == set(files) - kept
        assert kept <= rows(db)
        assert kept <= stored(folder)
        run()
        assert set(files) - kept == set(files) - rows(db)
    assert seen <= {202, 422}


def test_a_job_that_comes_between_the_look_and_the_lock_keeps_its_file(
    run: Run, old: Callable[..., UUID], jobs: Jobs, db: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, other = old(), old()
    paused = (
        store.DELETE_EXPIRED.replace(
            "WITH old", "WITH pause AS MATERIALIZED (SELECT pg_advisory_xact_lock_shared(1)), old", 1
        )
        .replace("FROM files\n", "FROM files CROSS JOIN pause\n", 1)
        .replace("FOR UPDATE SKIP", "FOR UPDATE OF files SKIP", 1)
    )
    monkeypatch.setattr(store, "DELETE_EXPIRED", paused)
    done: list[dict[str, Any]] = []
    cleaning = threading.Thread(target=lambda: done.append(run()))
    db.execute("SELECT pg_advisory_lock(1)")
    cleaning.start()
    waits = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    until(lambda: db.execute(waits).rowcount == 1, "it has looked")
    needs(db, jobs.insert(), named)
    db.execute("SELECT pg_advisory_unlock(1)")
    cleaning.join()
    assert done == [{"expired": 1}]
    assert rows(db) == stored(folder) == {named}
    assert other not in rows(db)


def test_two_at_once(run: Run, old: Callable[..., UUID], db: Connection, settings: Settings, redis: Redis) -> None:
    for _ in range(300):
        old()
    done: list[dict[str, Any]] = []

    def one() -> None:
        database = Database(settings, "another")
        done.append(cleanup_old_files.run(database, redis.client, settings))
        database.close()

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each.get("expired", 0) for each in done) == 300
    assert rows(db) == set()
