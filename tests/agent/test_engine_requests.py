"""Requests of the server to a node's ComfyUI, answered by the agent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from fleet.v1 import command_pb2

from fleet_agent.commands import CommandChannel, CommandFault
from fleet_agent.engine_requests import EngineRequests
from tests.comfy_node import ComfyNode, sample


class Heard(CommandChannel):
    """What a handler said."""

    def __init__(self) -> None:
        super().__init__()
        self.replies: list[command_pb2.EngineReply] = []
        self.bytes = b""

    async def reply(self, reply: command_pb2.EngineReply) -> None:
        self.replies.append(reply)

    async def body(self, data: bytes) -> None:
        assert len(data) <= 256 << 10
        self.bytes += data


@pytest.fixture
def node() -> Iterator[ComfyNode]:
    with ComfyNode(checkpoints=()) as node:
        yield node


@pytest.fixture
async def requests(node: ComfyNode) -> AsyncIterator[EngineRequests]:
    requests = EngineRequests({"comfyui": node.url, "openai": ""})
    yield requests
    await requests.aclose()


def _command(target: str, method: str = "GET", engine: str = "comfyui", **more: object) -> command_pb2.Command:
    request = command_pb2.EngineRequest(engine=engine, method=method, target=target, **more)  # type: ignore[arg-type]
    return command_pb2.Command(command_id="1", timeout_seconds=5, engine_request=request)


async def test_a_reply_comes_as_it_is(node: ComfyNode, requests: EngineRequests) -> None:
    heard = Heard()
    end = await requests.serve(_command("/object_info/KSampler"), heard)
    assert not end.HasField("error")
    [reply] = heard.replies
    assert (reply.status_code, reply.content_type) == (200, "application/json; charset=utf-8")
    assert int(reply.headers["content-length"]) == len(heard.bytes)
    assert sample("object_info_KSampler")["body"]["KSampler"]["name"].encode() in heard.bytes


async def test_files_bodies_and_refusals(node: ComfyNode, requests: EngineRequests) -> None:
    node.app.files.data["output", "", "large.png"] = bytes(700_000)
    heard = Heard()
    await requests.serve(_command("/view?filename=large.png"), heard)
    assert len(heard.bytes) == 700_000
    assert heard.replies[0].headers["content-disposition"] == 'filename="large.png"'
    heard = Heard()
    await requests.serve(_command("/prompt", "POST", content_type="application/json", body=b"{}"), heard)
    assert heard.replies[0].status_code == 400
    assert b"no_prompt" in heard.bytes


async def test_what_is_no_request_to_an_engine(requests: EngineRequests) -> None:
    for command in (_command("@127.0.0.1/"), _command("http://127.0.0.1/"), _command("/", "TRACE"), _command("/\\x")):
        with pytest.raises(CommandFault) as raised:
            await requests.serve(command, Heard())
        assert raised.value.reason == "INVALID_FIELD"
    for engine in ("openai", "sketch"):
        with pytest.raises(CommandFault, match="no engine"):
            await requests.serve(_command("/", engine=engine), Heard())


async def test_a_program_that_is_away(node: ComfyNode, requests: EngineRequests) -> None:
    node.stop()
    with pytest.raises(CommandFault, match="does not answer") as raised:
        await requests.serve(_command("/queue"), Heard())
    assert raised.value.reason == "NODE_OFFLINE"
