"""A Chromium for the tests: the machine's own; else Debian's, where apt may install it; else Playwright's."""

import os
import shutil
import subprocess
import sys

from playwright.sync_api import Browser, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def _found() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def launch(playwright: Playwright) -> Browser:
    """Headless, and installed first if need be."""
    if not _found() and shutil.which("apt-get") and os.geteuid() == 0:
        for command in ("update", "install -y --no-install-recommends chromium"):
            subprocess.run(["apt-get", "-qq", *command.split()], check=True, stdout=subprocess.DEVNULL)
    if not (path := _found()):
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)
    return playwright.chromium.launch(executable_path=path)
