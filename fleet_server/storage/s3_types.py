"""What is said to and heard from an S3 server."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fleet_server.domain.errors import FleetError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class S3Config:
    """Which server, and who we are there. `endpoint` and `public_url` are `http(s)://host[:port]`, without a path.

    `public_url` is where callers reach the same server; the endpoint itself when empty.
    """

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    region: str = "us-east-1"
    public_url: str = ""


@dataclass(frozen=True, slots=True)
class S3Limits:
    """Durations in seconds, sizes in bytes. A call that moves bytes may last `call_seconds` plus its size at
    `slowest_bytes_per_second`."""

    threads: int = 8
    streams: int = 16
    """Objects read at once; further readers wait."""
    connect_seconds: float = 3.0
    read_seconds: float = 10.0
    """The longest silence of the server."""
    call_seconds: float = 15.0
    slowest_bytes_per_second: int = 1 * MIB
    check_seconds: float = 10.0
    """Between looks at a server that is well."""
    recheck_seconds: float = 1.0
    """Between looks at one that is not."""
    part_bytes: int = 8 * MIB
    """Up to this size in one put, above it in parts of this size (at least 5 MiB, as S3 wants), which other clients use
    too: so the ETags of their uploads can be compared as well. A thread holds at most two parts in memory."""
    chunk_bytes: int = 1 * MIB


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """An object that is there. `etag` is without quotes; `modified_ms` is Unix ms.

    From lists `content_type` is "" and `metadata` empty. `metadata` has lower-case names without `x-amz-meta-`.
    """

    bucket: str
    key: str
    size_bytes: int
    etag: str
    modified_ms: int
    content_type: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Stored:
    """What a put did. `sha256` is of the bytes that were read here.

    `sha256_verified`: a checksum that the server computed over what it has, or a read-back, proves that it has exactly
    the bytes with the expected hash; else `detail` says what is wrong.
    """

    size_bytes: int
    etag: str
    sha256: str
    sha256_verified: bool
    detail: str = ""


class NoObjectError(FleetError):
    """The bucket has no such object. Callers say what that means to theirs; by itself it is OUTPUT_NOT_FOUND."""

    def __init__(self, bucket: str, key: str) -> None:
        super().__init__("OUTPUT_NOT_FOUND", f"s3://{bucket}/{key} is not there")
        self.bucket = bucket
        self.key = key


def unavailable(detail: str) -> FleetError:
    """An S3_UNAVAILABLE with the reason in words."""
    return FleetError("S3_UNAVAILABLE", detail)


class Cancel(threading.Event):
    """Set when nobody waits for a call any more; its thread ends at the next read of the file or the socket."""

    def check(self) -> None:
        """Raises S3_UNAVAILABLE once set."""
        if self.is_set():
            raise unavailable("the call was given up")
