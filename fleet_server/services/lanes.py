"""Which line a job waits in: jobs of one lane can be run equally well by the same nodes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache

import orjson
from fleet.v1 import types_pb2

from fleet_server.domain.comfy import Need
from fleet_server.domain.fetching import NO_SHELF, Shelf, fetch_plan
from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeStatus, NodeView
from fleet_server.domain.placement import Refusal
from fleet_server.services.payloads import loras_of
from fleet_server.services.words import type_word

_ID_DIGITS = 16


def lane_of(spec: types_pb2.JobSpec) -> Lane:
    """The lane of a job. The id is the same on every replica and after every restart."""
    job_type, kind = type_word(spec.job_type), spec.payload.WhichOneof("kind")
    loras: tuple[str, ...] = ()
    needs: tuple[Need, ...] = ()
    engine = ""
    if kind == "custom":
        free = spec.payload.custom.fields
        engine = free["engine"].string_value if "engine" in free else ""
    elif kind == "workflow":
        found = spec.payload.workflow.needs
        needs = tuple(Need(one.class_type, one.input, _value(one.value_json)) for one in found)
    else:
        loras = tuple(sorted({lora.name for lora in loras_of(spec.payload)}))
    labels = tuple(sorted(spec.target_labels.items())) if spec.target_labels else ()
    return _lane(spec.target_cluster, job_type, spec.resolved_model, loras, spec.target_node_id, labels, needs, engine)


@lru_cache(maxsize=1_024)
def _lane(
    cluster: str,
    job_type: str,
    model: str,
    loras: tuple[str, ...],
    node_id: str,
    labels: tuple[tuple[str, str], ...],
    needs: tuple[Need, ...],
    engine: str,
) -> Lane:
    definition: tuple[object, ...] = (cluster, job_type, model, loras, node_id, labels)
    definition += (needs,) if needs else ()
    definition += (engine,) if engine else ()
    digest = hashlib.sha256(orjson.dumps(definition)).hexdigest()
    return Lane(
        lane_id=digest[:_ID_DIGITS],
        cluster=cluster,
        job_type=job_type,
        model=model,
        loras=loras,
        node_id=node_id,
        labels=labels,
        needs=needs,
        engine=engine,
    )


def _value(value_json: str) -> str | int | float | bool | None:
    value: str | int | float | bool | None = orjson.loads(value_json) if value_json else None
    return value


def serves(node: NodeView, lane: Lane, shelf: Shelf = NO_SHELF) -> bool:
    """Whether the node could run the lane's jobs, were it online and given work, if need be with files of `shelf`."""
    ready = node
    if node.status is not NodeStatus.ONLINE or node.cordoned or node.draining:
        ready = replace(node, status=NodeStatus.ONLINE, cordoned=False, draining=False)
    return not isinstance(fetch_plan(ready, lane, shelf), Refusal)
