"""What each call asks of a key: an ordinary one reads, submits, cancels, minds outputs; the rest is for admin keys."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from fleet.v1 import types_pb2
from google.api import annotations_pb2
from google.protobuf.descriptor import MethodDescriptor

from fleet_server.domain.errors import FleetError
from fleet_server.rpc.caller import Caller


class Scope(StrEnum):
    """The scopes of the contract."""

    READ = "read"
    SUBMIT = "submit"
    CANCEL = "cancel"
    OUTPUTS = "outputs"
    DEPLOY = "deploy"
    EXEC = "exec"
    ADMIN = "admin"


ORDINARY = frozenset({Scope.READ, Scope.SUBMIT, Scope.CANCEL, Scope.OUTPUTS})
"""The scopes of a key that is no admin's."""

ADMIN_JOB_TYPES = frozenset({types_pb2.JOB_TYPE_TRAINING, types_pb2.JOB_TYPE_CUSTOM})
"""Jobs that start containers of the caller's choice: they need the scope `deploy`."""

_METHODS: Mapping[Scope, str] = {
    Scope.SUBMIT: "Fleet.Generate Fleet.UploadInput Vision.Generate Vision.RerunOutput Queue.CreateJob "
    "Queue.BatchCreateJobs Queue.DryRunJob",
    Scope.CANCEL: "Queue.CancelJob Queue.RetryJob Queue.RedriveJobs Queue.Redeliver",
    Scope.OUTPUTS: "Vision.DeleteOutput Vision.UpdateOutput Fleet.SyncOutputs Fleet.CleanupOutputs Fleet.MoveOutputs",
    Scope.DEPLOY: "Fleet.DeployContainer Fleet.RemoveContainer Fleet.ScaleService Fleet.UpdateService "
    "Fleet.RollbackService Fleet.AutoscaleService",
    Scope.EXEC: "Fleet.Exec Fleet.ExecStream",
    Scope.ADMIN: "Queue.PauseQueue Queue.ResumeQueue Node.CreateNode Node.UpdateNode Node.DeleteNode Node.CordonNode "
    "Node.UncordonNode Node.DrainNode Node.CreateJoinToken Node.Connect Node.UploadOutput Node.ServeCommand "
    "Node.RelayCommand Node.ReadFile Node.Join Node.RenewCertificate "
    "Vision.LoadModel Vision.UnloadModel Vision.DownloadModel",
    # A POST for the sake of its body: it changes nothing.
    Scope.READ: "Fleet.Connect",
}
_SCOPES = {name: scope for scope, names in _METHODS.items() for name in names.split()}


def scope_of(method: MethodDescriptor) -> Scope:
    """The scope that a call needs: as in the table, `read` for what is a GET. Raises LookupError for one undecided."""
    name = f"{method.containing_service.name}.{method.name}"
    if name in _SCOPES:
        return _SCOPES[name]
    rule = method.GetOptions().Extensions[annotations_pb2.http]
    if rule.WhichOneof("pattern") == "get":
        return Scope.READ
    raise LookupError(f"{name} changes something and has no scope: decide in rpc/scopes.py")


def scope_missing(scope: Scope) -> FleetError:
    """The refusal of a key that may not."""
    return FleetError(
        "SCOPE_MISSING", f"the API key lacks the scope {scope}: use one that FLEET_API_KEYS_FILE marks as admin"
    )


def only_own(caller: Caller) -> str | None:
    """Whose jobs the caller may cancel or run again: None for everybody's."""
    return None if caller.admin else caller.owner


def check_job_type(job_type: int, *, admin: bool, field: str) -> None:
    """Raises SCOPE_MISSING where an ordinary key submits a job that starts a container."""
    if not admin and job_type in ADMIN_JOB_TYPES:
        word = types_pb2.JobType.Name(types_pb2.JobType.ValueType(job_type)).removeprefix("JOB_TYPE_").lower()
        raise FleetError("SCOPE_MISSING", f"{field}: {word} jobs need the scope deploy: use an admin key")
