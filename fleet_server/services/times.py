"""Times of the contract as whole milliseconds."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp


def ceil_ms(time: Timestamp) -> int:
    """Unix ms, rounded up, so that `< time` and `>= time` hold for whole milliseconds."""
    return time.seconds * 1000 + -(-time.nanos // 1_000_000)
