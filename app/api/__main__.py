"""`python -m app.api`: the API under uvicorn."""

import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from fastapi import FastAPI

from app import logs
from app.api.app import create_app
from app.api.protocol import Protocol
from app.settings import get_settings

# For requests in progress, after SIGTERM.
GRACE_SECONDS = 10
# nginx and load balancers keep idle connections for 60 s. Who is first to close one may do so just when a request is on
# its way: that must be them.
KEEP_ALIVE_SECONDS = 75


class Server(uvicorn.Server):
    """uvicorn, for an application with streams that last for hours."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Before it waits for answers that are under way.
        application: Any = self.config.app
        application.state.streams.close()
        await super().shutdown(sockets=sockets)


def serve(create: Callable[[], FastAPI]) -> None:
    """Runs the application that `create` makes as this process's only work."""
    settings = get_settings()
    logs.configure()
    config = uvicorn.Config(
        create(),
        # "" binds IPv4 and IPv6, which `::` with one process does not.
        host="" if settings.host in ("::", "") else settings.host,
        port=settings.port,
        http=Protocol,
        log_config=None,
        access_log=False,  # the middleware's line has the request id
        # For the client's address in the log, and for https, without which the login's cookie would not be Secure.
        proxy_headers=True,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    # When all is answered uvicorn sends itself the signal that it got, and would end by it: as if it had been killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):  # as uvicorn's own `run`
        Server(config).run()


if __name__ == "__main__":
    serve(create_app)
