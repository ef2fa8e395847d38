"""`python -m app.flower`: Flower, with our logs. Its own options come from FLOWER_* variables."""

import os
import sys

from app import logs
from app.celery_app import celery_app


def main() -> None:
    if not os.environ.get("FLOWER_BASIC_AUTH"):
        sys.exit("flower: set FLOWER_BASIC_AUTH to user:password; without it, it would show every argument to anybody")
    # Before Flower looks: it sends its lines to stderr where nobody takes them.
    logs.configure()
    # No address: that binds IPv4 and IPv6.
    os.environ.setdefault("FLOWER_PORT", os.environ.get("PORT") or "5555")
    celery_app.start(["flower"])


if __name__ == "__main__":
    main()
