"""`python -m app.api`: the API under uvicorn."""

import uvicorn

from app import logs
from app.settings import get_settings

# For requests in progress, after SIGTERM.
GRACE_SECONDS = 10


def serve(application: str) -> None:
    """Runs an ASGI application as this process's only work."""
    settings = get_settings()
    logs.configure()
    uvicorn.run(
        application,
        # "" binds IPv4 and IPv6, which `::` with one process does not.
        host="" if settings.host in ("::", "") else settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # the middleware's line has the request id
        # Whoever stands in front (a platform's router, a proxy) is the only one who can reach the port.
        proxy_headers=True,
        forwarded_allow_ips="*",
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
    )


if __name__ == "__main__":
    serve("app.api.app:app")
