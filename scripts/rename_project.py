"""Gives this clone a name of its own: in code, settings, compose, metrics, tests and docs.

python scripts/rename_project.py acme_jobs --dry-run
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

import typer

from scripts import helper
from scripts.helper import FINE, FOUND, ROOT, AsJson, DryRun, Report, Yes, count, stop

# In names of Python, SQL, Prometheus and of environment variables alike.
SHAPE = r"[a-z][a-z0-9_]{1,29}"


def main(
    new_name: Annotated[str, typer.Argument(metavar="NEW_NAME", help="Small letters, digits and _.")],
    as_json: AsJson = False,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Exits 0: renamed. 1 with --dry-run. Run it before the first `make up`: data keeps the name it was made with."""
    report = Report(as_json)
    dirty = git("status", "--porcelain", "--untracked-files=no")
    old = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    new = new_name.replace("-", "_")
    if not re.fullmatch(SHAPE, new):
        stop(f"{new_name!r} cannot be a name: 2 to 30 small letters, digits and _, a letter first, as in acme_jobs.")
    if new == old:
        stop(f"It is called {old} already.")
    if dirty:
        stop("There are changes that are not committed. Commit them first: git diff then shows what the name changed.")
    texts = {path: text for path in git("ls-files").splitlines() if (text := read(ROOT / path)) is not None}
    changed = {path: text for path, text in texts.items() if old in text.lower()}
    report.say(f"{old} -> {new} in {count(len(changed), 'file')}.")
    if taken := [path for path, text in texts.items() if new in text.lower() and "rename_project" not in path]:
        text = (
            f"{new!r} is a word in {count(len(taken), 'file')} already, such as {taken[0]}: another rename would take"
        )
        report.say(f"{text} those along. It works; a name of its own is better.", "yellow")
    if dry_run:
        report.done(FOUND, old=old, new=new, would_change=list(changed))
    report.confirm(f"{count(len(changed), 'file')} will be written.", yes)
    for path, text in changed.items():
        # In place, so that modes stay.
        (ROOT / path).write_text(rename(text, old, new), encoding="utf-8", newline="")
    ruff = Path(sys.executable).with_name("ruff")
    if ruff.exists():  # a longer name may move line breaks
        subprocess.run([str(ruff), "format", "--quiet", "."], check=False, cwd=ROOT)
    if (ROOT / ".run").exists():
        report.say("A database that exists keeps its old name and role: make clean starts a new one.", "yellow")
    report.next("make lint test, then git commit. git checkout . takes it back.")
    report.done(FINE, old=old, new=new, changed=list(changed))


def rename(text: str, old: str, new: str) -> str:
    for was, is_now in ((old, new), (old.upper(), new.upper()), (old.capitalize(), new.capitalize())):
        text = text.replace(was, is_now)
    return text


def read(path: Path) -> str | None:
    """A text file's text."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError:
        return None


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        stop(
            "This is not a git clone, and only git knows which files are the project's. Run it where you edit the code."
        )
    return done.stdout


if __name__ == "__main__":
    helper.run(main)
