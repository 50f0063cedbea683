"""References to files in payloads: what they may say, and whether what they name is there."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from fleet.v1 import types_pb2

from fleet_server.domain.errors import invalid_field
from fleet_server.services.payloads import references_of
from fleet_server.services.refusals import refused
from fleet_server.storage.buckets import BUCKETS, WORKSPACE
from fleet_server.storage.s3 import S3Store, is_object_key
from fleet_server.store import InputStore, OutputStore

_FORM = re.compile(r"(?:(input|output|job):([A-Za-z0-9][A-Za-z0-9._-]{0,127})|s3://([a-z0-9-]{3,63})/(\S+))")
_WORDS = "must be a reference: input:<id>, output:<filename>, job:<job_id> or s3://<bucket>/<key> of a fleet bucket"
INPUT_PREFIX = "inputs/"
"""What the names of inputs begin with in the bucket fleet-workspace."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference taken apart: `kind` is input, output, job or s3; `name` is what it names, of s3 the key."""

    kind: str
    name: str
    bucket: str = ""


def parse(reference: str) -> Reference | None:
    """The reference; None for what is none."""
    match = _FORM.fullmatch(reference)
    if match is None:
        return None
    if match[3] is None:
        return Reference(match[1], match[2])
    return Reference("s3", match[4], match[3]) if match[3] in BUCKETS and is_object_key(match[4]) else None


def inputs_of(payload: types_pb2.Payload) -> tuple[str, ...]:
    """The ids of the inputs that a payload names, be it by their objects in the bucket; each once."""
    found: dict[str, None] = {}
    for _, text in references_of(payload, path=""):
        reference = parse(text)
        if reference is not None and reference.kind == "input":
            found[reference.name] = None
        elif reference is not None and reference.bucket == WORKSPACE and reference.name.startswith(INPUT_PREFIX):
            found[reference.name.removeprefix(INPUT_PREFIX)] = None
    return tuple(found)


class References:
    """Looks whether files are there."""

    def __init__(self, outputs: OutputStore, inputs: InputStore, s3: S3Store) -> None:
        self._outputs = outputs
        self._inputs = inputs
        self._s3 = s3

    async def check(self, reference: str, *, path: str, after: Collection[str] = ()) -> None:
        """Returns if the file is there, or will be once the jobs of `after` have succeeded.

        Raises INVALID_FIELD for what is no reference, INPUT_NOT_FOUND for what is not there, S3_UNAVAILABLE.
        """
        found = parse(reference)
        if found is None:
            raise invalid_field(path, _WORDS)
        if found.kind == "output":
            if await self._outputs.get(found.name) is None:
                raise refused(
                    "INPUT_NOT_FOUND", path, f"there is no output {found.name!r}; see GET /api/vision/gallery"
                )
        elif found.kind == "input":
            if await self._inputs.get(found.name) is None:
                words = f"there is no input {found.name!r}: bring it by POST /api/inputs; it is kept for 24 hours"
                raise refused("INPUT_NOT_FOUND", path, words)
        elif found.kind == "job":
            if found.name not in after:
                raise invalid_field(path, f"must name a job of `after`: put {found.name} there, so that it comes first")
        elif await self._s3.stat(found.bucket, found.name) is None:
            raise refused("INPUT_NOT_FOUND", path, f"the bucket {found.bucket} has no object {found.name!r}")
