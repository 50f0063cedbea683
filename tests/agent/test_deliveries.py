"""Ends and uploads that the server refuses, delays or never takes, over real gRPC."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fleet_agent.journal import Journal
from fleet_agent.settings import AgentSettings
from fleet_agent.spool import Spool, SpoolEntry
from fleet_agent.upload import Uploader
from tests.agent.helpers import (
    ScriptedServer,
    agent_running,
    assign_of,
    settings_of,
)
from tests.agent.test_session import ack, spool_folders
from tests.waiting import wait_until


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND], ids=lambda code: code.name
)
async def test_an_upload_that_is_not_wanted_ends_the_spool_entry(
    server: ScriptedServer, tmp_path: Path, code: grpc.StatusCode
) -> None:
    server.upload_ban = code
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "paint 3000000"))
        await wait_until(lambda: server.upload_metadata)
        await talk.first("heartbeat", lambda beat: beat.slots_free == 1 and not beat.held and beat.sequence > 1)
        await wait_until(lambda: not spool_folders(tmp_path))
        assert not talk.all("complete")


@pytest.mark.parametrize(
    "code",
    [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED],
    ids=lambda code: code.name,
)
async def test_an_upload_that_fails_for_now_is_tried_again(
    server: ScriptedServer, tmp_path: Path, code: grpc.StatusCode
) -> None:
    server.upload_refusals = [code, code]
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "paint 3000000"))
        complete = await talk.first("complete")
        assert complete.outputs[0].receipt.filename == "t1-0"
        assert not server.upload_refusals


async def test_after_an_internal_error_the_next_try_waits_for_a_refusal_before_its_chunks(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server refuses while a chunk is being written may come out of grpc.aio as INTERNAL."""
    server.upload_refusals = [grpc.StatusCode.INTERNAL]
    asked: list[tuple[bool, grpc.StatusCode | None]] = []
    upload = Uploader.upload

    async def noted(self: Uploader, entry: SpoolEntry, index: int, *, patient: bool = False) -> Any:
        try:
            return await upload(self, entry, index, patient=patient)
        except grpc.aio.AioRpcError as error:
            asked.append((patient, error.code()))
            server.upload_ban = grpc.StatusCode.FAILED_PRECONDITION
            raise

    monkeypatch.setattr(Uploader, "upload", noted)
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "paint 3000000"))
        await wait_until(lambda: len(asked) == 2)
        assert asked == [(False, grpc.StatusCode.INTERNAL), (True, grpc.StatusCode.FAILED_PRECONDITION)]
        await wait_until(lambda: not spool_folders(tmp_path))


async def test_a_file_that_the_server_will_never_take_makes_the_end_a_failure(
    server: ScriptedServer, tmp_path: Path
) -> None:
    server.upload_ban = grpc.StatusCode.INVALID_ARGUMENT
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "paint 3000000"))
        complete = await talk.first("complete")
        assert (complete.error.reason, complete.retryable) == ("ENGINE_FAILED", True)
        assert "refused by the script" in complete.error.detail
        assert not complete.outputs


async def test_a_file_that_cannot_be_read_back_makes_the_end_a_failure(server: ScriptedServer, tmp_path: Path) -> None:
    server.upload_gate.clear()
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        await wait_until(agent.runner.spooled)
        talk.end()
        (tmp_path / "spool" / "entries" / "t1.0.png").unlink()
        server.upload_gate.set()
        again = await server.conversation(1)
        complete = await again.first("complete")
        assert (complete.error.reason, complete.retryable) == ("ENGINE_FAILED", True)


async def test_a_slot_that_is_killed_while_its_output_is_sent_takes_nothing_along(
    server: ScriptedServer, tmp_path: Path
) -> None:
    """The output is the agent's by then; the next task gets another process."""
    server.upload_gate.clear()
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "paint 300000"))
        await wait_until(lambda: server.upload_metadata and agent.runner.slots_free)
        pid = agent.runner.slots[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        talk.say(assign=assign_of("t2", "folder"))
        assert not (await talk.about("complete", "t2")).HasField("error")
        assert agent.runner.slots[0].pid not in (pid, None)
        assert not [complete.token for complete in talk.all("complete") if complete.token == "t1"]
        server.upload_gate.set()
        complete = await talk.about("complete", "t1")
        assert complete.outputs[0].receipt.size_bytes == len(server.uploads[0].data) > 300_000
        for token in ("t1", "t2"):
            ack(talk, token)
        await wait_until(lambda: not agent.runner.spooled() and not spool_folders(tmp_path))
        assert len(server.uploads) == 1


async def test_the_api_key_goes_with_the_stream_and_the_uploads_and_to_no_engine(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET_API_KEY", "fc_secret")
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        assert talk.metadata["x-api-key"] == "fc_secret"
        talk.say(assign=assign_of("t1", "secrets"))
        assert "FLEET_API_KEY" not in (await talk.first("complete")).text
        talk.say(assign=assign_of("t2"))
        await talk.about("complete", "t2")
        assert server.upload_metadata[0]["x-api-key"] == "fc_secret"


async def test_without_a_key_none_is_sent(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        assert "x-api-key" not in (await server.conversation()).metadata


class HeldCommit:
    """Stands where `Spool.commit` stands: waits for `gate`, then does it, or fails with `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.error: OSError | None = None
        commit = Spool.commit

        def held(spool: Spool, entry: SpoolEntry) -> None:
            if self.error is None or entry.files:
                self.begun.set()
                assert self.gate.wait(50)
                if self.error is not None:
                    spool.remove(entry.token)
                    raise self.error
            commit(spool, entry)

        monkeypatch.setattr(Spool, "commit", held)


@pytest.fixture
def commit(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldCommit]:
    held = HeldCommit(monkeypatch)
    yield held
    held.gate.set()


async def test_outputs_are_uploaded_while_the_end_is_written_and_the_end_is_said_after(
    server: ScriptedServer, tmp_path: Path, commit: HeldCommit
) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        await wait_until(lambda: server.uploads)
        beats = len(talk.all("heartbeat"))
        await talk.first("heartbeat", lambda beat: beat.sequence > beats + 1 and beat.held and not beat.slots_free)
        assert not talk.all("complete")
        assert not (tmp_path / "spool" / "entries" / "t1.end").exists()
        commit.gate.set()
        complete = await talk.first("complete")
        assert complete.outputs[0].receipt.filename == "t1-0"
        assert (tmp_path / "spool" / "entries" / "t1.end").exists()
        assert len(server.uploads) == 1


async def test_an_end_that_the_disk_does_not_take_is_a_failure_though_its_file_was_sent(
    server: ScriptedServer, tmp_path: Path, commit: HeldCommit
) -> None:
    commit.error = OSError(errno.ENOSPC, "no space left on device")
    async with agent_running(settings_of(tmp_path, server.address, resend_seconds=0.05)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        await wait_until(lambda: server.uploads)
        commit.gate.set()
        await wait_until(lambda: len(talk.all("complete")) > 2)
        assert {complete.error.reason for complete in talk.all("complete")} == {"DISK_FULL"}


async def test_a_session_lost_while_the_end_is_written_does_not_lose_the_end(
    server: ScriptedServer, tmp_path: Path, commit: HeldCommit
) -> None:
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        await wait_until(lambda: server.uploads)
        talk.end()
        again = await server.conversation(1)
        assert [held.token for held in again.hello.held] == ["t1"]
        commit.gate.set()
        complete = await again.first("complete")
        assert complete.outputs[0].receipt.filename == "t1-0"


async def test_small_outputs_ride_in_the_end_also_of_an_earlier_process(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address, inline_bytes=65_536)
    async with agent_running(settings):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        first = await talk.first("complete")
        assert not list((tmp_path / "spool" / "entries").iterdir())
    async with agent_running(settings) as agent:
        talk = await server.conversation(1)
        again = await talk.first("complete")
        ack(talk, "t1")
        await wait_until(lambda: not agent.runner.spooled())
    assert first == again
    (output,) = again.outputs
    assert output.data and output.receipt.size_bytes == len(output.data)
    assert output.receipt.sha256 == hashlib.sha256(output.data).hexdigest()
    assert not output.receipt.filename
    assert not server.uploads


class HeldJournal:
    """Stands where the journal writes: waits for `gate`, then does it, or fails with `error`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.error: OSError | None = None
        self.written = 0
        append = Journal._append

        def held(journal: Journal, data: bytes) -> None:
            assert self.gate.wait(50)
            if self.error is not None:
                raise self.error
            append(journal, data)
            self.written += 1

        monkeypatch.setattr(Journal, "_append", held)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldJournal]:
    held = HeldJournal(monkeypatch)
    yield held
    held.gate.set()


def small_of(folder: Path, server: ScriptedServer, **more: Any) -> AgentSettings:
    return settings_of(folder, server.address, inline_bytes=65_536, **more)


async def test_a_small_end_is_said_while_it_is_written_and_its_slot_takes_work(
    server: ScriptedServer, tmp_path: Path, journal: HeldJournal
) -> None:
    async with agent_running(small_of(tmp_path, server)) as agent:
        talk = await server.conversation()
        for token in ("t1", "t2"):
            talk.say(assign=assign_of(token))
            await talk.about("complete", token)
        assert not talk.all("rejected")
        assert not journal.written
        ack(talk, "t1")
        await talk.first("heartbeat", lambda beat: [held.token for held in beat.held] == ["t2"])
        journal.gate.set()
        await wait_until(lambda: not agent.runner._keeper._keeping)
    assert [entry.token for entry in Spool(tmp_path / "spool").entries()] == ["t2"]


async def test_a_slow_disk_keeps_a_slot_before_ends_pile_up(
    server: ScriptedServer, tmp_path: Path, journal: HeldJournal
) -> None:
    async with agent_running(small_of(tmp_path, server)):
        talk = await server.conversation()
        for token in ("t1", "t2"):
            talk.say(assign=assign_of(token))
            await talk.about("complete", token)
        talk.say(assign=assign_of("t3"))
        await talk.about("started", "t3")
        beats = len(talk.all("heartbeat"))
        await talk.first("heartbeat", lambda beat: beat.sequence > beats + 2 and not beat.slots_free)
        assert [complete.token for complete in talk.all("complete")] == ["t1", "t2"]
        journal.gate.set()
        await talk.about("complete", "t3")


async def test_a_small_end_that_is_not_yet_written_is_said_again_after_a_lost_session(
    server: ScriptedServer, tmp_path: Path, journal: HeldJournal
) -> None:
    async with agent_running(small_of(tmp_path, server)):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        first = await talk.first("complete")
        talk.end()
        again = await server.conversation(1)
        assert [held.token for held in again.hello.spooled] == ["t1"]
        assert await again.first("complete") == first
        assert not journal.written
        journal.gate.set()


async def test_a_small_end_that_the_disk_does_not_take_is_said_all_the_same(
    server: ScriptedServer, tmp_path: Path, journal: HeldJournal
) -> None:
    journal.error = OSError(errno.ENOSPC, "no space left on device")
    journal.gate.set()
    async with agent_running(small_of(tmp_path, server, resend_seconds=0.05)) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        await wait_until(lambda: len(talk.all("complete")) > 2)
        assert not any(complete.HasField("error") for complete in talk.all("complete"))
        ack(talk, "t1")
        await wait_until(lambda: not agent.runner.spooled())


async def test_an_agent_that_stops_writes_its_ends_down_first(
    server: ScriptedServer, tmp_path: Path, journal: HeldJournal
) -> None:
    settings = small_of(tmp_path, server)
    async with agent_running(settings):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1"))
        first = await talk.first("complete")
        asyncio.get_running_loop().call_soon(journal.gate.set)
    async with agent_running(settings):
        assert await (await server.conversation(1)).first("complete") == first
