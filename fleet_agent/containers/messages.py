"""What the engine says of a container, as a message."""

from __future__ import annotations

import json
import shlex
import signal
from typing import Any

from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.swarm.messages import SHORT, Json, set_time

PREFIX = "fleet."
"""Labels of ours; callers give and see others alone."""
MANAGED = f"{PREFIX}node_id"
COMMAND = f"{PREFIX}command_id"
SPEC = f"{PREFIX}spec"

_STATUS = {
    word: types_pb2.ContainerStatus.Value(f"CONTAINER_STATUS_{word.upper()}")
    for word in ("created", "running", "paused", "restarting", "exited", "dead")
}
_POLICIES = {
    "": types_pb2.RESTART_POLICY_NO,
    "no": types_pb2.RESTART_POLICY_NO,
    "on-failure": types_pb2.RESTART_POLICY_ON_FAILURE,
    "always": types_pb2.RESTART_POLICY_ALWAYS,
    "unless-stopped": types_pb2.RESTART_POLICY_UNLESS_STOPPED,
}
POLICY_NAMES = {number: name for name, number in _POLICIES.items() if name}


def spec_label(request: fleet_pb2.DeployContainerRequest) -> str:
    """What of a request is shown later; neither values of its environment nor its login are in it."""
    kept: dict[str, Any] = {
        "image": request.image,
        "port": request.port if request.HasField("port") else None,
        "host_port": host_port(request),
        "mounts": list(request.mounts),
        "env": sorted(request.env),
        "command": request.command if request.HasField("command") else None,
    }
    return json.dumps(kept, separators=(",", ":"))


def host_port(request: fleet_pb2.DeployContainerRequest) -> int | None:
    """The port on the node; None where none is published."""
    if not request.HasField("port"):
        return None
    return request.host_port if request.HasField("host_port") else request.port


def container_message(node_id: str, attrs: Json, digest: str | None = None) -> types_pb2.Container:
    """A container as the engine describes it."""
    config, host, state = attrs.get("Config") or {}, attrs.get("HostConfig") or {}, attrs.get("State") or {}
    labels: dict[str, str] = config.get("Labels") or {}
    spec = _spec(labels, config, host)
    message = types_pb2.Container(
        node_id=node_id,
        name=attrs["Name"].removeprefix("/"),
        container_id=attrs["Id"][:SHORT],
        image=spec["image"],
        image_digest=digest or attrs.get("Image") or None,
        status=_STATUS.get(state.get("Status", ""), types_pb2.CONTAINER_STATUS_UNSPECIFIED),
        port=spec["port"],
        host_port=spec["host_port"],
        gpus=any("gpu" in (words or ()) for one in host.get("DeviceRequests") or () for words in one["Capabilities"]),
        mounts=spec["mounts"],
        env_names=spec["env"],
        labels={name: text for name, text in labels.items() if not name.startswith(PREFIX)},
        command=spec["command"],
        restart_policy=_POLICIES.get((host.get("RestartPolicy") or {}).get("Name", ""), types_pb2.RESTART_POLICY_NO),
        restart_count=attrs.get("RestartCount", 0),
        managed=MANAGED in labels,
    )
    set_time(message.create_time, attrs.get("Created"))
    set_time(message.start_time, state.get("StartedAt"))
    if state.get("Status") in ("exited", "dead"):
        set_time(message.end_time, state.get("FinishedAt"))
        message.exit.CopyFrom(exit_of(state))
    return message


def exit_of(state: Json) -> types_pb2.Exit:
    """How a container ended."""
    code = state.get("ExitCode", 0)
    return types_pb2.Exit(exit_code=code, signal=signal_of(code), oom_killed=bool(state.get("OOMKilled")))


def signal_of(exit_code: int) -> str | None:
    """The signal that an exit code above 128 stands for, by the habit of shells."""
    try:
        return signal.Signals(exit_code - 128).name if exit_code > 128 else None
    except ValueError:
        return None


def _spec(labels: Json, config: Json, host: Json) -> dict[str, Any]:
    """As it was asked for; of what others started, as far as the engine tells."""
    try:
        kept = json.loads(labels[SPEC])
        return {name: kept[name] for name in ("image", "port", "host_port", "mounts", "env", "command")}
    except (KeyError, ValueError, TypeError):
        pass
    port, host_port = None, None
    for name, bound in (host.get("PortBindings") or {}).items():
        port = int(name.partition("/")[0])
        host_port = int(bound[0].get("HostPort") or 0) or None if bound else None
        break
    return {
        "image": config.get("Image", ""),
        "port": port,
        "host_port": host_port,
        "mounts": [*(host.get("Binds") or ()), *(_mount(one) for one in host.get("Mounts") or ())],
        "env": sorted(text.partition("=")[0] for text in config.get("Env") or ()),
        "command": shlex.join(config["Cmd"]) if config.get("Cmd") else None,
    }


def _mount(mount: Json) -> str:
    words = f"{mount.get('Source', '')}:{mount.get('Target', '')}"
    return f"{words}:ro" if mount.get("ReadOnly") else words


def stats_message(before: Json, after: Json) -> types_pb2.ContainerStats:
    """What a container used between two readings."""
    cpu, system = _cpu(after) - _cpu(before), _system(after) - _system(before)
    memory = after.get("memory_stats") or {}
    detail = memory.get("stats") or {}
    cached = detail.get("inactive_file", detail.get("total_inactive_file", 0))
    networks = (after.get("networks") or {}).values()
    return types_pb2.ContainerStats(
        cpu_percent=round(100 * cpu / system, 2) if system > 0 and cpu > 0 else 0.0,
        memory_used_bytes=max(0, memory.get("usage", 0) - cached),
        memory_limit_bytes=memory.get("limit") or None,
        network_receive_bytes=sum(one.get("rx_bytes", 0) for one in networks),
        network_transmit_bytes=sum(one.get("tx_bytes", 0) for one in networks),
    )


def _cpu(reading: Json) -> int:
    used: int = ((reading.get("cpu_stats") or {}).get("cpu_usage") or {}).get("total_usage", 0)
    return used


def _system(reading: Json) -> int:
    """Of all CPUs together."""
    used: int = (reading.get("cpu_stats") or {}).get("system_cpu_usage", 0)
    return used
