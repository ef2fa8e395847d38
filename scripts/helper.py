"""What the scripts share: settings from the environment and `.env`, exit codes, and how they say what is wrong."""

import os
import sys
from pathlib import Path
from typing import NoReturn

from dotenv import dotenv_values

from app import logs
from app.settings import Settings, get_settings

# Exit codes of every script.
FINE, FOUND, COULD_NOT = 0, 1, 2

ROOT = Path(__file__).parent.parent


def stop(message: str) -> NoReturn:
    """The script could not do its work."""
    print(message, file=sys.stderr)
    raise SystemExit(COULD_NOT)


def settings_or_exit() -> Settings:
    """The settings, as the stack's processes have them. The environment beats the files.

    In containers compose has set the environment; natively `make up` keeps what it gave its processes in `.run/env`.
    """
    for file in (".run/env", ".env"):
        for name, value in dotenv_values(ROOT / file).items():
            if value is not None:
                os.environ.setdefault(name, value)
    # What a script has to say goes to its reader; of the log only trouble.
    os.environ.setdefault("LOG_LEVEL", "WARNING")
    try:
        settings = get_settings()
    except SystemExit as error:
        stop(str(error))
    logs.configure(sys.stderr)
    return settings
