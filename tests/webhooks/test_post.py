"""One request to a receiver: where it goes, and what the worst of receivers can do to it."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from collections.abc import Sequence

import httpcore
import pytest
import trustme

from fleet_server.domain.webhook import Answer
from fleet_server.services.callbacks import Address, CallbackRules
from fleet_server.services.webhook_names import NoSuchNameError
from fleet_server.services.webhook_post import Poster, PostSettings
from tests.ports import free_port
from tests.webhooks.patience import Patience
from tests.webhooks.receiver import OK, How, Receiver, die, endless, hang, receiving, reply, says

BODY = b'{"type":"job.complete"}'
# The forbidden listener of these tests is 127.0.0.1, the allowed one 127.0.0.2: both are real, and on one port.
ONE_ALLOWED = CallbackRules(allowed=(ipaddress.ip_network("127.0.0.2/32"),), public=False)
LOOPBACK = CallbackRules(loopback=True)
SHORT = PostSettings(seconds=0.3, connect_seconds=60.0)


class Fixed:
    """Answers look-ups from a list, the last of it for ever; counts them."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def addresses(self, host: str) -> Sequence[Address]:
        self.asked.append(host)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not found:
            raise NoSuchNameError(host)
        return [ipaddress.ip_address(text) for text in found]


def poster(
    names: Fixed | None = None,
    rules: CallbackRules = LOOPBACK,
    settings: PostSettings | None = None,
    tls: ssl.SSLContext | None = None,
) -> Poster:
    return Poster(
        rules,
        names or Fixed([]),
        clock=lambda: time.time_ns() // 1_000_000,
        settings=settings or PostSettings(seconds=50.0, connect_seconds=50.0),
        tls=tls or ssl.create_default_context(),
    )


async def post(to: Poster, url: str) -> Answer:
    return await to.post(url, [("webhook-id", "j.1")], BODY)


async def test_a_request_is_a_plain_post() -> None:
    async with receiving() as receiver:
        answer = await post(poster(), f"{receiver.url}/a%20b;c?d=e&f#g")
    (request,) = receiver.received
    assert answer == Answer(200, "200 OK")
    assert request.line == "POST /hook/a%20b;c?d=e&f HTTP/1.1"
    assert request.body == BODY
    assert request.headers == {
        "host": f"127.0.0.1:{receiver.port}",
        "content-length": str(len(BODY)),
        "connection": "close",
        "webhook-id": "j.1",
    }


async def test_every_spelling_of_an_address_reaches_it() -> None:
    async with receiving() as receiver:
        for host in ("127.1", "2130706433", "0x7f.0.0.1", "127.0.0.1."):
            assert (await post(poster(), f"http://{host}:{receiver.port}/")).status == 200
    assert {request.headers["host"] for request in receiver.received} == {f"127.0.0.1:{receiver.port}"}


async def test_a_name_is_looked_up_once_and_named_to_the_receiver() -> None:
    names = Fixed(["127.0.0.2"])
    async with receiving("127.0.0.2") as receiver:
        answer = await post(poster(names, ONE_ALLOWED), f"http://Hooks.Example:{receiver.port}/x")
    assert answer.status == 200
    assert names.asked == ["hooks.example"]
    assert receiver.received[0].headers["host"] == f"hooks.example:{receiver.port}"


async def test_a_name_that_changes_its_mind_is_judged_each_time() -> None:
    """Rebinding: at the first look the address is fine, at the next it is the forbidden one."""
    names = Fixed(["127.0.0.2"], ["127.0.0.1"])
    port = free_port()
    async with receiving("127.0.0.2", port) as good, receiving("127.0.0.1", port) as forbidden:
        to = poster(names, ONE_ALLOWED)
        # "localhost" leads anyone who looks it up again, with the system's resolver, to the forbidden listener.
        url = f"http://localhost:{good.port}/hook"
        assert (await post(to, url)).status == 200
        assert len(names.asked) == 1
        second = await post(to, url)
        assert second.status is None and second.detail.startswith("not called:")
        assert "127.0.0" not in second.detail
    assert (good.connections, forbidden.connections) == (1, 0)


async def test_one_forbidden_address_among_many_is_enough() -> None:
    names = Fixed(["127.0.0.2", "127.0.0.1"])
    port = free_port()
    async with receiving("127.0.0.2", port) as good, receiving("127.0.0.1", port) as forbidden:
        answer = await post(poster(names, ONE_ALLOWED), f"http://hooks.example:{good.port}/")
    assert answer.status is None
    assert (good.connections, forbidden.connections) == (0, 0)


ALWAYS = ["169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254", "0.0.0.0", "fe80::1"]


@pytest.mark.parametrize("address", ALWAYS)
async def test_metadata_behind_a_name_is_never_called(address: str) -> None:
    every = CallbackRules(True, frozenset(), (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")))
    answer = await post(poster(Fixed([address]), every), "http://metadata.example/latest")
    assert answer.status is None
    assert "metadata, multicast and reserved addresses may never be called" in answer.detail


async def test_our_own_ports_are_no_receivers() -> None:
    async with receiving() as ours:
        own = CallbackRules(True, {ours.port}, (ipaddress.ip_network("127.0.0.0/8"),))
        for url in (f"http://127.0.0.1:{ours.port}/", f"http://hooks.example:{ours.port}/"):
            assert (await post(poster(Fixed(["127.0.0.1"]), own), url)).detail.startswith("not called:")
        elsewhere = CallbackRules(
            own_ports={ours.port}, allowed=own.allowed, own_addresses={ipaddress.ip_address("192.168.7.7")}
        )
        assert "own ports" in (await post(poster(rules=elsewhere), f"http://192.168.7.7:{ours.port}/")).detail
    assert ours.connections == 0


async def test_a_redirect_is_an_answer_and_goes_nowhere() -> None:
    async with receiving() as target, receiving() as receiver:
        receiver.otherwise = reply(307, Location=target.url)
        assert (await post(poster(), receiver.url)).status == 307
    assert target.connections == 0


async def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as proxy, receiving() as receiver:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert (await post(poster(), receiver.url)).status == 200
    assert proxy.connections == 0


async def test_silence_ends_in_time() -> None:
    async with receiving() as receiver:
        receiver.otherwise = hang
        answer = await post(poster(settings=SHORT), receiver.url)
    assert answer == Answer(None, "no answer within 0.3 s")


async def test_a_name_server_that_never_answers_ends_in_time() -> None:
    class Never(Fixed):
        async def addresses(self, host: str) -> Sequence[Address]:
            await asyncio.Event().wait()
            return []

    assert (await post(poster(Never([]), settings=SHORT), "http://hooks.example/")).detail == "no answer within 0.3 s"


async def test_a_broken_connection_and_a_closed_door_are_told() -> None:
    # A port that nobody else is given once it is closed.
    async with receiving(port=free_port()) as receiver:
        receiver.otherwise = die
        assert "ended without an answer" in (await post(poster(), receiver.url)).detail
    assert (await post(poster(), receiver.url)).detail == "no connection could be made"
    assert "no address" in (await post(poster(Fixed([])), "http://nowhere.example/")).detail


@pytest.mark.parametrize(
    "answer",
    [
        endless(b"HTTP/1.1 100 Continue\r\n\r\n" * 40),
        endless(b"x: y\r\n" * 40, b"HTTP/1.1 200 OK\r\n"),
        endless(b"x" * 4_000, b"HTTP/1.1 200 OK\r\nx: "),
    ],
    ids=["informational", "headers", "one header"],
)
async def test_an_answer_without_end_is_cut_off(answer: How) -> None:
    async with receiving() as receiver:
        receiver.otherwise = answer
        answered = await post(poster(), receiver.url)
    # By its length, long before its time is over.
    assert answered.status is None
    assert "within" not in answered.detail


async def test_a_body_without_end_is_cut_off_and_the_status_counts() -> None:
    sent = 0

    async with receiving() as receiver:

        async def answer(_: object, writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while not writer.transport.is_closing():
                writer.write(b"x" * 65_536)
                sent += 65_536
                await writer.drain()
                await asyncio.sleep(0)

        receiver.otherwise = answer
        assert (await post(poster(), receiver.url)).status == 200
    # What the kernels of both sides hold comes on top of the 64 KiB that are read.
    assert sent < 40_000_000


async def test_a_status_is_enough_even_if_the_body_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    patience, to = Patience(monkeypatch), poster()
    status = to._answer

    def read(response: httpcore.Response) -> Answer:
        # The time is over while the body is waited for.
        asyncio.get_running_loop().call_soon(patience.over)
        return status(response)

    monkeypatch.setattr(to, "_answer", read)
    async with receiving() as receiver:

        async def answer(request: object, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n")
            await writer.drain()
            await hang(request, writer)  # type: ignore[arg-type]

        receiver.otherwise = answer
        assert (await post(to, receiver.url)).status == 204


@pytest.mark.parametrize("text", [b"\x16\x03\x01 no http", b"HTTP/1.1 999999 X\r\n\r\n", b""])
async def test_what_is_no_http_is_a_failure(text: bytes) -> None:
    async with receiving() as receiver:
        receiver.otherwise = says(text)
        assert (await post(poster(), receiver.url)).status is None


async def test_the_receivers_own_words_are_not_repeated() -> None:
    async with receiving() as receiver:
        receiver.otherwise = says(b"HTTP/1.1 404 <script>\r\nContent-Length: 0\r\n\r\n")
        assert (await post(poster(), receiver.url)).detail == "404 Not Found"


async def test_retry_after_is_read() -> None:
    async with receiving() as receiver:
        receiver.otherwise = reply(503, Retry_After="120")
        assert (await post(poster(), receiver.url)).retry_after_ms == 120_000


async def test_the_next_address_is_tried_where_one_does_not_answer() -> None:
    names = Fixed(["127.0.0.3", "127.0.0.2"])
    async with receiving("127.0.0.2") as receiver:
        assert (await post(poster(names), f"http://hooks.example:{receiver.port}/")).status == 200


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


async def secured(authority: trustme.CA, issued_to: str, trusted: bool = True) -> tuple[Answer, Receiver]:
    """A request to https://hooks.example of whom the certificate says that it is somebody."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(issued_to).configure_cert(server)
    if trusted:
        authority.configure_trust(client)
    async with receiving(tls=server) as receiver:
        receiver.otherwise = OK
        answer = await post(poster(Fixed(["127.0.0.1"]), tls=client), f"https://hooks.example:{receiver.port}/")
    return answer, receiver


async def test_tls_is_checked_against_the_name_not_the_address(authority: trustme.CA) -> None:
    answer, receiver = await secured(authority, "hooks.example")
    assert answer.status == 200
    assert receiver.received[0].headers["host"] == f"hooks.example:{receiver.port}"


@pytest.mark.parametrize(("issued_to", "trusted"), [("127.0.0.1", True), ("hooks.example", False)])
async def test_a_certificate_of_another_or_of_nobody_is_refused(
    authority: trustme.CA, issued_to: str, trusted: bool
) -> None:
    answer, receiver = await secured(authority, issued_to, trusted)
    assert answer.status is None and "certificate" in answer.detail
    assert receiver.received == []
