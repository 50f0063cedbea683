"""Requests to programs of the node: heard in pieces, cut at any point, their refusals and silences told."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from fleet_agent.engines.base import Cancelled, EngineError
from fleet_agent.engines.exchange import Ask, Exchange
from fleet_agent.engines.openai.sse import events
from tests.agent.engines.helpers import Recorder

_OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"


class Program:
    """A server that says what it is told to, and notes when its caller hangs up."""

    def __init__(self, *said: bytes, then_close: bool = True) -> None:
        self._said = said
        self._then_close = then_close
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/path?x=1"
        self.request = b""
        self.hung_up = threading.Event()
        self.heard = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            while not self.request.endswith(b"body"):
                self.request += connection.recv(65536)
            self.heard.set()
            for part in self._said:
                connection.sendall(part)
            if not self._then_close:
                connection.recv(1)
                self.hung_up.set()

    def close(self) -> None:
        self._listener.close()
        self._thread.join(50)


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def make(*said: bytes, then_close: bool = True) -> Program:
        made.append(Program(*said, then_close=then_close))
        return made[-1]

    yield make
    for one in made:
        one.close()


def _ask(url: str, silence_seconds: float = 10) -> Ask:
    return Ask("the program", "POST", url, {"content-type": "text/plain"}, b"body", silence_seconds)


def test_a_body_comes_in_pieces(program: Callable[..., Program]) -> None:
    server = program(_OK + b"Content-Length: 6\r\n\r\nabc", b"def")
    exchange = Exchange(_ask(server.url), Recorder())
    with exchange as head:
        assert (head.status, head.headers["content-type"]) == (200, "text/plain")
        assert exchange.body(10) == b"abcdef"
    assert server.request.startswith(b"POST /path?x=1 HTTP/1.1\r\n")


def test_a_body_that_is_cut_short_or_too_long(program: Callable[..., Program]) -> None:
    exchange = Exchange(_ask(program(_OK + b"Content-Length: 9\r\n\r\nabc").url), Recorder())
    with exchange, pytest.raises(EngineError, match="cut short") as raised:
        exchange.body(100)
    assert raised.value.retryable
    exchange = Exchange(_ask(program(_OK + b"Content-Length: 9\r\n\r\nabcabcabc").url), Recorder())
    with exchange, pytest.raises(EngineError, match="more than 4 bytes"):
        exchange.body(4)


def test_it_is_cut_while_it_waits_for_a_head(program: Callable[..., Program]) -> None:
    server = program(then_close=False)
    exchange = Exchange(_ask(server.url), recorder := Recorder())
    recorder.cancel_when = lambda done: server.heard.is_set()
    with pytest.raises(Cancelled), exchange:
        pass
    assert server.hung_up.wait(50)


def test_it_is_cut_in_the_middle_of_a_body(program: Callable[..., Program]) -> None:
    server = program(_OK + b"Content-Length: 9\r\n\r\nabc", then_close=False)
    exchange = Exchange(_ask(server.url), recorder := Recorder())
    with pytest.raises(Cancelled), exchange:
        chunks = exchange.chunks()
        assert next(chunks) == b"abc"
        recorder.cancel_when = lambda done: True
        next(chunks)
    assert server.hung_up.wait(50)


def test_a_program_that_says_nothing(program: Callable[..., Program]) -> None:
    server = program(then_close=False)
    with (
        pytest.raises(EngineError, match=r"said nothing for 0.2 s") as raised,
        Exchange(_ask(server.url, 0.2), Recorder()),
    ):
        pass
    assert raised.value.retryable
    assert server.hung_up.wait(50)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(EngineError, match=r"does not answer") as raised:
        Exchange(_ask("http://127.0.0.1:9/"), Recorder()).__enter__()
    assert raised.value.retryable


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_events_whatever_their_line_ends_and_wherever_they_are_cut(end: bytes, size: int) -> None:
    lines = [b": a comment", b'data: {"a": "1"}', b"", b"event: x", b"data:{", b'data: "b": 2}', b"", b"data: no", b""]
    whole = end.join([*lines, b"data: [DONE]", b"", b'data: {"late": 1}', b"", b""])
    chunks = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert list(events(chunks)) == [{"a": "1"}, {"b": 2}]
    assert list(events([b'data: {"cut": 1}'])) == [{"cut": 1}]
