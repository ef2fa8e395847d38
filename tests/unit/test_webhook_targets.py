"""A webhook never connects to a private network, whatever the address is called.

Only the outermost edge is replaced: the name server's answers, and the last step of a connection to foreign
addresses. Loopback connections are real and are counted by a real listening socket.
"""

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest

from app.jobs.kinds.webhook import Payload, Result
from worker import outbound
from worker.context import Context
from worker.errors import PermanentError, TransientError
from worker.handlers import webhook
from worker.outbound import is_public

LOOPBACK = [
    "127.0.0.1",
    "127.0.0.1.",
    "127.1",
    "127.0.1",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0x7F.0x0.0x0.0x1",
    "0x7f.1",
    "017700000001",
    "0177.0.0.01",
    "0177.1",
    "0",
    "0x0",
    "0.0.0.0",
    "１２７.０.０.１",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "127｡0｡0｡1",
    "%31%32%37.0.0.1",
    "127.0.0.%31",
    "localhost",
    "LocalHost",
    "localhost.",
    "%6c%6fcalhost",
    "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
    "lo\u00adcalhost",
    "evil.example",  # a public name whose owner lets it point here
    "@127.0.0.1",
    "127.0.0.1\t",
    "127.0\n.0.1",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[0000::0001]",
    "[::ffff:127.0.0.1]",
    "[::FFFF:7F00:0001]",
    "[::ffff:0.0.0.0]",
]
FOREIGN = [
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "0300.0250.1.1",
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "[::ffff:169.254.169.254]",
    "[fd00:ec2::254]",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "192.0.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "0.1.2.3",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "[::127.0.0.1]",
    "[::10.0.0.1]",
    "[::ffff:0:127.0.0.1]",
    "[fe80::1]",
    "[febf::1]",
    "[fec0::1]",
    "[fc00::1]",
    "[fdff::1]",
    "[ff02::1]",
    "[100::1]",
    "[2001:db8::1]",
    "[2001:0:7f00:1::]",
    "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
    "[2001:1::1]",
    "[2001:10::1]",
    "[2002:7f00:1::]",
    "[2002:a00:1::1]",
    "[3fff::1]",
    "[4000::1]",
    "[5f00::1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::127.0.0.1]",
]
LOCAL = ("127.", "0.0.0.0", "::1", "::ffff:127.", "::ffff:0.0.0.0")

Address = tuple[Any, ...]


class Network:
    """What the process tried to connect to, and how often the listening socket was reached."""

    def __init__(self, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self.attempts: list[str] = []
        self.questions: list[str] = []
        self.answers: dict[str, list[str]] = {}
        self._listener = listener

    def accepted(self) -> int:
        count = 0
        while True:
            try:
                self._listener.accept()[0].close()
            except BlockingIOError:
                return count
            count += 1


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    """Names resolve to 127.0.0.1 or what `answers` says; foreign addresses are recorded, not reached."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual) as listener:
        listener.setblocking(False)
        network = Network(listener)
        ask, connect = socket.getaddrinfo, socket.socket.connect

        def getaddrinfo(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
            network.questions.append(host)
            try:
                return ask(host, port, *args, **kwargs | {"flags": socket.AI_NUMERICHOST})
            except socket.gaierror:
                addresses = network.answers.get(host, ["127.0.0.1"])
                return [entry for address in addresses for entry in ask(address, port, *args, **kwargs)]

        def record(self: socket.socket, address: Address) -> None:
            network.attempts.append(address[0])
            if address[0] != "::" and not address[0].startswith(LOCAL):
                raise ConnectionRefusedError
            connect(self, address)
            self.shutdown(socket.SHUT_RD)  # nobody will answer; don't wait for it

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(socket.socket, "connect", record)
        yield network


def call(url: str, *, allow_private: bool = False) -> Result:
    def once(name: str, step: Callable[[], Any]) -> Any:
        return step()

    settings = SimpleNamespace(webhook_allow_private=allow_private)
    context = SimpleNamespace(job_id=uuid4(), attempt=1, settings=settings, once=once)
    return webhook.run(Payload.model_validate({"url": url, "body": {}}), cast(Context, context))


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", [*LOOPBACK, *FOREIGN])
def test_no_connection_is_made(network: Network, scheme: str, host: str) -> None:
    with pytest.raises(PermanentError, match="is not on the public internet"):
        call(f"{scheme}://{host}:{network.port}/path?query#fragment")
    assert network.attempts == []
    assert network.accepted() == 0


@pytest.mark.parametrize("tail", ["#@example.com/", "?@example.com/", "\\@example.com/", "/@example.com:80"])
def test_what_follows_the_host_does_not_hide_it(network: Network, tail: str) -> None:
    network.answers["example.com"] = ["8.8.8.8"]
    with pytest.raises(PermanentError, match="is not on the public internet"):
        call(f"http://127.0.0.1:{network.port}{tail}")
    assert network.attempts == []


@pytest.mark.parametrize("host", LOOPBACK)
def test_every_loopback_spelling_would_have_arrived(network: Network, host: str) -> None:
    """Shows that the table above is worth something: each of its spellings does reach the listener."""
    if host.startswith("[") and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with pytest.raises(TransientError):  # the listener never answers
        call(f"http://{host}:{network.port}/", allow_private=True)
    assert network.accepted() == 1


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["10.1.2.3"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["64:ff9b::a00:1"],
        ["fd00:ec2::254"],
        ["fe80::1"],
        ["8.8.8.8", "127.0.0.1"],
        ["127.0.0.1", "8.8.8.8"],
        ["2606:4700::1111", "::1"],
    ],
)
def test_no_dns_answer_leads_inside(network: Network, answer: list[str]) -> None:
    network.answers["hook.example"] = answer
    with pytest.raises(PermanentError) as failure:
        call(f"http://hook.example:{network.port}/")
    assert network.attempts == []
    assert "hook.example" in str(failure.value)
    assert answer[0] not in str(failure.value), "the message must not tell what internal names resolve to"


def test_a_name_is_resolved_once(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the first answer is public, every later one is not. Asking twice leads inside."""
    answers = iter(["8.8.8.8"])
    questions = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        questions.append(host)
        address = (next(answers, "127.0.0.1"), port)
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(TransientError, match=r"the connection to rebind\.example failed"):
        call(f"http://rebind.example:{network.port}/")
    assert network.attempts == ["8.8.8.8"]
    assert questions == ["rebind.example"]
    assert network.accepted() == 0


@pytest.mark.parametrize(
    "host", ["8.8.8.8", "134744072", "[2606:4700::1111]", "[::ffff:8.8.8.8]", "[64:ff9b::808:808]"]
)
def test_public_addresses_are_called(network: Network, host: str) -> None:
    with pytest.raises(TransientError):
        call(f"http://{host}/")
    assert len(network.attempts) == 1


def test_the_next_address_is_tried_when_one_is_dead(network: Network) -> None:
    network.answers["hook.example"] = ["8.8.8.8", "8.8.4.4"]
    with pytest.raises(TransientError):
        call("http://hook.example/")
    assert network.attempts == ["8.8.8.8", "8.8.4.4"]


def test_proxies_of_the_environment_are_not_used(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would resolve the name itself, inside."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{network.port}")
    network.answers["hook.example"] = ["8.8.8.8"]
    with pytest.raises(TransientError):
        call("http://hook.example/")
    assert network.attempts == ["8.8.8.8"]


def test_a_name_that_does_not_resolve_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(TransientError, match=r"the name hook\.example could not be resolved"):
        call("http://hook.example/")


def test_a_name_that_can_not_exist_is_permanent() -> None:
    with pytest.raises(PermanentError, match="not a valid host name"):
        call(f"http://{'a' * 70}.example/")


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "192.0.1.1", "2a00:1450::1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", ["fe80::1%2", "fe80::1%eth0", "::1%lo"])
def test_a_scope_does_not_hide_an_address(address: str) -> None:
    assert not is_public(address)


def test_the_time_limit_spans_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten dead addresses must not take ten times as long."""
    monkeypatch.setattr(outbound, "CONNECT_SECONDS", 0.1)
    limits = []

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("8.8.8.8", port))] * 10

    def connect(self: socket.socket, address: Address) -> None:
        limits.append(self.gettimeout())
        raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(webhook, "CALL_SECONDS", 0.05)
    with pytest.raises(TransientError, match="did not answer in time"):
        call("http://hook.example/")
    assert all(limit is not None and limit <= 0.05 for limit in limits)
