"""What a job asks for, as a deploy of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import protovalidate
from fleet.transcode.v1 import options_pb2
from fleet.v1 import fleet_pb2, types_pb2
from google.protobuf import json_format

from fleet_agent.engines.base import EngineError, Task

PREFIX = "fleet-job-"
_validator = protovalidate.Validator()
_OWN = ("/inputs", "/outputs", "/checkpoints")


def payload_of(task: Task) -> types_pb2.ContainerPayload:
    """The fields of training; of custom they are judged here. Raises EngineError, naming the field."""
    fields = {name: value for name, value in task.fields.items() if value is not None and name != "engine"}
    payload: Any = types_pb2.ContainerPayload()
    try:
        json_format.ParseDict(fields, payload)
    except json_format.ParseError as error:
        raise EngineError("INVALID_FIELD", f"payload: {error}") from error
    for field in payload.DESCRIPTOR.fields:
        rules = field.GetOptions().Extensions[options_pb2.field]
        form = rules.WhichOneof("default")
        if form is not None and not payload.HasField(field.name):
            setattr(payload, field.name, getattr(rules, form))
    found = _validator.collect_violations(payload)
    if found:
        first = found[0].proto
        path = ".".join(str(element.field_name) for element in first.field.elements) if first.field else ""
        raise EngineError("INVALID_FIELD", f"payload.{path}: {first.message}")
    for index, mount in enumerate(payload.mounts):
        target = mount.removesuffix(":ro").rpartition(":")[2].rstrip("/")
        if any(target == own or target.startswith(f"{own}/") for own in _OWN):
            raise EngineError("INVALID_FIELD", f"payload.mounts[{index}]: {target} is the job's own folder")
    whole: types_pb2.ContainerPayload = payload
    return whole


def deploy_of(task: Task, payload: types_pb2.ContainerPayload) -> fleet_pb2.DeployContainerRequest:
    """The request that a deploy of this container would be: the same rules judge it."""
    request = fleet_pb2.DeployContainerRequest(
        image=payload.image,
        name=f"{PREFIX}{task.job_id}"[:63],
        gpus=payload.gpus,
        mounts=payload.mounts,
        restart_policy=types_pb2.RESTART_POLICY_NO,
        pull=types_pb2.PULL_POLICY_MISSING,
    )
    request.env.update(payload.env)
    request.env["FLEET_JOB_ID"] = task.job_id
    for name in ("command", "cpus", "memory_bytes"):
        if payload.HasField(name):
            setattr(request, name, getattr(payload, name))
    return request


def references(fields: Mapping[str, Any]) -> list[str]:
    """The references of `inputs`, in order."""
    return [str(one) for one in fields.get("inputs") or ()]
