"""What a Docker engine's refusal means to a caller."""

from __future__ import annotations

import re

from docker.errors import APIError

from fleet_agent.commands.faults import CommandFault

_FIELD = "INVALID_FIELD"
_RULES: tuple[tuple[str, str, str], ...] = (
    # What the engine says, the reason, and how the detail begins.
    (
        r"could not select device driver|nvidia-container-cli|unknown runtime specified nvidia",
        "GPU_UNAVAILABLE",
        "gpus",
    ),
    (r"port is already allocated|address already in use", "PORT_IN_USE", "host_port"),
    (r"container name .* is already in use", "NAME_IN_USE", "name"),
    (r"no space left on device", "DISK_FULL", "the node's disk is full"),
    (r"bind source path does not exist|invalid mount config", _FIELD, "mounts"),
    (r"invalid reference format", _FIELD, "image"),
    (r"no command specified|executable file not found|exec format error", _FIELD, "command"),
    (r"(runc|oci runtime).*(no such file or directory|permission denied)", _FIELD, "command"),
    (r"range of cpus|nanocpus|cpu", _FIELD, "cpus"),
    (r"memory", _FIELD, "memory_bytes"),
)
_PULL_RULES: tuple[tuple[str, str, str], ...] = (
    (r"invalid reference format", _FIELD, "image"),
    (
        r"no basic auth credentials|incorrect username or password|unauthorized: authentication required",
        _FIELD,
        "registry_auth",
    ),
    (
        r"not found|manifest unknown|does not exist|access denied|no matching manifest|unauthorized",
        "IMAGE_NOT_FOUND",
        "image",
    ),
    (r"no space left on device", "DISK_FULL", "the node's disk is full"),
)


def refused(error: APIError) -> CommandFault:
    """Of creating, starting and everything but pulling."""
    return _judged(words_of(error), _RULES) or CommandFault(
        _FIELD if error.status_code == 400 else "DOCKER_UNAVAILABLE", f"the Docker engine refuses it: {words_of(error)}"
    )


def pull_refused(image: str, words: str) -> CommandFault:
    """Of pulling an image."""
    fault = _judged(words, _PULL_RULES)
    if fault is not None:
        return fault
    return CommandFault("REGISTRY_UNAVAILABLE", f"image: {image} could not be pulled: {words}")


def gone(name: str) -> CommandFault:
    """There is no such container."""
    return CommandFault(
        "CONTAINER_NOT_FOUND", f"container_name: there is no container {name!r} on the node; see GET /api/fleet/deploy"
    )


def words_of(error: APIError) -> str:
    """The engine's own words, in one line."""
    return " ".join(str(error.explanation or error).split())[:1000]


def _judged(words: str, rules: tuple[tuple[str, str, str], ...]) -> CommandFault | None:
    for pattern, reason, field in rules:
        if re.search(pattern, words, re.IGNORECASE):
            return CommandFault(reason, f"{field}: {words}")
    return None
