"""Files that an attempt reads: there before its engine begins, whole, and gone when it is over."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import grpc
import pytest
from fleet.v1 import node_pb2

from fleet_agent import inputs
from fleet_agent.inputs import Downloader
from tests.agent.helpers import ScriptedServer, agent_running, assign_of, settings_of
from tests.waiting import wait_until

HELLO, SEA = b"hello, parent", b"sea"


def given(reference: str, filename: str, data: bytes) -> node_pb2.AssignedInput:
    return node_pb2.AssignedInput(
        reference=reference,
        filename=filename,
        content_type="text/plain",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def work(token: str, *inputs: node_pb2.AssignedInput, prompt: str = "read") -> node_pb2.Assign:
    assign = assign_of(token, prompt)
    assign.inputs.extend(inputs)
    return assign


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    scripted = ScriptedServer()
    scripted.outputs = {"a.txt": HELLO, "b.txt": SEA}
    await scripted.start()
    try:
        yield scripted
    finally:
        await scripted.stop()


async def test_the_engine_is_given_all_files_of_each_reference(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address)
    async with agent_running(settings):
        talk = await server.conversation()
        inputs = [given("job:p", "a.txt", HELLO), given("job:p", "b.txt", SEA), given("output:a.txt", "a.txt", HELLO)]
        talk.say(assign=work("t1", *inputs))
        complete = await talk.first("complete")
        assert (
            complete.text == "job:p=text/plain:hello, parent job:p=text/plain:sea output:a.txt=text/plain:hello, parent"
        )
        # One file is brought once, whatever names it.
        assert server.downloads == ["a.txt", "b.txt"]
        assert list((tmp_path / "inputs").iterdir()) == []


async def test_what_is_away_for_a_moment_is_asked_for_again(server: ScriptedServer, tmp_path: Path) -> None:
    server.output_refusals = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL]
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=work("t1", given("job:p", "a.txt", HELLO)))
        assert (await talk.first("complete")).text == "job:p=text/plain:hello, parent"
        assert len(server.downloads) == 3
        # The engine had not begun: a loss in that time would not have counted.
        assert talk.kinds("heartbeat", "tick") == ["accepted", "started", "complete"]


async def test_a_file_that_is_no_more_ends_the_attempt_for_good(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=work("t1", given("output:gone", "gone.txt", b"x")))
        complete = await talk.first("complete")
        assert (complete.error.reason, complete.retryable) == ("INPUT_NOT_FOUND", False)
        assert complete.error.code == "NOT_FOUND" and "gone.txt" in complete.error.detail
        assert not talk.all("started")


@pytest.mark.parametrize("data", [b"hello, parenT", b"hello", b"hello, parent and more"])
async def test_spoiled_bytes_never_reach_the_engine(server: ScriptedServer, tmp_path: Path, data: bytes) -> None:
    server.outputs["a.txt"] = data
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=work("t1", given("job:p", "a.txt", HELLO)))
        complete = await talk.first("complete")
        assert (complete.error.reason, complete.retryable) == ("ENGINE_FAILED", True)
        assert not talk.all("started")


async def test_an_attempt_that_waits_for_its_files_can_be_cancelled(server: ScriptedServer, tmp_path: Path) -> None:
    server.output_refusals = [grpc.StatusCode.UNAVAILABLE] * 100
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        talk.say(assign=work("t1", given("job:p", "a.txt", HELLO)))
        await wait_until(lambda: server.downloads)
        talk.say(cancel=node_pb2.CancelAttempt(job_id="job-t1", token="t1"))
        await talk.about("stopped", "t1")
        assert agent.runner.slots_free == 1
        assert list((tmp_path / "inputs").iterdir()) == []
        talk.say(assign=assign_of("t2"))
        assert (await talk.about("complete", "t2")).outputs


async def test_a_file_that_is_being_opened_when_its_attempt_is_cancelled_is_closed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, going_on = threading.Event(), threading.Event()
    opened: list[BinaryIO] = []
    really_open = inputs._open

    def open_slowly(path: Path) -> BinaryIO:
        begun.set()
        assert going_on.wait(50)
        opened.append(really_open(path))
        return opened[0]

    monkeypatch.setattr(inputs, "_open", open_slowly)
    async with grpc.aio.insecure_channel("unix:nobody-listens") as channel:
        reading = Downloader(channel, (), 1)
        writing = asyncio.create_task(inputs._written(reading, given("input:p", "a.txt", HELLO), tmp_path / "0"))
        await wait_until(begun.is_set)
        writing.cancel()
        await asyncio.sleep(0)
        going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert [stream.closed for stream in opened] == [True]


async def test_a_file_whose_closing_waits_for_a_thread_is_closed_though_its_attempt_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = threading.Event()
    opened: list[BinaryIO] = []
    really_open = inputs._open

    def open_and_keep_the_thread(path: Path) -> BinaryIO:
        opened.append(really_open(path))
        threads.submit(going_on.wait, 50)
        return opened[0]

    monkeypatch.setattr(inputs, "_open", open_and_keep_the_thread)
    with ThreadPoolExecutor(1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        async with grpc.aio.insecure_channel("unix:nobody-listens") as channel:
            reading = Downloader(channel, (), 1)
            writing = asyncio.create_task(inputs._written(reading, given("input:p", "a.txt", HELLO), tmp_path / "0"))
            # The only thread is kept, the closing stands behind it.
            await wait_until(lambda: opened and threads._work_queue.qsize() == 1)
            writing.cancel()
            await asyncio.sleep(0)
            going_on.set()
            with pytest.raises(asyncio.CancelledError):
                await writing
            assert opened[0].closed


async def test_what_an_earlier_process_left_is_removed(server: ScriptedServer, tmp_path: Path) -> None:
    left = tmp_path / "inputs" / "old" / "0"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    async with agent_running(settings_of(tmp_path, server.address)):
        await server.conversation()
        assert not left.exists()
