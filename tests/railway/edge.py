"""Runs in a container: the names of a private network, and the way in from outside. Nothing but the standard library.

    python edge.py PORT=ADDRESS ...        each port of this container leads to the same port of that address

Names stand in /names/hosts ("ADDRESS NAME" a line), read anew at each question, so that one can come late. They have
IPv6 addresses only. What was asked goes to stdout: "CLIENT NAME known|unknown".
"""

import asyncio
import ipaddress
import socket
import sys
from contextlib import suppress
from pathlib import Path

HOSTS = Path("/names/hosts")
AAAA, UNKNOWN = 28, 3


def answered(query: bytes, client: str) -> bytes:
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].decode())
        at += 1 + length
    name, kind, end = ".".join(labels).lower(), int.from_bytes(query[at + 1 : at + 3]), at + 5
    known = {name: address for address, name in map(str.split, HOSTS.read_text().splitlines())}
    records = b""
    if name in known and kind == AAAA:
        # The name by a pointer to the question; class IN, no second's life, 16 bytes.
        records = b"\xc0\x0c\x00\x1c\x00\x01" + bytes(4) + b"\x00\x10" + ipaddress.IPv6Address(known[name]).packed
    print(client, name, "known" if name in known else "unknown", flush=True)
    flags = b"\x81" + bytes([0x80 | (0 if name in known else UNKNOWN)])
    counts = b"\x00\x01" + (b"\x00\x01" if records else bytes(2)) + bytes(4)
    return query[:2] + flags + counts + query[12:end] + records


class Names(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(answered(data, addr[0]), addr)


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main() -> None:
    await asyncio.get_running_loop().create_datagram_endpoint(Names, ("::", 53), family=socket.AF_INET6)
    for port, address in (argument.split("=") for argument in sys.argv[1:]):

        async def serve(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: str = port, address: str = address
        ) -> None:
            try:
                inner_reader, inner_writer = await asyncio.open_connection(address, int(port))
            except OSError:
                writer.close()
                return
            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

        await asyncio.start_server(serve, "0.0.0.0", int(port))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
