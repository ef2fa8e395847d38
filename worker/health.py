"""`python -m worker.health`: exit code 0 while the worker of this container or folder consumes messages.

The file is touched by `worker/consumer.py`. Not asked: PostgreSQL. A worker without it takes messages and lets them go
after a while; a new one could do no better, and jobs that run would die with the old one.
"""

import os

from app import alive

LIMIT_SECONDS = 30


def process_name() -> str:
    """One worker a container; natively two share a folder, so the house-keeper's file has another name."""
    return "worker-maintenance" if os.environ.get("WORKER_QUEUES", "").strip() == "maintenance" else "worker"


if __name__ == "__main__":
    alive.check(process_name(), LIMIT_SECONDS)
