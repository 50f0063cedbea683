"""Refusals that several use cases share."""

from __future__ import annotations

from fleet_server.domain.errors import Code, FleetError, Violation


def refused(reason: str, field: str, words: str) -> FleetError:
    """A refusal with a reason of its own that names one field."""
    return FleetError(reason, f"{field}: {words}", violations=[Violation(field, words)])


def forbidden(detail: str) -> FleetError:
    """The refusal of an agent that meddles with what is another node's."""
    return FleetError("NODE_FORBIDDEN", detail, code=Code.PERMISSION_DENIED)


def join(prefix: str, name: str) -> str:
    """`jobs[3]` and `payload` as one path."""
    return f"{prefix}.{name}" if prefix else name
