"""What the engine says of a swarm service, as messages."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fleet.v1 import types_pb2
from google.protobuf.timestamp_pb2 import Timestamp

Json = Mapping[str, Any]
SHORT = 12
"""Ids are shown as docker's own commands show them; the engine finds a service by the beginning of its id."""
_MODES = {
    "Replicated": "replicated",
    "Global": "global",
    "ReplicatedJob": "replicated_job",
    "GlobalJob": "global_job",
}
_OVER = frozenset({"shutdown", "remove"})
_FRACTION = re.compile(r"(\.\d{9})\d+")


def service_message(attrs: Json, tasks: Iterable[Json], hostnames: Mapping[str, str]) -> types_pb2.SwarmService:
    """A service with these of its tasks. A task's `node_id` is the swarm's here, `hostnames` is by those: only the
    server knows which of its nodes that is."""
    spec = attrs["Spec"]
    mode, detail = mode_of(spec)
    container = spec.get("TaskTemplate", {}).get("ContainerSpec") or {}
    found = [task_message(task, hostnames) for task in tasks]
    message = types_pb2.SwarmService(
        service_id=attrs["ID"][:SHORT],
        name=spec["Name"],
        image=image_name(container.get("Image", "")),
        mode=mode,
        replicas=detail.get("Replicas", 1) if mode == "replicated" else None,
        running_replicas=sum(task.status == "running" and task.desired_status == "running" for task in found),
        ports=[_port(port) for port in attrs.get("Endpoint", {}).get("Ports") or ()],
        labels=spec.get("Labels") or {},
        version=attrs["Version"]["Index"],
        tasks=sorted(found, key=_place),
    )
    update = attrs.get("UpdateStatus") or {}
    if update.get("State"):
        message.update.status, message.update.message = update["State"], update.get("Message", "")
        set_time(message.update.start_time, update.get("StartedAt"))
        set_time(message.update.end_time, update.get("CompletedAt"))
    set_time(message.create_time, attrs.get("CreatedAt"))
    set_time(message.update_time, attrs.get("UpdatedAt"))
    return message


def task_message(task: Json, hostnames: Mapping[str, str]) -> types_pb2.ServiceTask:
    """A task; see `service_message`."""
    status = task.get("Status") or {}
    container_id = (status.get("ContainerStatus") or {}).get("ContainerID")
    message = types_pb2.ServiceTask(
        task_id=task["ID"][:SHORT],
        slot=task.get("Slot") or None,
        node_id=task.get("NodeID") or None,
        hostname=hostnames.get(task.get("NodeID", "")),
        status=status.get("State", ""),
        desired_status=task.get("DesiredState", ""),
        image=image_name((task.get("Spec", {}).get("ContainerSpec") or {}).get("Image", "")),
        container_id=container_id[:SHORT] if container_id else None,
        error=status.get("Err") or None,
    )
    set_time(message.update_time, task.get("UpdatedAt"))
    return message


def mode_of(spec: Json) -> tuple[str, Json]:
    """`replicated`, `global` and the like, and what the spec says of it."""
    for name, detail in (spec.get("Mode") or {}).items():
        if name in _MODES:
            return _MODES[name], detail or {}
    return "replicated", {}


def image_name(image: str) -> str:
    """An image as a person wrote it: the digest to which the engine pinned a tag is left out."""
    name, at, _ = image.partition("@")
    return name if at and ":" in name.rpartition("/")[2] else image


def current(tasks: Sequence[Json]) -> list[Json]:
    """The tasks that stand for the service now: those that should run, and those that have not ended yet."""
    return [task for task in tasks if task.get("DesiredState") not in _OVER or _state(task) == "running"]


def by_service(tasks: Iterable[Json]) -> dict[str, list[Json]]:
    """Tasks by the whole id of their service."""
    found: dict[str, list[Json]] = {}
    for task in tasks:
        found.setdefault(task.get("ServiceID", ""), []).append(task)
    return found


def hostnames_of(nodes: Iterable[Json]) -> dict[str, str]:
    """Names of the swarm's machines by their ids in it."""
    return {node["ID"]: node.get("Description", {}).get("Hostname", "") for node in nodes}


def set_time(field: Timestamp, text: str | None) -> None:
    """Writes a time of the engine; one that is not given, or is the engine's zero, is left unset."""
    if text and not text.startswith("0001-"):
        with contextlib.suppress(ValueError):
            field.FromJsonString(_FRACTION.sub(r"\1", text))


def _state(task: Json) -> str:
    return str((task.get("Status") or {}).get("State", ""))


def _place(task: types_pb2.ServiceTask) -> tuple[int, str, int, str]:
    """By place, newest first in each."""
    newest = -task.update_time.ToNanoseconds()
    return task.slot, task.node_id if not task.slot else "", newest, task.task_id


def _port(port: Json) -> types_pb2.ServicePort:
    return types_pb2.ServicePort(
        port=port["TargetPort"],
        host_port=port.get("PublishedPort") or None,
        protocol=port.get("Protocol", "tcp"),
        publish_mode=port.get("PublishMode", "ingress"),
    )
