"""Our messages are what Celery itself would have sent."""

import base64
import json
from typing import Any
from uuid import uuid4

import redis as redis_py
from celery import Celery
from kombu import Queue

from app.celery_app import configuration
from app.jobs import messages
from app.jobs.messages import Address
from app.settings import Settings
from tests.servers import Redis

# What our messages leave out: nobody reads it.
UNUSED = {"shadow", "group_index", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps"}


def body(message: dict[str, Any]) -> Any:
    return json.loads(base64.b64decode(message["body"]))


def test_a_message_has_celerys_form(settings: Settings, redis: Redis) -> None:
    sender = Celery("sender", set_as_current=False)
    sender.conf.update(configuration(settings) | {"task_queues": [Queue("default")], "task_default_queue": "default"})
    job_id = uuid4()
    sender.send_task("run_job", [str(job_id)], queue="default", task_id=f"{job_id}:x", time_limit=10)
    sender.close()
    theirs = json.loads(redis.client.lpop("default"))  # type: ignore[arg-type]
    ours = json.loads(messages.job_message(Address(job_id, "flaky", "default"), settings))

    assert set(ours) == set(theirs)
    assert set(theirs["headers"]) - UNUSED == set(ours["headers"]) - UNUSED
    assert set(theirs["properties"]) - {"reply_to"} == set(ours["properties"])
    assert body(ours)[:2] == body(theirs)[:2]
    varying = {"id", "root_id", "origin", "argsrepr", "ignore_result"}
    for name in set(ours["headers"]) - varying:
        assert ours["headers"][name] == theirs["headers"][name], name
    for name in ("delivery_mode", "delivery_info", "priority", "body_encoding"):
        assert ours["properties"][name] == theirs["properties"][name], name
    assert ours["headers"]["ignore_result"] is True


def test_a_task_id_begins_with_the_jobs_id_and_never_comes_again(settings: Settings) -> None:
    """Workers remember revoked ids: a job that was cancelled and then retried must not be dropped."""
    job = Address(uuid4(), "sleep", "default")
    ids = [json.loads(messages.job_message(job, settings))["headers"]["id"] for _ in range(2)]
    assert all(task_id.startswith(str(job.id)) for task_id in ids)
    assert len({*ids, str(job.id)}) == 3
    assert messages.job_id_of(messages.job_message(job, settings)) == job.id


def test_what_is_not_ours_is_no_job() -> None:
    for message in (b"", b"{}", b"[]", b'{"headers": {"id": 5}}', b'{"headers": {"id": "x"}}', b"\xff"):
        assert messages.job_id_of(message) is None


def test_every_command_has_a_time_limit(settings: Settings, redis: Redis) -> None:
    client = messages.connect(settings, seconds=2)
    assert client.ping()
    redis.freeze()
    try:
        client.ping()
    except redis_py.TimeoutError:
        pass
    else:
        raise AssertionError("a frozen Redis answered")
    finally:
        redis.thaw()
    assert client.ping()
    client.close()
