"""Connections to addresses that callers choose, to the public internet only.

Looking at the URL's text is hopeless: `127.0.0.1` has a dozen spellings, and any name may resolve to it, even
to something harmless for the check and to it for the call (DNS rebinding). So the check stands where the
connection is made: the name is resolved once, every address of the answer is checked, and the socket goes to
a checked address. TLS and the Host header still see the name.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import httpcore

CONNECT_SECONDS = 5.0  # for each address: the first of several may be a dead one

# Public by `is_global` in some Python from 3.11 to 3.14, and not on the public internet.
_EXCEPTIONS = (
    IPv4Network("168.63.129.16/32"),  # Azure's metadata service
    IPv4Network("192.0.0.0/24"),  # protocol assignments; Oracle's metadata service
    IPv4Network("192.88.99.0/24"),  # 6to4 relays
    IPv6Network("2001::/23"),  # protocol assignments; Teredo, which embeds an IPv4 address
    IPv6Network("2002::/16"),  # 6to4, likewise
    IPv6Network("3fff::/20"),  # documentation
)
_UNICAST = IPv6Network("2000::/3")  # the only part of IPv6 that is given out for the public internet
_NAT64 = IPv6Network("64:ff9b::/96")  # IPv4 as an IPv6-only network sees it; the last 32 bits decide


class ForbiddenTarget(Exception):
    """The host is, or resolves to, an address that is not on the public internet. Nothing was connected."""


def is_public(address: str) -> bool:
    """Whether an IP address, as `getaddrinfo` writes it, is on the public internet."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, IPv6Address):
        if ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = IPv4Address(ip.packed[-4:])
        elif ip not in _UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _EXCEPTIONS)


class Outbound(httpcore.NetworkBackend):
    """Makes httpcore's connections; all of them end `seconds` after this object was made.

    httpcore's time limits are per read: a server that sends a byte now and then would hold us for ever. This
    one covers connecting, TLS, sending and receiving together. Only the name server is outside: `getaddrinfo`
    can't be interrupted, so a kind that uses this needs a short hard limit of its own.

    Raises:
        ForbiddenTarget: at connecting.
        OSError: of the network, as it is; TimeoutError when the time is up.
    """

    def __init__(self, seconds: float, *, allow_private: bool) -> None:
        self._end = time.monotonic() + seconds
        self._allow_private = allow_private

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # All of them must be public: an answer that mixes both is how rebinding begins.
        if not self._allow_private and not all(is_public(str(address[0])) for *_, address in found):
            raise ForbiddenTarget(host)
        problem = OSError("no address")
        for family, kind, protocol, _, address in found:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(min(CONNECT_SECONDS, _left(self._end)))
                connection.connect(address)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return _Stream(connection, self._end)
            except OSError as error:
                connection.close()
                problem = error
        raise problem


class _Stream(httpcore.NetworkStream):
    def __init__(self, connection: socket.socket, end: float) -> None:
        self._socket = connection
        self._end = end

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._socket.settimeout(_left(self._end))
        return self._socket.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        rest = memoryview(buffer)
        try:
            while rest:
                self._socket.settimeout(_left(self._end))
                rest = rest[self._socket.send(rest) :]
        except TimeoutError:
            raise
        except OSError as error:
            # A server may refuse early and hang up; httpcore reads that answer if it gets its own error.
            raise httpcore.WriteError from error

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        self._socket.settimeout(_left(self._end))
        return _Stream(ssl_context.wrap_socket(self._socket, server_hostname=server_hostname), self._end)

    def close(self) -> None:
        self._socket.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
