"""`python -m app.api.health`: exit code 0 while the API in this container answers.

By hand and not with an HTTP client, whose import would take most of the time that the check takes.
"""

import os
import socket
import sys

if __name__ == "__main__":
    address = ("127.0.0.1", int(os.environ.get("PORT") or 8000))
    try:
        with socket.create_connection(address, timeout=5) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status = connection.recv(1024).partition(b"\r\n")[0].decode("latin-1")
    except OSError as error:
        sys.exit(f"the API does not answer: {error}")
    sys.exit(0 if status.startswith("HTTP/1.1 200") else f"the API answers {status!r}")
