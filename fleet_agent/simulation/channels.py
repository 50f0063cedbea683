"""Channels that many simulated agents share: a thousand agents need some tens of connections, not two thousand."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from fleet_agent.upload import Metadata, Uploader

STREAMS_PER_CHANNEL = 50
"""The server allows 100 on a connection, and an agent's uploads come beside its stream."""
UPLOAD_CHANNELS = 8
_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 16 << 20),
    # Else all channels to one address share a connection, and with it the server's limit of streams.
    ("grpc.use_local_subchannel_pool", 1),
    # An agent of its own dials anew each time; a shared channel must not wait longer than that.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


class Channels:
    """Channels to one server, for `agents` agents and for the callers of the simulation."""

    def __init__(
        self,
        server: str,
        metadata: Metadata,
        agents: int,
        upload_seconds: float,
        per_channel: int = STREAMS_PER_CHANNEL,
        detour: str = "",
    ) -> None:
        """`detour` is another way to the server, that of the first channel: one agent in `len(self)` goes there."""
        self.metadata = metadata
        count = max(1, -(-agents // per_channel))
        ways = [detour or server, *[server] * (count - 1)]
        self._streams = [self._open(way) for way in ways]
        self._uploads = [self._open(way) for way in ways[:UPLOAD_CHANNELS]]
        self._uploaders = [Uploader(channel, metadata, upload_seconds, limit=16) for channel in self._uploads]
        self.calls = self._open(server)

    def __len__(self) -> int:
        return len(self._streams)

    def stream(self, number: int) -> grpc.aio.Channel:
        """The channel of that agent's stream."""
        return self._streams[number % len(self._streams)]

    def uploader(self, number: int) -> Uploader:
        """What that agent uploads with."""
        return self._uploaders[number % len(self._uploaders)]

    async def close(self) -> None:
        """Ends all of them."""
        for channel in (*self._streams, *self._uploads, self.calls):
            await channel.close()

    @staticmethod
    def _open(server: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(server, options=list(_OPTIONS))
