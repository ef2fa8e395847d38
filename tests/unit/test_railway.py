"""What Railway reads: the graph of .railway/railway.py and the .toml files, side by side with compose and settings."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from app.api.__main__ import GRACE_SECONDS
from app.api.app import create_app
from app.queues import ALL_QUEUES
from app.settings import QUEUES_FOR_JOBS, Settings, SettingsError, get_settings
from tests.processes import ROOT
from tests.railway.config import OURS, environment, evaluate, written

COMPOSE: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
SCHEMA = json.loads(Path(__file__).with_name("railway.schema.json").read_text())
# What Railway documents of them; a reference to anything else stays empty, and nobody says so.
OUTPUTS = {
    "Postgres": {"DATABASE_URL"},
    "Redis": {"REDIS_URL"},
    "files": {"BUCKET", "ENDPOINT", "REGION", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"},
}
# Read by an image's CMD or by Railway, and not by app/settings.py.
OTHERS = {"FLOWER_BASIC_AUTH", "RAILWAY_DOCKERFILE_PATH", "RAILWAY_DEPLOYMENT_DRAINING_SECONDS"}
# Parts of another variable of the same service.
SECRETS = {"API_KEY", "FLOWER_PASSWORD"}


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    return evaluate(monkeypatch)


def test_the_services_are_those_of_compose(graph: dict[str, dict[str, Any]]) -> None:
    images = {
        name: service["build"]["dockerfile"]
        for name, service in COMPOSE.items()
        if "build" in service and name != "migrate"
    }
    services = {name: resource for name, resource in graph.items() if resource["type"] == "service"}
    assert {name: service["build"]["dockerfilePath"] for name, service in services.items()} == images
    assert set(images) == set(OURS)
    for service in services.values():
        assert (ROOT / service["build"]["dockerfilePath"]).is_file()
        assert service["build"]["builder"] == "DOCKERFILE"
        assert environment(service)["RAILWAY_DOCKERFILE_PATH"] == service["build"]["dockerfilePath"]
        assert service["source"] == {"type": "github", "repo": "team/jobs", "branch": "main"}
        # The image's CMD alone decides what runs.
        assert "startCommand" not in service["deploy"]
    kinds = {resource.get("engine", resource["type"]) for resource in graph.values()} - {"service"}
    assert kinds == {"postgres", "redis", "bucket"}


def test_no_service_has_a_volume(graph: dict[str, dict[str, Any]]) -> None:
    assert not [name for name, resource in graph.items() if resource["type"] == "volume"]
    assert not any("volume" in key.lower() for name in OURS for key in graph[name])


def test_each_reference_is_to_something_that_is_there(graph: dict[str, dict[str, Any]]) -> None:
    for name in OURS:
        variables = graph[name]["variables"]
        for value in variables.values():
            for to, output in re.findall(r"\$\{\{(?:(\w+)\.)?(\w+)\}\}", written(value)):
                assert output in (OUTPUTS[to] if to else variables)
                assert not to or to in graph


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Settings]:
    """start({"APP_ENV": "production", ...}) -> the settings of a process with these variables alone."""
    for field in Settings.model_fields:
        monkeypatch.delenv(field.upper(), raising=False)

    def begin(variables: dict[str, str]) -> Settings:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            get_settings.cache_clear()
            return get_settings()

    return begin


@pytest.mark.parametrize("name", OURS)
def test_each_process_starts_with_its_variables_and_needs_each(
    name: str, graph: dict[str, dict[str, Any]], start: Any
) -> None:
    variables = environment(graph[name])
    assert {name.lower() for name in variables} - set(Settings.model_fields) == {
        other.lower() for other in (OTHERS | SECRETS) & set(variables)
    }

    def begin(variables: dict[str, str]) -> Settings:
        settings: Settings = start(variables)
        if name == "api":
            create_app(settings)
        return settings

    settings = begin(variables)
    assert settings.app_env == "production"
    assert not settings.demo_jobs
    assert settings.storage_url == "s3://files-jdhhd8oe18xi/jobstack"
    needed = {"DATABASE_URL", "REDIS_URL", "STORAGE_URL"} | ({"API_KEYS"} if name == "api" else set())
    needed |= (
        {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} if name in ("api", "worker", "worker-maintenance") else set()
    )
    for missing in needed:
        with pytest.raises(SettingsError):
            begin({name: value for name, value in variables.items() if name != missing})


def test_who_touches_files_has_the_keys_of_the_bucket(graph: dict[str, dict[str, Any]]) -> None:
    keys = {"AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    keys |= {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST"}
    for name in OURS:
        assert keys & graph[name]["variables"].keys() == (set() if name in ("beat", "flower") else keys)


def test_every_queue_has_a_consumer(graph: dict[str, dict[str, Any]]) -> None:
    consumed = {}
    for name in ("worker", "worker-maintenance"):
        variables = environment(graph[name])
        consumed[name] = variables["WORKER_QUEUES"].split(",")
        in_compose = COMPOSE[name]["environment"]["WORKER_QUEUES"]
        assert consumed[name] == (in_compose.split(",") if in_compose else list(QUEUES_FOR_JOBS))
        # By the host's number of CPUs, a small container would start dozens.
        assert int(variables["WORKER_CONCURRENCY"]) == 2
    assert sorted(queue for queues in consumed.values() for queue in queues) == sorted(ALL_QUEUES)


def seconds(duration: str) -> int:
    return int(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", duration).removesuffix("s"))


def test_a_process_has_as_long_to_end_as_it_takes(graph: dict[str, dict[str, Any]]) -> None:
    for name in OURS:
        draining = graph[name]["deploy"]["drainingSeconds"]
        assert environment(graph[name])["RAILWAY_DEPLOYMENT_DRAINING_SECONDS"] == str(draining)
        assert draining == seconds(COMPOSE[name].get("stop_grace_period", "0s"))
    for name in ("worker", "worker-maintenance"):
        grace = Settings.model_fields["shutdown_grace_seconds"].default
        assert graph[name]["deploy"]["drainingSeconds"] >= grace + 10
    assert graph["api"]["deploy"]["drainingSeconds"] >= GRACE_SECONDS + 10


def test_what_is_deployed_how(graph: dict[str, dict[str, Any]]) -> None:
    deploy = {name: graph[name]["deploy"] for name in OURS}
    for settings in deploy.values():
        # One that ended with 0 would stay down; and a service that sleeps or runs by the clock does no work.
        assert settings["restartPolicyType"] == "ALWAYS"
        assert not {"cronSchedule", "sleepApplication"} & settings.keys()
    # Whoever listens on no port would never become healthy.
    paths = {name: settings.get("healthcheckPath") for name, settings in deploy.items()}
    assert paths == dict.fromkeys(OURS, None) | {"api": "/health/ready", "flower": "/healthcheck"}
    assert "/health/ready" in create_app(SETTINGS).openapi()["paths"]
    migrates = {name: settings.get("preDeployCommand") for name, settings in deploy.items()}
    assert migrates == dict.fromkeys(OURS, None) | {"api": [" ".join(COMPOSE["migrate"]["command"])]}
    assert (deploy["beat"]["numReplicas"], deploy["beat"]["overlapSeconds"]) == (1, 0)


SETTINGS = Settings.model_validate({"database_url": "postgresql://db/jobs", "redis_url": "redis://cache"})


def test_only_the_api_can_have_a_domain(graph: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any("networking" in graph[name] for name in OURS)
    source = (ROOT / ".railway/railway.py").read_text()
    assert source.count("domains=") == 1
    assert environment(graph["api"])["PORT"] == re.findall(r'"port": (\d+)', source)[0]


def test_secrets_are_made_by_railway_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, later = evaluate(monkeypatch, NEW_SECRETS="1"), evaluate(monkeypatch)
    for service, name in (("api", "API_KEY"), ("flower", "FLOWER_PASSWORD")):
        assert first[service]["variables"][name] == {"type": "raw", "value": {"generator": "secret(48)"}}
        assert later[service]["variables"][name] == {"type": "preserve"}


def test_a_change_starts_the_services_that_it_changes(graph: dict[str, dict[str, Any]]) -> None:
    for name in OURS:
        dockerfile = graph[name]["build"]["dockerfilePath"]
        copied = re.findall(r"^COPY ([a-z]\S+) ", (ROOT / dockerfile).read_text(), re.MULTILINE)
        watched = graph[name]["build"]["watchPatterns"]
        wanted = [f"{path}/**" if (ROOT / path).is_dir() else path for path in copied]
        assert sorted(watched) == sorted([*wanted, dockerfile])


# --- the old way -----------------------------------------------------------------------------------------------------


def settings_of(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


@pytest.mark.parametrize(
    "path", [ROOT / "railway.toml", *sorted((ROOT / "railway").iterdir())], ids=lambda path: path.stem
)
def test_a_config_file_fits_the_schema(path: Path) -> None:
    jsonschema_rs.validate(SCHEMA, settings_of(path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"services": []},
        {"deploy": {"restartPolicyType": "on-failure"}},
        {"deploy": {"preDeployCommand": ["a", "b"]}},
        {"build": {"buildContext": "."}},
    ],
)
def test_the_schema_refuses_what_railway_does(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(SCHEMA, wrong)


def test_the_file_that_every_service_reads_says_nothing_about_one() -> None:
    assert settings_of(ROOT / "railway.toml").keys() == {"$schema", "build"}
    assert settings_of(ROOT / "railway.toml")["build"] == {"builder": "DOCKERFILE"}


def test_the_files_of_the_services_are_the_graph(graph: dict[str, dict[str, Any]]) -> None:
    files = {path.stem: settings_of(path) for path in (ROOT / "railway").iterdir()}
    assert files.keys() == set(OURS)
    for name, config in files.items():
        assert {"build": config["build"], "deploy": config["deploy"]} == {
            part: graph[name][part] for part in ("build", "deploy")
        }


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "dockerfiles").iterdir()), ids=lambda path: path.suffix[1:])
def test_an_image_uses_nothing_that_railways_builder_refuses(path: Path) -> None:
    instructions = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert not [
        line for line in instructions if re.search(r"--mount=|^VOLUME|^ENTRYPOINT|--exclude|^HEALTHCHECK", line)
    ]
    [command] = [line for line in instructions if line.startswith("CMD ")]
    assert json.loads(command.removeprefix("CMD ")), "a list, so that SIGTERM reaches the process"


def test_the_page_names_every_variable_and_dockerfile(graph: dict[str, dict[str, Any]]) -> None:
    page = (ROOT / "docs/railway.md").read_text()
    named = set(re.findall(r"dockerfiles/Dockerfile\.\w+", page))
    assert named == {f"dockerfiles/{path.name}" for path in (ROOT / "dockerfiles").iterdir()}
    for name in OURS:
        for variable, value in graph[name]["variables"].items():
            assert f"\n| `{variable}` |" in page
            assert value["type"] == "preserve" or written(value) in page, variable
