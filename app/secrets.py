"""What makes a secret one: it comes from where others can't read it, and nobody can guess it."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

SHORTEST = 16
# What examples and hasty people write. A secret is more than a row of such words and a number.
_WORDS = (
    "your|my|the|an|a|some|me|this|that|here|in|to|for|of|it|change|changed|replace|insert|fill|set|put|enter|add|must"
    "|should|be|api|app|flower|redis|postgres|jobstack|web|secret|secure|password|passwd|pass|pw|key|token|auth|login"
    "|example|sample|dummy|fake|placeholder|value|default|admin|root|user|guest|test|testing|demo|todo|tbd|local"
    "|localhost|production|prod|dev|staging|qwerty|letmein|hunter|x|abc|none|null|empty|undefined"
)
_PLACEHOLDER = re.compile(f"(?:(?:{_WORDS})[^a-z0-9]*)*[0-9]{{0,4}}", re.IGNORECASE)


def is_placeholder(secret: str) -> bool:
    """Whether somebody has yet to put a secret here: changeme, your-secret-key, <password>, xxxxxxxx, 12345."""
    bare = re.sub("^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", secret)
    return len(set(bare)) < 5 or bool(_PLACEHOLDER.fullmatch(bare))


def read_files(names: Iterable[str]) -> list[str]:
    """For each NAME whose NAME_FILE is set: puts the file's content into the environment, as NAME.

    So secrets get in that Docker, Kubernetes and systemd hand over as files. What a process puts into its own
    environment is not in /proc/PID/environ and not in `docker inspect`.

    Returns:
        What is wrong, as sentences without the content.
    """
    problems = []
    for name in names:
        path = os.environ.get(f"{name}_FILE")
        if not path:
            continue
        if os.environ.get(name):
            problems.append(f"{name} and {name}_FILE are both set; leave one of them out")
            continue
        try:
            os.environ[name] = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            problems.append(f"{name}_FILE cannot be read: {reason}: {path}")
            continue
        if not os.environ[name]:
            problems.append(f"{name}_FILE is empty: {path}")
        # Once: a process that this one starts would find both set.
        del os.environ[f"{name}_FILE"]
    return problems
