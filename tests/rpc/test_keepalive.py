"""Connections without calls: both ends ping, and neither takes it amiss."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import grpc
import pytest
from fleet_client import FleetCommander
from prometheus_client import CollectorRegistry

from fleet_server.http import HttpServer
from fleet_server.rpc.auth import KeyRing
from fleet_server.rpc.invoke import Invoker
from fleet_server.rpc.metrics import RpcMetrics
from fleet_server.rpc.server import OPTIONS, PING_MS, GrpcServer, keepalive

FAST_MS = 400
FAST = {
    **dict(keepalive(FAST_MS)),
    # Where the machine stands still for a moment, neither end is gone, and a ping that comes late is not one too many.
    "grpc.keepalive_timeout_ms": 50_000,
    "grpc.http2.min_ping_interval_without_data_ms": 1,
}


def server(fast: Mapping[str, int]) -> GrpcServer:
    keys = KeyRing([], clock=lambda: 0.0)
    invoker = Invoker([], keys=keys, metrics=RpcMetrics(CollectorRegistry(), []))
    return GrpcServer(invoker, options=[(name, fast.get(name, value)) for name, value in OPTIONS])


async def stays(channel: grpc.aio.Channel, seconds: float) -> bool:
    """Whether a connection is still the same after so long."""
    try:
        async with asyncio.timeout(seconds):
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("pings", ["as often as agreed", "far too often"])
async def test_an_idle_connection_stays_unless_it_pings_too_often(pings: str) -> None:
    """An agent's channel of uploads is idle for hours. With a name of the option that gRPC does not know it was closed
    after three pings.
    """
    agreed = pings == "as often as agreed"
    serving = server(FAST if agreed else dict(keepalive(PING_MS)))
    port = await serving.start("127.0.0.1:0")
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=list(FAST.items()))
    try:
        async with asyncio.timeout(50):
            await channel.channel_ready()
        assert await stays(channel, FAST_MS * 15 / 1000 if agreed else 20) is agreed
    finally:
        await channel.close()
        await serving.stop(0)


def test_clients_and_proxies_close_idle_connections_of_http_before_the_server_does() -> None:
    """Else a request may go out in the moment in which its connection is closed, and fails."""
    with FleetCommander("http://localhost:1") as client:
        kept = client.session._transport._pool._keepalive_expiry  # type: ignore[attr-defined]
    assert HttpServer(None, (), 1)._server.config.timeout_keep_alive > max(kept, 60)
