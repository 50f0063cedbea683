"""Ends and uploads that the server refuses, delays or never takes, over real gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from fleet_agent.spool import SpoolEntry
from fleet_agent.upload import Uploader
from tests.agent.helpers import (
    ScriptedServer,
    agent_running,
    assign_of,
    settings_of,
)
from tests.agent.test_session import spool_folders
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
        (tmp_path / "spool" / "entries" / "t1" / "0.png").unlink()
        server.upload_gate.set()
        again = await server.conversation(1)
        complete = await again.first("complete")
        assert (complete.error.reason, complete.retryable) == ("ENGINE_FAILED", True)


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
