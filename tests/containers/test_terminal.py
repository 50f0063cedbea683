"""Programs that callers stay connected to: over gRPC, over WebSocket, and from a real terminal."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from fleet.v1 import fleet_pb2, fleet_pb2_grpc
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.containers.conftest import NODE
from tests.containers.exec_stream import SECONDS, Frame, Typist, ended
from tests.docker_daemon import IMAGE
from tests.e2e.fleet_process import FleetProcess, clean_environment
from tests.parts import need
from tests.waiting import wait_until, wait_until_now

pytestmark = pytest.mark.usefixtures("clean")
FLOOD = 8 << 20
"""Bytes of the streams in the ordinary suite; TEST_FLOOD_BYTES asks for more."""
NAPS = str(20_000_000 + os.getpid())
"""Seconds that no other run of these tests sleeps."""
AT = {"PS1": "$ ", "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
"""A person's environment; the size of the terminal itself is another."""
SIZED = 'until [ "$(stty size)" = "{}" ]; do sleep 0.1; done'
"""Waits for a size of the terminal."""


@pytest.fixture
async def stub(fleet: FleetProcess) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{fleet.grpc_port}") as channel:
        yield fleet_pb2_grpc.FleetStub(channel)


@pytest.fixture
def box(door: httpx.Client) -> str:
    body = {"node_id": NODE, "image": IMAGE, "name": "box", "command": "sleep 10000"}
    assert door.post("/api/fleet/deploy", json=body).status_code == 200
    return "box"


def start(command: str, **fields: Any) -> fleet_pb2.ExecStreamRequest:
    return Frame(node_id=NODE, start=fleet_pb2.ExecStart(command=command, **fields))


@pytest.mark.parametrize("where", [None, "box"])
async def test_input_output_and_exit_over_grpc(stub: Any, box: str, where: str | None) -> None:
    call = stub.ExecStream()
    await call.write(start("sh -c 'cat; echo err >&2; exit 9'", container_name=where))
    for word in (b"one\n", b"two\n"):
        await call.write(Frame(stdin=word))
        assert (await call.read()).stdout == word
    await call.write(Frame(close_stdin=fleet_pb2.CloseStdin()))
    assert await ended(call) == (b"", b"err\n", 9)


@pytest.mark.parametrize("where", [None, "box"])
async def test_a_terminal_is_resized_and_takes_ctrl_c(stub: Any, box: str, where: str | None) -> None:
    typist = Typist(stub, NODE, "sh", container_name=where, tty=True, rows=40, columns=111)
    await typist.types("stty size; test -t 0 && echo termi-'nal'")
    await typist.sees("40 111")
    await typist.sees("termi-nal")
    await typist.resize(50, 120)
    await typist.types(f"{SIZED.format('50 120')}; stty size")
    await typist.sees("50 120")
    # Said by the program itself: only now it has the terminal.
    await typist.types(f"sh -c 'echo so-\"far\"; exec sleep {NAPS}'")
    await typist.sees("so-far")
    await typist.types("echo code $?; exit 7", before="\x03")
    await typist.sees("code 130")
    assert await typist.exit_code() == 7


@pytest.mark.parametrize("where", [None, "box"])
async def test_who_leaves_takes_the_program_along(stub: Any, box: str, where: str | None) -> None:
    call = stub.ExecStream()
    await call.write(start(f"sh -c 'echo here; sleep {NAPS}'", container_name=where))
    assert (await call.read()).stdout == b"here\n"
    await wait_until(lambda: _running(NAPS))
    call.cancel()
    await wait_until(lambda: not _running(NAPS))


def _running(word: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if word in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


async def test_what_cannot_be_started(stub: Any, box: str) -> None:
    for place in (None, "box"):
        call = stub.ExecStream()
        await call.write(start("nosuch-program", container_name=place))
        out, err, code = await ended(call)
        assert code == 127
        assert b"nosuch-program" in out + err
    for request, status in (
        (start("true", container_name="nosuch"), grpc.StatusCode.NOT_FOUND),
        (start("'"), grpc.StatusCode.INVALID_ARGUMENT),
        (Frame(node_id="nowhere", start=fleet_pb2.ExecStart(command="true")), grpc.StatusCode.NOT_FOUND),
        (Frame(node_id=NODE, stdin=b"x"), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        call = stub.ExecStream()
        await call.write(request)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ended(call)
        assert caught.value.code() is status, caught.value.details()


async def test_input_output_and_exit_over_a_websocket(fleet: FleetProcess, box: str) -> None:
    address = f"ws://localhost:{fleet.port}/api/fleet/exec/{NODE}/stream"
    async with connect(address, proxy=None, open_timeout=60) as socket:
        await socket.send(json.dumps({"start": {"command": "cat", "container_name": box}}))
        await socket.send(json.dumps({"stdin": base64.b64encode(b"hello").decode()}))
        assert json.loads(await socket.recv()) == {"stdout": base64.b64encode(b"hello").decode()}
        await socket.send(json.dumps({"close_stdin": {}}))
        last = json.loads(await socket.recv())
        assert last == {"exit": {"exit_code": 0, "signal": None, "oom_killed": False}}
        with pytest.raises(ConnectionClosed):
            await socket.recv()
    async with connect(
        f"ws://localhost:{fleet.port}/api/fleet/exec/nowhere/stream", proxy=None, open_timeout=60
    ) as socket:
        await socket.send(json.dumps({"start": {"command": "true"}}))
        assert json.loads(await socket.recv())["reason"] == "NODE_NOT_FOUND"
    with pytest.raises(InvalidStatus):
        await connect(address, proxy=None, open_timeout=60, origin="http://evil.example")  # type: ignore[arg-type]


@pytest.mark.parametrize("road", ["grpc", "websocket"])
async def test_a_flood_arrives_whole_in_little_memory(fleet: FleetProcess, stub: Any, road: str) -> None:
    """A reader that pauses holds the program back; what comes is what was sent."""
    size = int(os.environ.get("TEST_FLOOD_BYTES", FLOOD))
    # It ends when the sum is said, however late that is on a busy machine.
    summed = "exec 3> >(sha256sum >&2); sum=$!"
    words = f"bash -c '{summed}; head -c {size} /dev/urandom | tee /dev/fd/3; exec 3>&-; wait $sum'"
    pids = [fleet.pid, *fleet.pids("fleet_agent")]
    before = _memory(pids)
    frames = _over_grpc(stub, words) if road == "grpc" else _over_websocket(fleet, words)
    digest, total, told, most = hashlib.sha256(), 0, b"", 0
    async for name, data in frames:
        if name == "stdout":
            digest.update(data)
            total += len(data)
            if total % (1 << 20) < len(data):
                most = max(most, _memory(pids))
        else:
            told += data
    assert total == size
    assert told.decode().split()[0] == digest.hexdigest()
    assert most - before < 48 << 20


async def _over_grpc(stub: Any, words: str) -> AsyncIterator[tuple[str, bytes]]:
    call = stub.ExecStream()
    await call.write(start(words))
    while (frame := await call.read()) is not grpc.aio.EOF:
        for name in ("stdout", "stderr"):
            if getattr(frame, name):
                yield name, getattr(frame, name)


async def _over_websocket(fleet: FleetProcess, words: str) -> AsyncIterator[tuple[str, bytes]]:
    address = f"ws://localhost:{fleet.port}/api/fleet/exec/{NODE}/stream"
    async with connect(address, proxy=None, open_timeout=60, max_size=None) as socket:
        await socket.send(json.dumps({"start": {"command": words}}))
        async for text in socket:
            frame = json.loads(text)
            for name in ("stdout", "stderr"):
                if name in frame:
                    yield name, base64.b64decode(frame[name])


def _memory(pids: list[int]) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


class Tmux:
    """A terminal that a person would sit at."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._socket = folder / "tmux"
        self._environment = environment
        self("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "30", "sh")

    def __call__(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self._socket), *words], capture_output=True, text=True, env=self._environment, check=True
        )
        return done.stdout

    def type(self, line: str) -> None:
        self("send-keys", "-l", line)
        self("send-keys", "Enter")

    def shows(self, words: str) -> None:
        """Waits for them. What is typed is shown too: they must not stand in the line that asks for them."""
        try:
            wait_until_now(lambda: words in self.screen(), seconds=SECONDS)
        except AssertionError:
            raise AssertionError(f"{words!r} is not in:\n{self.screen()}") from None

    def screen(self) -> str:
        return self("capture-pane", "-p", "-S", "-100")


@pytest.fixture
def tmux(fleet: FleetProcess, short_path: Path) -> Iterator[Tmux]:
    need("tmux")
    terminal = Tmux(short_path, clean_environment({"FLEET_URL": fleet.url, **AT}))
    yield terminal
    terminal("kill-server")


def test_fleet_exec_at_a_terminal(tmux: Tmux) -> None:
    cli = f"{sys.executable} -m fleet_client"
    tmux.type(f"{cli} exec -it {NODE} -- sh -c 'echo be-\"gun\"; exec sh'; echo ended=$?")
    tmux.shows("be-gun")
    tmux.type("echo at $(stty size)")
    tmux.shows("at 30 100")
    tmux("resize-window", "-x", "120", "-y", "33")
    tmux.type(f"{SIZED.format('33 120')}; echo at $(stty size)")
    tmux.shows("at 33 120")
    tmux.type(f"trap 'echo caught-\"it\"' INT; sh -c 'echo na-\"ps\"; exec sleep {NAPS}'")
    tmux.shows("na-ps")
    tmux("send-keys", "C-c")
    tmux.shows("caught-it")
    tmux.type("exit 37")
    tmux.shows("ended=37")
    # The terminal is as it was: what is typed is shown, and lines end.
    tmux.type("echo back-'again'; stty -a | grep -o ' echo '")
    tmux.shows("back-again")
