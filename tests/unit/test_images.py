"""Each image has what its process imports; seen without building one, by hiding what the image does not have."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"DATABASE_URL": "postgresql://nobody@localhost/none", "REDIS_URL": "redis://localhost/0"}

# What a process has imported once it runs: Celery's commands import the app's tasks, if it names any.
STARTS = {
    "api": "import app.api.app, app.migrate",
    "worker": "import worker.__main__, app.schedule\n"
    "import importlib, pkgutil, worker.handlers as h\n"
    "for m in pkgutil.iter_modules(h.__path__): importlib.import_module(f'worker.handlers.{m.name}')\n"
    # Starts the stack, so it runs outside of it.
    "import scripts as s\n"
    "for m in pkgutil.iter_modules(s.__path__): m.name == 'stack' or importlib.import_module(f'scripts.{m.name}')",
    "beat": "import beat.__main__, beat.health, redis.asyncio",
    "flower": "import flower.app, app.flower\napp.flower.celery_app.loader.import_default_modules()",
}

HIDE = """
import re, sys
from importlib.metadata import packages_distributions
present, folders = {present!r}, {folders!r}
hidden = {{
    name for name, distributions in packages_distributions().items()
    if not present & {{re.sub("[-_.]+", "-", d).lower() for d in distributions}}
}}
class Hide:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in hidden | folders:
            raise ModuleNotFoundError(f"not in this image: {{name}}", name=name)
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize("image", STARTS)
def test_an_image_has_what_its_process_imports(image: str) -> None:
    dockerfile = (ROOT / f"dockerfiles/Dockerfile.{image}").read_text()
    copied = set(re.findall(r"^COPY (\w+) \1$", dockerfile, re.MULTILINE))
    assert "app" in copied
    folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir()} - copied
    lock = (ROOT / f"requirements/{image}.txt").read_text()
    present = set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE))

    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(present=present, folders=folders) + STARTS[image]],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
