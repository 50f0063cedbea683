"""References to files in payloads: what they may say, and whether what they name is there."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from fleet_server.domain.errors import invalid_field
from fleet_server.services.refusals import later, refused
from fleet_server.store import OutputStore

_FORM = re.compile(r"(?:(input|output|job):([A-Za-z0-9][A-Za-z0-9._-]{0,127})|s3://([a-z0-9-]{3,63})/(\S+))")
_BUCKETS = frozenset({"fleet-models", "fleet-outputs", "fleet-loras", "fleet-workspace"})
_WORDS = "must be a reference: input:<id>, output:<filename>, job:<job_id> or s3://<bucket>/<key> of a fleet bucket"


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference taken apart: `kind` is input, output, job or s3; `name` is what it names."""

    kind: str
    name: str


def parse(reference: str) -> Reference | None:
    """The reference; None for what is none."""
    match = _FORM.fullmatch(reference)
    if match is None:
        return None
    if match[3] is None:
        return Reference(match[1], match[2])
    return Reference("s3", reference) if match[3] in _BUCKETS else None


async def check_reference(reference: str, outputs: OutputStore, *, path: str, after: Collection[str] = ()) -> None:
    """Returns if the file is there, or will be once the jobs of `after` have succeeded.

    Raises INVALID_FIELD for what is no reference, INPUT_NOT_FOUND for what is not there, NOT_IMPLEMENTED for the kinds
    whose stores this version does not have.
    """
    found = parse(reference)
    if found is None:
        raise invalid_field(path, _WORDS)
    if found.kind == "output":
        if await outputs.get(found.name) is None:
            raise refused("INPUT_NOT_FOUND", path, f"there is no output {found.name!r}; see GET /api/vision/gallery")
    elif found.kind == "input":
        raise refused("INPUT_NOT_FOUND", path, f"there is no input {found.name!r}; inputs are kept for 24 hours")
    elif found.kind == "job":
        if found.name not in after:
            raise invalid_field(path, f"must name a job of `after`: put {found.name} there, so that it comes first")
    else:
        raise later(path, "files in S3 are")
