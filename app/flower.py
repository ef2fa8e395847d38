"""`python -m app.flower`: Flower, with our logs. Its own options come from FLOWER_* variables."""

import os

from app import logs
from app.celery_app import celery_app
from app.settings import flower_logins


def main() -> None:
    flower_logins()
    # Before Flower looks: it sends its lines to stderr where nobody takes them.
    logs.configure()
    # No address: that binds IPv4 and IPv6.
    os.environ.setdefault("FLOWER_PORT", os.environ.get("PORT") or "5555")
    celery_app.start(["flower"])


if __name__ == "__main__":
    main()
