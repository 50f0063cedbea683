"""The chain that every call passes, over real gRPC: keys, limits, defaults, validation, deadlines, errors, metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from fleet.v1 import queue_pb2, types_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry

from fleet_server.domain.errors import FleetError
from fleet_server.rpc.auth import ApiKey, KeyRing
from tests.rpc.conftest import KEY, EchoQueue

WITH_KEY = (("x-api-key", KEY),)


def job(**fields: Any) -> queue_pb2.CreateJobRequest:
    request = queue_pb2.CreateJobRequest(job_type=types_pb2.JOB_TYPE_IMAGE_GEN, **fields)
    request.payload.update({"prompt": "x"})
    return request


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def details(error: Any) -> dict[str, Any]:
    """The rich details by message name."""
    status = rpc_status.from_call(error)
    assert status is not None
    found: dict[str, Any] = {}
    for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
        for detail in status.details:
            message = kind()
            if detail.Unpack(message):
                found[kind.DESCRIPTOR.name] = message
    return found


def test_defaults_are_filled_in_before_the_servicer(grpc_stub: Any) -> None:
    reply = grpc_stub.CreateJob(job(), metadata=WITH_KEY)
    assert reply.receipt.job_id == "3 2 3600 ann "


def test_an_explicit_zero_is_kept(grpc_stub: Any) -> None:
    assert grpc_stub.CreateJob(job(max_retries=0), metadata=WITH_KEY).receipt.job_id.startswith("0 ")


def test_a_bad_field_is_named_in_words_and_in_details(grpc_stub: Any) -> None:
    error = refused(lambda: grpc_stub.CreateJob(job(max_retries=21), metadata=WITH_KEY))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "max_retries: must be from 0 to 20; got 21"
    found = details(error)
    assert found["ErrorInfo"].reason == "INVALID_FIELD"
    assert found["ErrorInfo"].domain == "fleet.v1"
    violation = found["BadRequest"].field_violations[0]
    assert (violation.field, violation.description) == ("max_retries", "must be from 0 to 20")


def test_a_bad_field_in_a_list_is_named_by_its_index(grpc_stub: Any) -> None:
    batch = queue_pb2.BatchCreateJobsRequest(jobs=[job(), job(timeout_seconds=0)])
    error = refused(lambda: grpc_stub.BatchCreateJobs(batch, metadata=WITH_KEY))
    assert error.details() == "jobs[1].timeout_seconds: must be from 1 to 86400; got 0"


def test_every_bad_field_is_told(grpc_stub: Any) -> None:
    request = queue_pb2.CreateJobRequest(max_retries=99, target_cluster="No Good")
    error = refused(lambda: grpc_stub.CreateJob(request, metadata=WITH_KEY))
    fields = {violation.field for violation in details(error)["BadRequest"].field_violations}
    assert fields == {"job_type", "payload", "max_retries", "target_cluster"}


def test_a_request_over_the_limit_is_refused(grpc_stub: Any) -> None:
    request = job()
    request.payload.update({"prompt": "x" * (1 << 20)})
    error = refused(lambda: grpc_stub.CreateJob(request, metadata=WITH_KEY))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(error)["ErrorInfo"].reason == "BODY_TOO_LARGE"
    batch = queue_pb2.BatchCreateJobsRequest(jobs=[request])
    assert grpc_stub.BatchCreateJobs(batch, metadata=WITH_KEY) == queue_pb2.BatchCreateJobsResponse()


def test_a_call_needs_the_key(grpc_stub: Any) -> None:
    error = refused(lambda: grpc_stub.CreateJob(job()))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details(error)["ErrorInfo"].reason == "API_KEY_MISSING"
    assert "x-api-key" in str(error.details()).lower()
    bearer = (("authorization", f"Bearer {KEY}"),)
    assert grpc_stub.CreateJob(job(), metadata=bearer).receipt.job_id


def test_a_public_method_needs_none(grpc_stub: Any) -> None:
    assert grpc_stub.GetStats(queue_pb2.GetStatsRequest()).window_seconds == 7


def test_wrong_keys_are_rate_limited_for_a_minute() -> None:
    now = [0.0]
    ring = KeyRing([ApiKey.of("ann", KEY)], clock=lambda: now[0])

    def reason(key: str, peer: str) -> str:
        try:
            return ring.owner(key, peer)
        except FleetError as error:
            return error.reason

    guesses = [reason(f"guess {n}", f"ipv4:127.0.0.9:{n}") for n in range(11)]
    assert guesses == ["API_KEY_INVALID"] * 10 + ["RATE_LIMITED"]
    assert reason(KEY, "ipv4:127.0.0.9:99") == "RATE_LIMITED"
    assert reason(KEY, "ipv4:127.0.0.8:1") == "ann"
    now[0] += 61
    assert reason(KEY, "ipv4:127.0.0.9:99") == "ann"


def test_who_has_brought_the_right_key_is_not_locked_out_by_a_guesser_at_the_same_address() -> None:
    ring = KeyRing([ApiKey.of("ann", KEY)], clock=lambda: 0.0)
    assert ring.owner(KEY, "ipv4:127.0.0.1:1") == "ann"
    for n in range(20):
        with pytest.raises(FleetError):
            ring.owner(f"guess {n}", f"ipv4:127.0.0.1:{n}")
    assert ring.owner(KEY, "ipv4:127.0.0.1:1") == "ann"
    with pytest.raises(FleetError, match="too many"):
        ring.owner("guess", "ipv4:127.0.0.1:2")


def test_a_key_that_came_before_is_worth_what_it_is_now() -> None:
    ring = KeyRing([ApiKey.of("ann", KEY)], clock=lambda: 0.0)
    for keys, owner in (([ApiKey.of("bob", KEY)], "bob"), ([ApiKey.of("eve", KEY[::-1])], ""), ([], "")):
        assert ring.owner(KEY, "ipv4:127.0.0.1:1")
        ring.replace(keys)
        if keys and not owner:
            with pytest.raises(FleetError, match="not one of"):
                ring.owner(KEY, "ipv4:127.0.0.1:1")
            ring.replace([ApiKey.of("ann", KEY)])
        else:
            assert ring.owner(KEY, "ipv4:127.0.0.1:1") == owner


def test_an_error_says_when_to_try_again(grpc_stub: Any) -> None:
    error = refused(lambda: grpc_stub.GetJob(queue_pb2.GetJobRequest(job_id="full"), metadata=WITH_KEY))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    delay = details(error)["RetryInfo"].retry_delay
    assert (delay.seconds, delay.nanos) == (1, 500_000_000)


def test_a_bug_is_logged_and_not_told(grpc_stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    call = (*WITH_KEY, ("x-request-id", "req-7"))
    error = refused(lambda: grpc_stub.GetJob(queue_pb2.GetJobRequest(job_id="bug"), metadata=call))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error.details())
    assert "req-7" in str(error.details())


def test_the_methods_deadline_ends_a_call(grpc_stub: Any) -> None:
    error = refused(lambda: grpc_stub.GetJob(queue_pb2.GetJobRequest(job_id="wait"), metadata=WITH_KEY))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details(error)["ErrorInfo"].reason == "TIMEOUT"


def test_a_stream_gives_what_came_before_its_error(grpc_stub: Any) -> None:
    stream = grpc_stub.WatchJob(queue_pb2.WatchJobRequest(job_id="fails"), metadata=WITH_KEY)
    seen: list[str] = []
    with pytest.raises(grpc.RpcError) as caught:
        seen.extend(event.id for event in stream)
        raise AssertionError("the stream must not end well")
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_client_that_leaves_closes_the_servicers_generator(grpc_stub: Any, grpc_servicer: EchoQueue) -> None:
    grpc_servicer.closed.clear()
    stream = grpc_stub.WatchJob(queue_pb2.WatchJobRequest(job_id="long"), metadata=WITH_KEY)
    assert next(stream).id == "0"
    stream.cancel()
    assert grpc_servicer.closed.wait(50)


def test_idempotency_key_of_header_and_field(grpc_stub: Any) -> None:
    header = (*WITH_KEY, ("idempotency-key", "k1"))
    assert grpc_stub.CreateJob(job(), metadata=header).receipt.job_id.endswith(" k1")
    assert grpc_stub.CreateJob(job(request_id="k1"), metadata=header).receipt.job_id.endswith(" k1")
    error = refused(lambda: grpc_stub.CreateJob(job(request_id="k2"), metadata=header))
    assert str(error.details()).startswith("request_id: ")
    bad = (*WITH_KEY, ("idempotency-key", "two words"))
    assert str(refused(lambda: grpc_stub.CreateJob(job(), metadata=bad)).details()).startswith("Idempotency-Key: ")


def test_health_and_reflection(grpc_channel: grpc.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(grpc_channel)
    for service in ("", "fleet.v1.Queue"):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    database = ProtoReflectionDescriptorDatabase(grpc_channel)
    assert "fleet.v1.Queue" in database.get_services()
    file = database.FindFileContainingSymbol("fleet.v1.Queue")
    assert file.name == "fleet/v1/queue.proto"


def test_calls_are_counted_by_their_end(grpc_stub: Any, registry: CollectorRegistry) -> None:
    def count(code: str) -> float:
        labels = {"method": "/fleet.v1.Queue/GetJob", "code": code}
        return registry.get_sample_value("fleet_rpc_calls_total", labels) or 0.0

    before = count("NOT_FOUND")
    refused(lambda: grpc_stub.GetJob(queue_pb2.GetJobRequest(job_id="gone"), metadata=WITH_KEY))
    assert count("NOT_FOUND") == before + 1
