"""What the store hands out and takes in of files: outputs, where they are, inputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One output in the index. `record` is an encoded fleet.v1.Output as it was when the file was stored.

    `key` is its name in the bucket, `making` the encoded fleet.v1.JobSpec that makes it again (b"": not known), `home`
    the server on whose disk it was stored. The rest changes: whether it is on that disk, is verified to be in the
    bucket, has a star.
    """

    filename: str
    job_id: str
    created_ms: int
    size_bytes: int
    record: bytes
    key: str = ""
    making: bytes = b""
    home: str = ""
    local: bool = True
    synced: bool = False
    starred: bool = False

    @property
    def object_key(self) -> str:
        """Its name in the bucket."""
        return self.key or self.filename


@dataclass(frozen=True, slots=True)
class InputRow:
    """A file that a caller brought for payloads to name. `key` is its name in the workspace bucket, "" where it is on
    the disk of the server `home` instead. `jobs` that have not ended name it: while there are any it stays, whatever
    `expire_ms` (Unix ms) says.
    """

    input_id: str
    filename: str
    content_type: str
    size_bytes: int
    sha256: str
    home: str
    key: str
    expire_ms: int
    jobs: int = 0


@dataclass(frozen=True, slots=True)
class OutputCounts:
    """How many files, and how many bytes they have."""

    files: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class OutputFailure:
    """An output that could not be copied to the bucket so far."""

    filename: str
    reason: str
    detail: str
    attempts: int
    created_ms: int


@dataclass(frozen=True, slots=True)
class Leaving:
    """A deleted output and where it may still be: letters of L (its home's disk), S (the bucket), T (thumbnails)."""

    filename: str
    places: str
    home: str
    key: str


@dataclass(frozen=True, slots=True)
class OutputChanges:
    """What has changed since a number: (filename, number, row or None where it was deleted), in order.

    `epoch` is that of the index: another one is another index. Deletions up to `floor` may be missing. `newest` is the
    number of the last change of all.
    """

    epoch: str
    floor: int
    newest: int
    rows: tuple[tuple[str, int, OutputRow | None], ...]
