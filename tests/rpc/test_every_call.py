"""No call is left to the answer that gRPC's generated base class has for it."""

from __future__ import annotations

import pytest
from fleet.v1 import fleet_pb2_grpc, node_pb2_grpc, queue_pb2_grpc, vision_pb2_grpc

from fleet_server.rpc.fleet import FleetServicer
from fleet_server.rpc.node import NodeServicer
from fleet_server.rpc.queue import QueueServicer
from fleet_server.rpc.vision import VisionServicer


@pytest.mark.parametrize(
    ("generated", "ours"),
    [
        (fleet_pb2_grpc.FleetServicer, FleetServicer),
        (vision_pb2_grpc.VisionServicer, VisionServicer),
        (queue_pb2_grpc.QueueServicer, QueueServicer),
        (node_pb2_grpc.NodeServicer, NodeServicer),
    ],
)
def test_every_call_is_ours(generated: type, ours: type) -> None:
    calls = [name for name in vars(generated) if not name.startswith("_")]
    assert calls
    assert [name for name in calls if getattr(ours, name) is getattr(generated, name)] == []
