"""`make logs JOB=ID`: which lines of all the logs are one job's."""

import json

import pytest

from scripts.stack import Problem, story

ID, OTHER = "01a1ffe0-f0d8-7389-aa40-f8d677d0f3b0", "01a1ffe0-f0d8-7389-aa40-f8d677d0f3b1"


def line(second: int, message: str, **fields: object) -> str:
    return json.dumps({**fields, "timestamp": f"2026-11-21T20:00:{second:02}.123456Z", "message": message})


LINES = [
    ("worker-1", line(5, "job_ended", job_id=ID, request_id="r1", outcome="retry")),
    ("worker-1", line(6, "job_ended", job_id=OTHER, request_id="r1", outcome="succeeded")),
    ("worker-2", line(9, "job_ended", job_id=ID, request_id="r1", outcome="succeeded")),
    ("api-1", "no JSON, and no time"),
    ("api-1", line(1, "request", request_id="r1", path="/api/jobs/batch", status=202)),
    ("api-1", line(7, "request", request_id="r2", path=f"/api/jobs/{ID}", status=200)),
    ("api-1", line(8, "request", request_id="r3", path=f"/api/jobs/{OTHER}", status=200)),
    ("beat-1", f"2026-11-21 20:00:03 [warning  ] something about {ID}"),
]


def shown(wanted: str) -> list[int]:
    return [LINES.index(each) for each in story.of(LINES, wanted)]


def test_its_own_lines_and_its_requests_in_the_order_of_time() -> None:
    assert shown(ID) == [4, 7, 0, 5, 2]


def test_by_a_requests_id_all_its_jobs() -> None:
    assert shown("r1") == [4, 0, 1, 2]


def test_it_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    story.show(LINES, ID)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "api-1     20:00:01.123  request  request_id=r1  path=/api/jobs/batch  status=202"
    assert last.startswith("worker-2  20:00:09.123  job_ended  job_id=")


def test_nothing_is_a_problem_with_a_next_step() -> None:
    with pytest.raises(Problem, match="No line"):
        story.show(LINES, OTHER.replace("b1", "b2"))
