"""`.env`: made once with generated secrets, read by both modes, beaten by the process environment."""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Callable

from scripts.stack import ROOT, Problem

EXAMPLE = ROOT / ".env.example"
ENV_FILE = ROOT / ".env"

# Hexadecimal: the passwords become part of URLs (compose pastes them in), where @ : / # would cut the URL short.
GENERATED: dict[str, Callable[[], str]] = {
    "POSTGRES_PASSWORD": lambda: secrets.token_hex(24),
    "REDIS_PASSWORD": lambda: secrets.token_hex(24),
    "FLOWER_BASIC_AUTH": lambda: f"admin:{secrets.token_hex(16)}",
    "API_KEYS": lambda: f"local:{secrets.token_hex(24)}",
    "GRAFANA_PASSWORD": lambda: secrets.token_hex(16),
}
REQUIRED = {
    "POSTGRES_PASSWORD": r"[A-Za-z0-9._~-]+",
    "REDIS_PASSWORD": r"[A-Za-z0-9._~-]+",
    "FLOWER_BASIC_AUTH": r"[^:]+:.+",
}
PORTS = {"API_PORT": 8000, "FLOWER_PORT": 5555}


def make(path: Path = ENV_FILE, example: Path = EXAMPLE) -> bool:
    """Write `.env` from `.env.example` with fresh secrets, readable by its owner only.

    Returns:
        False when there is one already: it is never touched.
    """
    text = example.read_text(encoding="utf-8")
    for name, value in GENERATED.items():
        text = re.sub(f"^{name}=$", f"{name}={value()}", text, flags=re.MULTILINE)
    try:
        # The mode at creation and not by chmod afterwards: in between, others could open it.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return True


def parse(text: str) -> dict[str, str]:
    """The variables of a `.env` file, as compose reads the simple cases: quotes go, ` #` starts a comment, no `$`."""
    values = {}
    for line in text.splitlines():
        found = re.match(r"\s*(?:export\s+)?([A-Za-z_]\w*)\s*=\s*(.*)$", line)
        if not found:
            continue
        name, value = found.groups()
        quoted = re.match(r"""(["'])(.*?)\1\s*(?:#.*)?$""", value)
        values[name] = quoted.group(2) if quoted else re.sub(r"(^|\s+)#.*$", "", value).strip()
    return values


def documented(example: Path = EXAMPLE) -> list[str]:
    """Every variable that `.env.example` explains, the commented ones included."""
    return re.findall(r"^#? ?([A-Z][A-Z0-9_]*)=", example.read_text(encoding="utf-8"), re.MULTILINE)


def load(process: Mapping[str, str] | None = None, path: Path = ENV_FILE) -> dict[str, str]:
    """What a person has set: `.env`, beaten by the process environment. An empty value counts as not set."""
    process = os.environ if process is None else process
    values = parse(path.read_text(encoding="utf-8")) if path.exists() else {}
    values.update({name: process[name] for name in {*documented(), *values} if process.get(name)})
    return {name: value for name, value in values.items() if value}


def check(values: Mapping[str, str]) -> None:
    """Refuse what would fail later with a message that names no variable.

    Raises:
        Problem: with the variable's name.
    """
    for name, pattern in REQUIRED.items():
        if not values.get(name):
            raise Problem(
                f"{name} is empty in .env.",
                f"Write {name}={GENERATED[name]()} into .env, or delete .env and get a new one "
                "(a database that exists keeps its old password).",
            )
        if not re.fullmatch(pattern, values[name]):
            shape = "user:password" if ":" in pattern else "letters, digits and . _ ~ - only: it becomes part of a URL"
            raise Problem(f"{name} cannot be used as it is.", f"It must be {shape}.")
    for name in PORTS:
        port(values, name)


def port(values: Mapping[str, str], name: str) -> int:
    given = values.get(name) or str(PORTS[name])
    if not (given.isascii() and given.isdigit() and 0 < int(given) < 65536):
        raise Problem(f"{name}={given} is not a port.", f"For example: {name}={PORTS[name] + 1} make up")
    return int(given)


def is_free(number: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1."""
    with socket.socket() as probe:
        # As servers do: the remains of closed connections are no reason to refuse, a listener is.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except OSError:
            return False
    return True


def need_free(values: Mapping[str, str], name: str) -> None:
    number = port(values, name)
    if not is_free(number):
        raise Problem(
            f"Port {number} is taken by a process that is not part of this stack.",
            f"Stop that process, or choose another port: {name}={number + 1} make up  (or write it into .env)",
        )
