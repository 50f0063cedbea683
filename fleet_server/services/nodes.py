"""A node as its agent describes it, as the store keeps it, as placement sees it and as callers read it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from urllib.parse import unquote

from fleet.v1.node_pb2 import AgentHeartbeat, Hello, LoadableModels, LoadedFile, ModelFile
from fleet.v1.types_pb2 import Gpu, Heartbeat, MetricsSource, NodeDrain, NodeInfo, Transport
from fleet.v1.types_pb2 import NodeStatus as StatusNumber
from google.protobuf.timestamp_pb2 import Timestamp

from fleet_server.domain.node import CLUSTER_OF_TYPE, Loadable, LoadedView, ModelView, NodeStatus, NodeView
from fleet_server.services.words import type_number, type_word
from fleet_server.store import NodeRow

READY = "ready"
"""Status of an engine that takes work."""

_DOCKER = ("docker_version", "swarm_role", "swarm_node_id")
"""What a heartbeat says of the node's Docker engine, which may come, go, and join a swarm."""
_SAME_SECONDS = 1.0
"""Ages that differ by less are of the same moment: beats travel."""

_NUMBERS = {
    NodeStatus.ONLINE: StatusNumber.NODE_STATUS_ONLINE,
    NodeStatus.DISCONNECTED: StatusNumber.NODE_STATUS_DISCONNECTED,
    NodeStatus.DOWN: StatusNumber.NODE_STATUS_DOWN,
}


def now_ms() -> int:
    """Unix time in ms by this machine's clock; for display and for ages, never for leases."""
    return time.time_ns() // 1_000_000


def set_time(field: Timestamp, ms: int) -> None:
    """Writes Unix ms into a Timestamp; 0 leaves it unset."""
    if ms:
        field.FromMilliseconds(ms)


def description_of(hello: Hello) -> bytes:
    """What the store keeps as `info`: the Hello without what changes by itself. Equal descriptions are equal bytes."""
    kept = Hello()
    kept.CopyFrom(hello)
    for name in ("held", "spooled", "now", "host", "gpus", "metrics_source", "warnings", "instance_id"):
        kept.ClearField(name)
    for loaded in kept.loaded_models:
        loaded.ClearField("loaded_seconds_ago")
        loaded.ClearField("used_seconds_ago")
    return kept.SerializeToString(deterministic=True)


def with_inventory(hello: Hello, beat: AgentHeartbeat, elapsed: float) -> Hello:
    """The description after a heartbeat: loaded models always, files and engines where the beat names them.

    `hello` itself where nothing has changed, `elapsed` seconds being the time since it was made: most beats say nothing
    new, and who sees the same object need not look.
    """
    same_docker = all(getattr(beat, name) == getattr(hello, name) for name in _DOCKER)
    same = not beat.inventory and beat.slots == hello.slots and same_docker
    if same and _same_loaded(hello.loaded_models, beat, elapsed):
        return hello
    changed = Hello()
    changed.CopyFrom(hello)
    changed.slots = beat.slots
    for name in _DOCKER:
        setattr(changed, name, getattr(beat, name))
    changed.ClearField("loaded_models")
    changed.loaded_models.extend(beat.loaded_models)
    if beat.inventory:
        changed.ClearField("models")
        changed.models.extend(beat.models)
        changed.ClearField("engines")
        changed.engines.extend(beat.engines)
    return changed


def _same_loaded(before: Sequence[LoadedFile], beat: AgentHeartbeat, elapsed: float) -> bool:
    """Whether the same models are in memory and none was loaded or used since."""
    now = beat.loaded_models
    return len(before) == len(now) and all(
        old.name == new.name
        and old.engine == new.engine
        and old.memory_bytes == new.memory_bytes
        and old.gpu_index == new.gpu_index
        and abs(new.used_seconds_ago - old.used_seconds_ago - elapsed) < _SAME_SECONDS
        and abs(new.loaded_seconds_ago - old.loaded_seconds_ago - elapsed) < _SAME_SECONDS
        and old.loras == new.loras
        and old.pinned == new.pinned
        for old, new in zip(before, now, strict=True)
    )


def beat_of(hello: Hello) -> AgentHeartbeat:
    """A Hello read as the first heartbeat."""
    return AgentHeartbeat(
        host=hello.host if hello.HasField("host") else None,
        gpus=hello.gpus,
        metrics_source=hello.metrics_source,
        warnings=hello.warnings,
        slots=hello.slots,
        slots_free=max(0, hello.slots - len(hello.held)),
        held=hello.held,
        loaded_models=hello.loaded_models,
        now=hello.now if hello.HasField("now") else None,
    )


def job_types_of(hello: Hello) -> frozenset[str]:
    """Words of the job types that the ready engines run."""
    return frozenset(
        type_word(number) for engine in hello.engines if engine.status == READY for number in engine.job_types if number
    )


def view_of(
    hello: Hello,
    *,
    status: NodeStatus,
    session: str = "",
    facts: NodeRow | None = None,
    slots_free: int = 0,
    gpus: Iterable[Gpu] = (),
) -> NodeView:
    """The node for placement; `facts` is the row with what operators decided of it."""
    job_types = job_types_of(hello)
    at = now_ms()
    return NodeView(
        node_id=hello.node_id,
        status=status,
        cordoned=facts is not None and facts.cordoned,
        draining=facts is not None and facts.draining,
        clusters=clusters_of(hello, facts),
        job_types=job_types,
        engines=frozenset(engine.name for engine in hello.engines if engine.status == READY),
        labels=labels_of(hello, facts),
        slots=hello.slots,
        slots_free=slots_free,
        models={model.name: _model(model) for model in hello.models},
        loaded=tuple(_loaded(loaded, at) for loaded in hello.loaded_models),
        session=session,
        gpu_memory_bytes=gpu_memory(gpus),
        loadable=tuple(_loadable(one) for one in hello.intake.loadable),
        largest_file_bytes=hello.intake.most_bytes,
    )


def clusters_of(hello: Hello, facts: NodeRow | None) -> frozenset[str]:
    """The clusters that it serves: as an operator said, else as the agent says, else those of its job types."""
    if facts is not None and facts.clusters is not None:
        return frozenset(facts.clusters)
    return frozenset(hello.clusters) or frozenset(CLUSTER_OF_TYPE[word] for word in job_types_of(hello))


def labels_of(hello: Hello, facts: NodeRow | None) -> dict[str, str]:
    """Its labels: as an operator said, else as the agent says."""
    if facts is not None and facts.labels is not None:
        return dict(facts.labels)
    return dict(hello.labels)


def drain_of(row: NodeRow) -> NodeDrain | None:
    """How far its drain is, None where there is none."""
    if not row.draining:
        return None
    drain = NodeDrain(remaining_jobs=row.drain_jobs, remaining_containers=row.drain_left, done=row.drain_done)
    set_time(drain.start_time, row.drain_start_ms)
    set_time(drain.deadline_time, row.drain_deadline_ms)
    return drain


def gpu_memory(gpus: Iterable[Gpu]) -> int | None:
    """Memory of the largest GPU, None where none was reported."""
    return max((gpu.memory_total_bytes for gpu in gpus if gpu.HasField("memory_total_bytes")), default=None)


def info_of(row: NodeRow) -> NodeInfo:
    """The node as callers read it, from a row of the store or of a node_update event."""
    hello = Hello.FromString(row.info)
    status = NodeStatus(row.status)
    beat = Heartbeat.FromString(row.heartbeat)
    info = NodeInfo(
        node_id=row.node_id,
        hostname=hello.hostname,
        transport=Transport.TRANSPORT_SSH if row.ssh else Transport.TRANSPORT_AGENT,
        status=_NUMBERS[status],
        cordoned=row.cordoned,
        drain=drain_of(row),
        clusters=sorted(clusters_of(hello, row)),
        labels=labels_of(hello, row),
        os=hello.os,
        arch=hello.arch,
        agent_version=hello.agent_version or None,
        docker_version=hello.docker_version or None,
        swarm_role=hello.swarm_role or None,
        job_types=sorted(type_number(word) for word in job_types_of(hello)),
        engines=hello.engines,
        slots=hello.slots,
        slots_free=beat.slots_free,
        running_job_ids=beat.running_job_ids,
        loaded_models=[loaded.name for loaded in hello.loaded_models],
        host=beat.host if beat.HasField("host") else None,
        gpus=beat.gpus,
        metrics_source=beat.metrics_source or MetricsSource.METRICS_SOURCE_NONE,
        warnings=beat.warnings,
    )
    set_time(info.create_time, row.created_ms)
    set_time(info.connect_time, row.connect_ms)
    set_time(info.heartbeat_time, row.heartbeat_ms)
    set_time(info.update_time, row.updated_ms)
    return info


def heartbeat_of(node_id: str, beat: AgentHeartbeat, *, at_ms: int, slots_free: int) -> Heartbeat:
    """A beat as callers read it and as the store keeps the last one."""
    heartbeat = Heartbeat(
        node_id=node_id,
        status=StatusNumber.NODE_STATUS_ONLINE,
        slots=beat.slots,
        slots_free=slots_free,
        running_job_ids=[held.job_id for held in beat.held],
        loaded_models=[loaded.name for loaded in beat.loaded_models],
        host=beat.host if beat.HasField("host") else None,
        gpus=beat.gpus,
        metrics_source=beat.metrics_source or MetricsSource.METRICS_SOURCE_NONE,
        warnings=beat.warnings,
    )
    set_time(heartbeat.heartbeat_time, at_ms)
    return heartbeat


def status_number(status: NodeStatus) -> StatusNumber.ValueType:
    """NODE_STATUS_ONLINE for NodeStatus.ONLINE."""
    return _NUMBERS[status]


def address_of(peer: str) -> str:
    """The address in grpc's name of a peer (`ipv4:10.0.0.7:4711`, `ipv6:[::1]:4711`); "" where it has none."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return ""
    return rest.rpartition(":")[0].strip("[]")


def _model(model: ModelFile) -> ModelView:
    return ModelView(
        name=model.name,
        kind=model.kind or "checkpoint",
        size_bytes=model.size_bytes,
        sha256=model.sha256,
        architecture=model.architecture,
        format=model.format,
        trigger_words=tuple(model.trigger_words),
        job_types=tuple(type_word(number) for number in model.job_types if number),
        engine=model.engine,
    )


def _loaded(loaded: LoadedFile, at_ms: int) -> LoadedView:
    return LoadedView(
        name=loaded.name,
        engine=loaded.engine,
        gpu_index=loaded.gpu_index if loaded.HasField("gpu_index") else None,
        memory_bytes=loaded.memory_bytes,
        loras=tuple(loaded.loras),
        load_ms=at_ms - int(loaded.loaded_seconds_ago * 1000),
        used_ms=at_ms - int(loaded.used_seconds_ago * 1000),
        pinned=loaded.pinned,
        pixel_steps_per_second=(loaded.pixel_steps_per_second if loaded.HasField("pixel_steps_per_second") else None),
    )


def _loadable(one: LoadableModels) -> Loadable:
    job_types = tuple(type_word(number) for number in one.job_types if number)
    return Loadable(one.engine, tuple(one.architectures), job_types)
