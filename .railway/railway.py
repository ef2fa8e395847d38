"""The whole project on Railway: `railway config plan` shows what would change, `railway config apply` does it.

    pip install railway-sdk        (the CLI evaluates this file with the `python3` on PATH)
    railway link
    NEW_SECRETS=1 railway config apply        the first time
    railway config apply                      from then on

`apply` removes what is not named here: set variables here and not in the dashboard. docs/railway.md has the steps.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

from railway_sdk import Project, Service, bucket, define_railway, github, postgres, preserve, project, redis, service

# Your domain for the API, such as "jobs.example.com". Without one: `railway domain --service api`; domains that Railway
# makes up are no part of this file.
DOMAIN: str | None = None
# sjc (US West), iad (US East), ams (Europe) or sin (Asia). Can't be changed later.
BUCKET_REGION = "iad"
BRANCH = "main"

database, cache, files = postgres("Postgres"), redis("Redis"), bucket("files", region=BUCKET_REGION)

# What every process needs. `${{service.NAME}}` is filled in by Railway; names are exact, capitals too.
EVERYWHERE = {
    "APP_ENV": "production",
    "DATABASE_URL": database.env.DATABASE_URL,
    "REDIS_URL": cache.env.REDIS_URL,
    # No volumes: they allow one replica only, and API and workers could not share one.
    "STORAGE_URL": "s3://${{files.BUCKET}}/jobstack",
}
BUCKET_KEYS = {
    "AWS_ENDPOINT_URL": files.env.ENDPOINT,
    "AWS_REGION": files.env.REGION,
    "AWS_ACCESS_KEY_ID": files.env.ACCESS_KEY_ID,
    "AWS_SECRET_ACCESS_KEY": files.env.SECRET_ACCESS_KEY,
    # As new buckets are; the "Credentials" tab of an old one may say "path-style": then false.
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true",
}
# Above SHUTDOWN_GRACE_SECONDS (60). Railway's default is 0: SIGKILL at once, with every job in progress.
WORKER_DRAINING_SECONDS = 75


def secret() -> dict[str, str]:
    """Made up by Railway where NEW_SECRETS is set, kept otherwise.

    Not by the SDK's random_string, whose value follows from the environment's name: anybody could work it out. Not
    always by Railway: each `apply` would make another one.
    """
    return {"generator": "secret(48)"} if os.environ.get("NEW_SECRETS") else preserve()


def repository() -> str:
    """owner/name of this clone on GitHub."""
    if named := os.environ.get("GITHUB_REPOSITORY"):
        return named
    command = ["git", "-C", str(Path(__file__).parent), "remote", "get-url", "origin"]
    url = subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()
    found = re.search(r"github\.com[:/]([\w.-]+/[\w.-]+?)(\.git)?$", url)
    if not found:
        raise SystemExit("Railway builds from GitHub: push this clone there, or set GITHUB_REPOSITORY=owner/name.")
    return found[1]


def process(
    name: str, image: str, code: list[str], variables: dict[str, Any], *, draining: int = 0, **config: Any
) -> Service:
    """A service of one of our images. `code`: the folders in that image; a change elsewhere starts no deploy."""
    dockerfile = f"dockerfiles/Dockerfile.{image}"
    deploy = {"restartPolicyType": "ALWAYS", "drainingSeconds": draining, "overlapSeconds": 0}
    own = {
        # Both ways to say it: the one in `build` was once seen to be ignored.
        "RAILWAY_DOCKERFILE_PATH": dockerfile,
        "RAILWAY_DEPLOYMENT_DRAINING_SECONDS": str(draining),
    }
    return service(
        name,
        source=github(repository(), branch=BRANCH),
        build={
            "builder": "DOCKERFILE",
            "dockerfilePath": dockerfile,
            "watchPatterns": [*code, dockerfile, f"requirements/{image}.txt"],
        },
        # A worker that ends by itself, with 0 too, must come back: ON_FAILURE would leave it down.
        deploy=deploy,
        replicas=1,
        env=EVERYWHERE | own | variables,
        **config,
    )


def worker(name: str, queues: str) -> Service:
    code = ["app/**", "beat/**", "scripts/**", "worker/**"]
    variables = BUCKET_KEYS | {"WORKER_QUEUES": queues, "WORKER_CONCURRENCY": "2"}
    return process(name, "worker", code, variables, draining=WORKER_DRAINING_SECONDS)


@define_railway
def main() -> Project:
    services = [
        process(
            "api",
            "api",
            ["alembic.ini", "app/**", "migrations/**"],
            BUCKET_KEYS | {"PORT": "8000", "API_KEY": secret(), "API_KEYS": "default:${{API_KEY}}"},
            draining=30,
            # Once a release, before its processes start; if it fails, the old release stays.
            preDeploy="python -m app.migrate",
            healthcheck="/health/ready",
            healthcheckTimeout=120,
            domains=[{"domain": DOMAIN, "port": 8000}] if DOMAIN else None,
        ),
        worker("worker", "high_priority,default,low_priority"),
        # Dispatch and rescue have a worker of their own: the job queues may be full for hours.
        worker("worker-maintenance", "maintenance"),
        process("beat", "beat", ["app/**", "beat/**"], {}),
        # No domain: it shows every job's arguments. Health checks get in without the password.
        process(
            "flower",
            "flower",
            ["app/**"],
            {"PORT": "5555", "FLOWER_PASSWORD": secret(), "FLOWER_BASIC_AUTH": "admin:${{FLOWER_PASSWORD}}"},
            healthcheck="/healthcheck",
            healthcheckTimeout=120,
        ),
    ]
    return project("jobstack", resources=[database, cache, files, *services])
