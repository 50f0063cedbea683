"""Who did what to a node, in the log, whether it was allowed and whatever came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from fleet_server.domain.errors import FleetError

_log = structlog.get_logger("fleet.audit")


@dataclass(frozen=True, slots=True)
class Actor:
    """Who calls: the name of its key, "" where none is asked for; the call's id; its idempotency key."""

    owner: str = ""
    request_id: str = ""
    key: str | None = None


@contextmanager
def audited(actor: Actor, verb: str, node_id: str, **target: object) -> Iterator[None]:
    """One line when the block ends: `decision` is done, or the reason of the refusal."""
    decision = "abandoned"
    try:
        yield
        decision = "done"
    except FleetError as error:
        decision = error.reason
        raise
    finally:
        _log.info(
            "audit",
            verb=verb,
            owner=actor.owner,
            request_id=actor.request_id,
            node_id=node_id,
            decision=decision,
            **target,
        )
