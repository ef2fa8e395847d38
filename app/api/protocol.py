"""HTTP/1.1 under uvicorn, for clients who mean no good: what they send without end is cut off, and so is waiting.

uvicorn itself has no limit for a request's head, neither in bytes nor in seconds, nor for connections that say nothing.
"""

import socket
from asyncio import TimerHandle, Transport
from typing import Any, ClassVar

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Of a request's head; also what may come in without becoming a piece of a body: endless trailers, chunk extensions.
HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 10
# A body that comes in slower than BODY_BYTES in BODY_SECONDS is one that only wants to hold a place.
BODY_SECONDS = 20
BODY_BYTES = 20_000
# Connections without a request in progress, of those that have had an answer and of the others. Beyond it the one that
# has waited longest goes: ten thousand who say nothing neither keep newcomers out nor cut off whoever keeps a
# connection for the next request, which may just be on its way.
MOST_IDLE = 1000
# So long does the kernel keep what a client does not take in: a reader who stopped looks alive for ever.
UNREAD_SECONDS = 60
PAUSED_SECONDS = 900
CONNECTION = "jobstack.connection"

_TOO_LARGE = (
    b'{"type":"urn:jobstack:problem:head-too-large","title":"The request\'s head is too large","status":431,'
    b'"detail":"The head of a request may have %d bytes at most."}' % HEAD_BYTES
)
_ANSWER = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/problem+json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_TOO_LARGE), _TOO_LARGE)
)


def allow_pauses(scope: Scope) -> None:
    """The client may stop reading this answer for `PAUSED_SECONDS`: only for one whose key is known, since an answer
    under way holds a place."""
    if connection := scope.get("extensions", {}).get(CONNECTION):  # not under another server
        connection.keep_unread(PAUSED_SECONDS)


class Protocol(HttpToolsProtocol):
    """One connection."""

    # In the order in which they began to wait; `_idle` is the one of the two that this connection waits in.
    _unanswered: ClassVar[dict["Protocol", None]] = {}
    _answered: ClassVar[dict["Protocol", None]] = {}
    _idle = _unanswered
    _timer: TimerHandle | None = None
    # Since something came of what was read.
    _unread = 0
    _kept = 0.0
    _body = 0
    _begun = _receiving = _too_large = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.keep_unread(UNREAD_SECONDS)
        self._wait()
        self._set_timer(HEAD_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > HEAD_BYTES and not self.transport.is_closing():
            self._refuse()
        elif self._timer is None:
            # Most requests come in one piece, and need no timer at all.
            if self._receiving:
                self._set_timer(BODY_SECONDS, self._look_at_body)
            elif self in self._idle:
                self._set_timer(HEAD_SECONDS, self._give_up)

    def on_message_begin(self) -> None:
        self._begun = True
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._begun = False
        # Not at the end of the answer before, of which the kernel may still have much to send.
        if self._kept != UNREAD_SECONDS:
            self.keep_unread(UNREAD_SECONDS)
        self._unread = self._body = 0
        self._idle.pop(self, None)
        self._cancel_timer()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self._too_large = True
            raise ValueError  # ends the parser, and comes back as send_400_response
        self._receiving = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._receiving = False
        self._unread = 0
        self._cancel_timer()
        super().on_message_complete()

    def keep_unread(self, seconds: float) -> None:
        self._kept = seconds
        if hasattr(socket, "TCP_USER_TIMEOUT") and not self.transport.is_closing():  # Linux
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle = self._answered
        if not self.pipeline and self.cycle.response_complete and not self.transport.is_closing():
            self._wait()

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._refuse()
        else:
            super().send_400_response(msg)

    def _wait(self) -> None:
        self._idle[self] = None
        if self._begun:  # half a head came with the request before
            self._set_timer(HEAD_SECONDS, self._give_up)
        if len(self._idle) > MOST_IDLE:
            next(iter(self._idle))._give_up()

    def _look_at_body(self) -> None:
        # Not read because we don't take it is not the client's fault.
        if self._body < BODY_BYTES and not self.flow.read_paused:
            self._give_up()
        else:
            self._body = 0
            self._set_timer(BODY_SECONDS, self._look_at_body)

    def _set_timer(self, seconds: float, call: Any) -> None:
        self._timer = self.loop.call_later(seconds, call)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self) -> None:
        self.logger.warning("A request's head is too large.")
        self.transport.write(_ANSWER)
        self.transport.close()

    def _give_up(self) -> None:
        self._idle.pop(self, None)
        self.transport.abort()
