"""TLS in front of a real server, with a certificate of any sort. (The embedded servers are built without it.)"""

import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import trustme

# What libpq sends before the handshake; the server's answer is one byte.
SSL_REQUEST = bytes.fromhex("0000000804d2162f")
CERTIFICATES = ("good", "expired", "of another host", "of an unknown authority")


class Authority:
    """A certificate authority whose root is in `file`, and one that nobody knows."""

    def __init__(self, folder: Path) -> None:
        self._known, self._unknown = trustme.CA(), trustme.CA()
        self.file = folder / "ca.pem"
        self._known.cert_pem.write_to_path(str(self.file))

    def context(self, sort: str) -> ssl.SSLContext:
        now = datetime.datetime.now(datetime.UTC)
        ca = self._unknown if sort == "of an unknown authority" else self._known
        begin, end = (-3, -1) if sort == "expired" else (-1, 9)
        certificate = ca.issue_cert(
            "other.test" if sort == "of another host" else "localhost",
            *(() if sort == "of another host" else ("db.example.com",)),
            not_before=now + datetime.timedelta(days=begin),
            not_after=now + datetime.timedelta(days=end),
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(context)
        return context


@contextmanager
def front(target: int, context: ssl.SSLContext, *, postgres: bool) -> Iterator[int]:
    """Forwards what comes in by TLS to a port of this machine. Yields its own port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(raw: socket.socket) -> None:
        with suppress(OSError), raw:
            if postgres:
                assert raw.recv(8) == SSL_REQUEST, "TLS is not asked for"
                raw.sendall(b"S")
            with (
                context.wrap_socket(raw, server_side=True) as near,
                socket.create_connection(("127.0.0.1", target)) as far,
            ):
                threading.Thread(target=pump, args=(far, near), daemon=True).start()
                pump(near, far)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):  # closed
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
