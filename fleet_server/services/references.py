"""References to files in payloads: what they may say, and whether what they name is there."""

from __future__ import annotations

import re

from fleet_server.domain.errors import invalid_field
from fleet_server.services.refusals import later, refused
from fleet_server.store import OutputStore

_FORM = re.compile(r"(?:(input|output|job):([A-Za-z0-9][A-Za-z0-9._-]{0,127})|s3://([a-z0-9-]{3,63})/(\S+))")
_BUCKETS = frozenset({"fleet-models", "fleet-outputs", "fleet-loras", "fleet-workspace"})
_WORDS = "must be a reference: input:<id>, output:<filename>, job:<job_id> or s3://<bucket>/<key> of a fleet bucket"


async def check_reference(reference: str, outputs: OutputStore, *, path: str) -> None:
    """Returns if the file is there.

    Raises INVALID_FIELD for what is no reference, INPUT_NOT_FOUND for what is not there, NOT_IMPLEMENTED for the kinds
    whose stores this version does not have.
    """
    match = _FORM.fullmatch(reference)
    if match is None or (match[3] is not None and match[3] not in _BUCKETS):
        raise invalid_field(path, _WORDS)
    kind, name = match[1], match[2]
    if kind == "output":
        if await outputs.get(name) is None:
            raise refused("INPUT_NOT_FOUND", path, f"there is no output {name!r}; see GET /api/vision/gallery")
    elif kind == "input":
        raise refused("INPUT_NOT_FOUND", path, f"there is no input {name!r}; inputs are kept for 24 hours")
    elif kind == "job":
        raise later(path, "outputs of other jobs are")
    else:
        raise later(path, "files in S3 are")
