"""Scopes: every call is decided about, and what an ordinary key may not do is refused before anything else."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from fleet.v1 import fleet_pb2, node_pb2, queue_pb2, types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.rpc.methods import methods_of
from fleet_server.rpc.scopes import ORDINARY, Scope, check_job_type, scope_of
from tests.rpc.conftest import ORDINARY_KEY

FILES = (fleet_pb2, vision_pb2, queue_pb2, node_pb2)
WITH_ORDINARY_KEY = (("x-api-key", ORDINARY_KEY),)


class _Anything:
    def __getattr__(self, name: str) -> Any:
        return None


def test_every_call_has_a_scope_and_no_reader_changes_anything() -> None:
    found = {
        method.path: method.scope
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in methods_of(service, _Anything())
    }
    assert len(found) > 60
    readers = {path.rpartition("/")[2] for path, scope in found.items() if scope is Scope.READ}
    assert all(name.startswith(("Get", "List", "Watch", "Stream", "Explain")) for name in readers - {"Connect"})
    assert found["/fleet.v1.Node/Connect"] is Scope.ADMIN
    assert found["/fleet.v1.Fleet/ExecStream"] is Scope.EXEC


@pytest.mark.parametrize(
    ("call", "scope"),
    [
        ("Queue.PauseQueue", Scope.ADMIN),
        ("Queue.ResumeQueue", Scope.ADMIN),
        ("Queue.RedriveJobs", Scope.CANCEL),
        ("Queue.DryRunJob", Scope.SUBMIT),
        ("Vision.DeleteOutput", Scope.OUTPUTS),
        ("Vision.LoadModel", Scope.ADMIN),
        ("Fleet.ScaleService", Scope.DEPLOY),
        ("Fleet.Exec", Scope.EXEC),
        ("Node.DrainNode", Scope.ADMIN),
    ],
)
def test_scopes_are_those_of_the_contract(call: str, scope: Scope) -> None:
    service, _, name = call.partition(".")
    services = {n: s for file in FILES for n, s in file.DESCRIPTOR.services_by_name.items()}
    assert scope_of(services[service].methods_by_name[name]) is scope


def test_an_ordinary_key_reads_and_submits_and_no_more(grpc_stub: Any) -> None:
    assert grpc_stub.GetStats(queue_pb2.GetStatsRequest(), metadata=WITH_ORDINARY_KEY).window_seconds == 7
    with pytest.raises(grpc.RpcError) as caught:
        grpc_stub.PauseQueue(queue_pb2.PauseQueueRequest(), metadata=WITH_ORDINARY_KEY)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "the API key lacks the scope admin" in (caught.value.details() or "")


def test_jobs_that_start_containers_are_for_admins() -> None:
    assert Scope.DEPLOY not in ORDINARY
    check_job_type(types_pb2.JOB_TYPE_TRAINING, admin=True, field="job_type")
    check_job_type(types_pb2.JOB_TYPE_IMAGE_GEN, admin=False, field="job_type")
    for job_type in (types_pb2.JOB_TYPE_TRAINING, types_pb2.JOB_TYPE_CUSTOM):
        with pytest.raises(FleetError, match=r"jobs\[1\].job_type: (training|custom) jobs need") as caught:
            check_job_type(job_type, admin=False, field="jobs[1].job_type")
        assert caught.value.reason == "SCOPE_MISSING"
