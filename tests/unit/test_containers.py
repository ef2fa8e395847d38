"""What must hold of every service and image, the ones that are added later too; read from the files, without Docker."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery
from pydantic import SecretStr

from app.celery_app import configuration
from app.database import open_pool
from app.jobs.messages import RUN_JOB
from app.queues import ALL_QUEUES, MAINTENANCE
from app.schedule import SCHEDULE
from app.settings import QUEUES_FOR_JOBS, Settings
from scripts.stack import environment
from worker import maintenance

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("api", "worker", "worker-maintenance", "beat", "flower")
SETTINGS = Settings(database_url=SecretStr("postgresql://db/jobs"), redis_url=SecretStr("redis://cache"))
DOCKERFILES = sorted((ROOT / "dockerfiles").iterdir())


def variables() -> set[str]:
    """Every variable that compose takes from outside."""
    text = TEXT + (ROOT / "docker-compose.prod.yml").read_text()
    return set(re.findall(r"\$\{(\w+)", text.replace("$${", ""))) | {
        name for service in SERVICES.values() for name, value in service.get("environment", {}).items() if value is None
    }


def default(expression: str) -> str:
    """What `${NAME:-value}` is when nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", expression)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_little_and_takes_little(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["restart"] == ("no" if name == "migrate" else "unless-stopped")
    assert name == "migrate" or service["healthcheck"]["test"][0] == "CMD"
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:${")


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_is_named_so_that_a_second_clone_collides(name: str) -> None:
    assert not {"container_name", "hostname"} & SERVICES[name].keys()
    assert "name" not in COMPOSE
    assert not any(thing and "name" in thing for kind in ("networks", "volumes") for thing in COMPOSE[kind].values())


@pytest.mark.parametrize("name", OURS)
def test_every_setting_reaches_every_process(name: str) -> None:
    wanted = {field.upper() for field in Settings.model_fields} | {"BROKER_URL", "AWS_ENDPOINT_URL", "AWS_REGION"}
    wanted -= {"HOST"}  # the image's
    if name != "api":
        wanted -= {"PORT"}
    if not name.startswith("worker"):
        wanted = {setting for setting in wanted if not setting.startswith("WORKER_")}
    assert wanted <= SERVICES[name]["environment"].keys()


def test_the_example_explains_every_variable_and_no_other() -> None:
    assert set(environment.documented()) - variables() == {"COMPOSE_PROJECT_NAME", "COMPOSE_FILE"}
    assert variables() - set(environment.documented()) == set()


def test_every_queue_has_a_consumer() -> None:
    consumed: set[str] = set()
    for service in SERVICES.values():
        if service.get("build", {}).get("dockerfile", "").endswith(".worker"):
            queues = service["environment"]["WORKER_QUEUES"]
            consumed |= set(queues.split(",") if queues else QUEUES_FOR_JOBS)
    assert consumed == set(ALL_QUEUES)


def test_every_task_has_a_queue() -> None:
    # Not our own app, whose settings would be these for all tests that come later.
    app = Celery(set_as_current=False)
    app.conf.update(configuration(SETTINGS))
    house_keeping = {module.__name__.rpartition(".")[2] for module in maintenance.ALL}
    routes = {name: app.amqp.router.route({}, name)["queue"].name for name in (RUN_JOB, *house_keeping)}
    assert routes == {RUN_JOB: "default"} | dict.fromkeys(house_keeping, MAINTENANCE)
    assert {entry.task for entry in SCHEDULE} < house_keeping


@pytest.mark.parametrize("name", ["worker", "worker-maintenance"])
def test_a_worker_is_killed_only_after_its_own_grace(name: str) -> None:
    granted = default(SERVICES[name]["stop_grace_period"])
    assert int(granted.removesuffix("s")) >= Settings.model_fields["shutdown_grace_seconds"].default + 10


def test_postgresql_has_room_for_every_connection() -> None:
    """Twice over, since a rolling deploy runs old and new side by side; and psql must get in on a bad night."""
    [limit] = [word for word in SERVICES["postgres"]["command"] if "max_connections" in word]
    a_pool = open_pool(SETTINGS).max_size
    # A child holds one connection, its heartbeat's thread takes turns on it; the parent opens one when a child died.
    children = Settings.model_fields["worker_concurrency"].default
    house_keepers = int(default(SERVICES["worker-maintenance"]["environment"]["WORKER_CONCURRENCY"]))
    at_most = a_pool + (children + 1) + (house_keepers + 1) + len(["beat", "migrate"])
    reserved_for_superusers = 3
    assert 2 * at_most + reserved_for_superusers + 20 <= int(default(limit).rpartition("=")[2])


def test_nothing_starts_on_an_old_schema() -> None:
    for name in OURS:
        assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    # And a Redis that is not well does not keep the API from accepting jobs.
    assert SERVICES["api"]["depends_on"]["redis"] == {"condition": "service_started"}


def test_a_saved_file_concerns_one_service_at_most() -> None:
    """`docker compose watch` of older releases can't rebuild two at once: containers end up stopped or doubled."""
    rules = [(name, rule) for name, service in SERVICES.items() for rule in service.get("develop", {}).get("watch", [])]
    for name, rule in rules:
        for other, inner in rules:
            ignored = {str(Path(rule["path"], pattern)) for pattern in rule.get("ignore", [])}
            if name != other and Path(inner["path"]).is_relative_to(rule["path"]):
                assert inner["path"] in ignored, f"{name} and {other} both watch {inner['path']}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_builds_wherever_one_is_built(path: Path) -> None:
    text = path.read_text()
    # Railway's builder refuses the first; VOLUME would hide what is copied there; the last needs a newer syntax.
    assert not re.search(r"--mount=type=cache|^VOLUME|COPY --exclude", text, re.MULTILINE)
    assert re.search(r'^CMD \["', text, re.MULTILINE)
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE)
    assert "--require-hashes" in text
