"""One command under way: the road from who gave it to the agent's call that answers it."""

from __future__ import annotations

import asyncio

from fleet.v1 import command_pb2

from fleet_server.domain.errors import Code, FleetError
from fleet_server.services.pipe import Pipe

PARTS = 4
"""Parts of an answer that wait for their reader; the rest is held back at the agent."""

EFFECTS = frozenset(
    {
        *("deploy", "remove", "exec", "exec_stream", "load_model", "unload_model", "download"),
        *("scale_service", "update_service", "rollback_service"),
    }
)
"""Commands that change something: the agent keeps a journal of them, and they never take effect twice."""


class ServedCall:
    """The agent's call that answers a command: what it says (`parts`), what it is to hear (`answers`)."""

    def __init__(self) -> None:
        self.parts: Pipe[command_pb2.ServeCommandRequest] = Pipe(PARTS)
        self.answers: Pipe[command_pb2.ServeCommandResponse] = Pipe(PARTS)
        self.error: FleetError | None = None
        """Why the parts ended without an end, where that is known."""

    def leave(self) -> None:
        """Who gave the command wants no more of it: the agent's call ends."""
        self.parts.close()
        self.answers.end()


class Exchange:
    """A command, the session that it was last sent in, and the call that answers it now."""

    def __init__(self, node_id: str, command: command_pb2.Command) -> None:
        self.node_id = node_id
        self.command = command
        self.session_id = ""
        self.over = asyncio.Event()
        self.sent = False
        self.relayed = False
        """Another server sent it here: it goes no further."""
        self.begun = False
        """The agent was let to begin: it asks before it does anything."""
        self._call: ServedCall | None = None
        self._called = asyncio.Event()

    @property
    def effect(self) -> bool:
        """Whether it changes something."""
        return self.command.WhichOneof("command") in EFFECTS

    @property
    def deploys(self) -> bool:
        """Whether it starts a container that stays."""
        return self.command.HasField("deploy")

    @property
    def answered(self) -> bool:
        """Whether a call has come that `called` has not given out yet."""
        return self._called.is_set()

    def begin(self) -> ServedCall:
        """The agent's call has come; it takes the place of an earlier one."""
        if self._call is not None:
            self._call.answers.end()
            self._call.parts.end()
        self._call = ServedCall()
        self.begun = True
        self._called.set()
        return self._call

    async def called(self) -> ServedCall:
        """The call that answers, once there is one that was not given out before."""
        await self._called.wait()
        self._called.clear()
        assert self._call is not None
        return self._call

    def close(self) -> None:
        """Nobody waits for it any more."""
        self.over.set()
        if self._call is not None:
            self._call.leave()

    def lost(self) -> FleetError:
        """What is known of a command whose node is away."""
        if self.begun and self.effect:
            return FleetError(
                "OUTCOME_UNKNOWN",
                f"node {self.node_id!r} was lost while it had the command: whether it took effect is not known, "
                "and it is not repeated; look at the node when it is back",
            )
        return offline(self.node_id)


def offline(node_id: str) -> FleetError:
    """The node cannot be asked now."""
    return FleetError("NODE_OFFLINE", f"node_id: the agent of {node_id!r} is not connected; see GET /api/nodes")


def error_of(end: command_pb2.CommandEnd) -> FleetError | None:
    """The agent's error as ours; None where the command succeeded."""
    if not end.HasField("error"):
        return None
    error = end.error
    try:
        return FleetError(error.reason, error.detail)
    except KeyError:
        code = Code[error.code] if error.code in Code.__members__ else Code.INTERNAL
        return FleetError(error.reason or "INTERNAL", error.detail, code=code)
