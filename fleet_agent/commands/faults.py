"""How a command ends without success."""

from __future__ import annotations

from fleet.v1 import command_pb2, types_pb2

UNKNOWN = "OUTCOME_UNKNOWN"


class CommandFault(Exception):  # noqa: N818 - it is an answer, not a failure of the agent
    """Ends a command with an error. `reason` is one of the API's stable words; `detail` says what to do next.

    `acted`: it may have taken effect, so its id is kept: it is never begun again. Without, nothing has changed on the
    node, and the same id may try again.
    """

    def __init__(self, reason: str, detail: str, *, code: str = "", acted: bool = False) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.code = code
        self.acted = acted

    @property
    def end(self) -> command_pb2.CommandEnd:
        """As the server is told."""
        error = types_pb2.JobError(detail=self.detail, code=self.code, reason=self.reason)
        return command_pb2.CommandEnd(error=error)


def unknown(why: str) -> CommandFault:
    """An effect of which nobody knows whether it happened."""
    return CommandFault(
        UNKNOWN,
        f"{why}: whether the command took effect is not known, and it is not repeated; look at the node",
        code="UNKNOWN",
        acted=True,
    )
