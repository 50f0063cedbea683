"""More calls at once on one connection than most servers take: none is refused for their number."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
from fleet.v1 import queue_pb2, queue_pb2_grpc

from tests.rpc.conftest import KEY

WATCHERS = 300


def test_hundreds_of_streams_and_a_call_share_a_connection(grpc_server: str) -> None:
    """A client learns how many streams a server takes only from its first answer; what is beyond would be UNAVAILABLE,
    or wait for ever behind streams that do not end.
    """
    metadata = (("x-api-key", KEY),)
    with grpc.insecure_channel(grpc_server) as channel, ThreadPoolExecutor(1) as pool:
        stub = queue_pb2_grpc.QueueStub(channel)
        watching = [
            stub.WatchJob(queue_pb2.WatchJobRequest(job_id="j"), metadata=metadata, timeout=60) for _ in range(WATCHERS)
        ]
        try:
            for stream in watching:
                assert pool.submit(next, stream).result(50).id == "0"
            stats = stub.GetStats(queue_pb2.GetStatsRequest(), metadata=metadata, timeout=60)
            assert stats.window_seconds == 7
        finally:
            for stream in watching:
                stream.cancel()
