"""`python -m beat`: sends the house-keeping's ticks. Any number of replicas and of restarts is harmless.

Not Celery's beat: that one keeps its schedule in memory or in a file, so two of it send everything twice, a restart
forgets or repeats, and a Redis that comes back empty has lost what it sent. Here each tick is a row: app/ticks.py.
"""

import faulthandler
import os
import signal
import time

import psycopg

from app import alive, logs, migrate
from app.jobs.messages import REDIS_ERRORS
from app.settings import get_settings
from beat.rounds import Beat

log = logs.get("beat")

AWAY_SECONDS = 1
# All calls have limits far below. Who is stuck all the same ends, with its stack in the log, and is started again.
STUCK_SECONDS = 120


def main() -> None:
    logs.configure()
    for number in (signal.SIGTERM, signal.SIGINT):
        # At once, and by no exception: psycopg would first ask a frozen PostgreSQL to cancel, for 10 s. A tick that was
        # written and not yet sent is sent again when its patience is over.
        signal.signal(number, lambda *_: os._exit(0))
    settings = get_settings()
    beat = Beat(settings)
    migrate.wait(settings, "beat")
    log.info("beat_started")
    while True:
        faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)
        try:
            wait = beat.round()
            alive.touch("beat")
        except (psycopg.Error, *REDIS_ERRORS) as error:
            log.warning("round_failed", error=str(error).strip())
            wait = AWAY_SECONDS
        time.sleep(wait)


if __name__ == "__main__":
    main()
