"""The servers of a run, and its folder: everything of a run is gone when it ends, but for its figures."""

import os
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

import psycopg

from scripts.stack import servers
from tests.processes import ROOT
from tests.servers import folder, redis_server


class Bench:
    """PostgreSQL and Redis, empty at `reset`, and in the environment of every process that is started from here."""

    def __init__(self, stack: ExitStack) -> None:
        self.folder = folder()
        self.ledger = self.folder / "ledger"
        self.redis = stack.enter_context(redis_server())
        # With fsync, as in production: a commit that does not wait for the disk is another product.
        self.database_url = stack.enter_context(servers.temporary_postgres(fsync=True))
        os.environ.update(
            DATABASE_URL=self.database_url,
            REDIS_URL=self.redis.url,
            STORAGE_URL=f"file://{self.folder}/files",
            JOBSTACK_RUN_DIR=str(self.folder),
            BENCH_LEDGER=str(self.ledger),
            LOG_FORMAT="json",
            # Celery is quiet by default. Nobody's logs are measured.
            LOG_LEVEL="WARNING",
        )
        subprocess.run([sys.executable, "-m", "app.migrate"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        self.db = stack.enter_context(psycopg.connect(self.database_url, autocommit=True))

    def reset(self) -> None:
        """No rows, no messages, and no dirty pages that the next measurement would have to write."""
        self.db.execute("TRUNCATE jobs, job_steps, job_attempts, job_files, files")
        self.db.execute("CHECKPOINT")
        self.redis.client.flushall()
        self.ledger.unlink(missing_ok=True)

    def row(self, query: Any, *values: object) -> Any:
        return self.db.execute(query, values).fetchone()
