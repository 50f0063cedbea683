"""What a submit becomes: a request judged, its payload typed, its model resolved, its lane found. Stores nothing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fleet.v1 import queue_pb2, types_pb2
from google.protobuf.message import Message

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.domain.job import NewJob, Priority
from fleet_server.services.callbacks import CallbackRules, check_callback
from fleet_server.services.graphs import Graphs
from fleet_server.services.groups import split
from fleet_server.services.lanes import lane_of
from fleet_server.services.models import ModelCatalog
from fleet_server.services.payloads import PayloadReader, loras_of, model_of, references_of
from fleet_server.services.ports import Nodes
from fleet_server.services.references import References, inputs_of
from fleet_server.services.refusals import join, refused
from fleet_server.services.words import DEFAULT_CLUSTERS, priority_number, priority_of, type_word
from fleet_server.store import Idempotency

_FARTHEST_MS = 30 * 86_400_000
_A_DAY_MS = 86_400_000
_JOB_ID = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True, slots=True)
class Admitted:
    """A job that may be stored, with its spec as the store keeps it."""

    job: NewJob
    spec: types_pb2.JobSpec
    children: tuple[Admitted, ...] = ()
    """The images of a group, in order."""

    @property
    def all(self) -> tuple[Admitted, ...]:
        """It and its children."""
        return (self, *self.children)

    @property
    def callback(self) -> bool:
        return self.spec.HasField("callback_url")


@dataclass(frozen=True, slots=True)
class JobDefaults:
    """What a call that does not say so means; the values of CreateJobRequest."""

    max_retries: int = 3
    timeout_ms: int = 3_600_000
    queue_ttl_ms: int = 604_800_000


@dataclass(frozen=True, slots=True)
class Intake:
    """Judges submits. `new_id` mints job ids, `clock` gives Unix ms; `refusal` says why no work is taken now."""

    payloads: PayloadReader
    catalog: ModelCatalog
    nodes: Nodes
    references: References
    new_id: Callable[[], str]
    clock: Callable[[], int]
    callbacks: CallbackRules = field(default_factory=CallbackRules)
    defaults: JobDefaults = field(default_factory=JobDefaults)
    refusal: Callable[[], FleetError | None] = lambda: None
    graphs: Graphs | None = None

    def _check_open(self) -> None:
        refusal = self.refusal()
        if refusal is not None:
            raise refusal

    async def job(self, request: queue_pb2.CreateJobRequest, *, owner: str, path: str = "") -> Admitted:
        """A queued job. Defaults are filled in and the proto's rules held already, as every call's are.

        Raises INVALID_FIELD, UNKNOWN_FIELD, CALLBACK_FORBIDDEN, NODE_NOT_FOUND, MODEL_NOT_FOUND, LORA_NOT_FOUND,
        INPUT_NOT_FOUND, JOB_NOT_FOUND (an id in `after` that can be none); each names the field below
        `path`. Whether the jobs of `after` are there the store says at the submit.
        """
        self._check_open()
        after = _parents(request.after, path)
        if request.HasField("callback_url"):
            check_callback(request.callback_url, self.callbacks, field=join(path, "callback_url"))
        if request.HasField("target_node_id") and self.nodes.node(request.target_node_id) is None:
            words = f"there is no node {request.target_node_id!r}; see GET /api/nodes"
            raise refused("NODE_NOT_FOUND", join(path, "target_node_id"), words)
        schedule_ms = self._schedule(request, path)
        payload_path = join(path, "payload")
        workflow = request.workflow_json if request.HasField("workflow_json") else None
        payload = self.payloads.read(request.job_type, request.payload, path=payload_path, workflow=workflow)
        if workflow is not None and self.graphs is not None:
            await self.graphs.complete(payload.workflow, owner=owner, path=join(payload_path, "workflow"))
        for reference_path, reference in references_of(payload, path=payload_path):
            await self.references.check(reference, path=reference_path, after=after)
        spec = types_pb2.JobSpec(
            job_type=request.job_type,
            payload=payload,
            priority=request.priority,
            target_cluster=request.target_cluster or DEFAULT_CLUSTERS[type_word(request.job_type)],
            target_labels=request.target_labels,
            after=after,
            exclusive=request.exclusive,
        )
        if request.HasField("target_node_id"):
            spec.target_node_id = request.target_node_id
        if request.HasField("callback_url"):
            spec.callback_url = request.callback_url
        return self._admitted(
            spec,
            owner,
            payload_path,
            JobDefaults(request.max_retries, request.timeout_seconds * 1000, request.queue_ttl_seconds * 1000),
            schedule_ms,
        )

    def graph(self, payload: types_pb2.WorkflowPayload, *, owner: str, job_id: str, priority: Priority) -> Admitted:
        """A prompt of a ComfyUI client, its graph judged already; without `job_id` it gets one. Raises what `refusal`
        says."""
        self._check_open()
        spec = types_pb2.JobSpec(
            job_type=types_pb2.JOB_TYPE_IMAGE_GEN,
            payload=types_pb2.Payload(workflow=payload),
            priority=priority_number(priority),
            target_cluster=DEFAULT_CLUSTERS["image_gen"],
        )
        return self._job(spec, owner, replace(self.defaults, timeout_ms=_A_DAY_MS), None, job_id)

    async def picture(
        self,
        request: Message,
        *,
        owner: str,
        priority: Priority,
        direct: bool = False,
        defaults: JobDefaults | None = None,
    ) -> Admitted:
        """As `image`, the files that it refers to looked for as well."""
        admitted = self.image(request, owner=owner, priority=priority, direct=direct, defaults=defaults)
        for path, reference in references_of(admitted.spec.payload, path=""):
            await self.references.check(reference, path=path)
        return admitted

    async def again(self, spec: types_pb2.JobSpec, *, owner: str) -> Admitted:
        """A job that was admitted before, its payload complete. Raises as `job` does."""
        self._check_open()
        for path, reference in references_of(spec.payload, path=""):
            await self.references.check(reference, path=path)
        return self._admitted(spec, owner, "", self.defaults, None)

    def image(
        self,
        request: Message,
        *,
        owner: str,
        priority: Priority,
        direct: bool = False,
        defaults: JobDefaults | None = None,
    ) -> Admitted:
        """A job of a call that has the image fields itself. Raises as `job` does."""
        self._check_open()
        spec = types_pb2.JobSpec(
            job_type=types_pb2.JOB_TYPE_IMAGE_GEN,
            payload=self.payloads.image(request),
            priority=priority_number(priority),
            target_cluster=DEFAULT_CLUSTERS["image_gen"],
            direct=direct,
        )
        return self._admitted(spec, owner, "", defaults or self.defaults, None)

    def _admitted(
        self,
        spec: types_pb2.JobSpec,
        owner: str,
        path: str,
        limits: JobDefaults,
        schedule_ms: int | None,
    ) -> Admitted:
        if spec.payload.HasField("workflow"):
            # Its models are values of its graph.
            return self._job(spec, owner, limits, schedule_ms)
        job_type = type_word(spec.job_type)
        resolution = self.catalog.resolve(model_of(spec.payload), job_type, path=join(path, "model"))
        self.catalog.check_loras((lora.name for lora in loras_of(spec.payload)), job_type, path=join(path, "loras"))
        if resolution.target is not None:
            spec.target_model = resolution.target
            kind = spec.payload.WhichOneof("kind")
            if kind is not None:
                getattr(spec.payload, kind).model = resolution.target
        if resolution.resolved is not None:
            spec.resolved_model = resolution.resolved
        admitted = self._job(spec, owner, limits, schedule_ms)
        images = spec.payload.image_gen.n
        if images < 2:
            return admitted
        group, children = split(spec, admitted.job.job_id, [self.new_id() for _ in range(images)])
        rest = limits, schedule_ms
        return replace(
            self._job(group, owner, *rest, job_id=admitted.job.job_id),
            children=tuple(
                self._job(child, owner, *rest, job_id=job_id)
                for child, job_id in zip(children, group.child_job_ids, strict=True)
            ),
        )

    def _job(
        self, spec: types_pb2.JobSpec, owner: str, limits: JobDefaults, schedule_ms: int | None, job_id: str = ""
    ) -> Admitted:
        job = NewJob(
            job_id=job_id or self.new_id(),
            spec=spec.SerializeToString(),
            lane=lane_of(spec),
            priority=priority_of(spec.priority),
            owner=owner,
            max_retries=limits.max_retries,
            timeout_ms=limits.timeout_ms,
            queue_ttl_ms=limits.queue_ttl_ms,
            schedule_ms=schedule_ms,
            after=tuple(spec.after),
            group_job_id=spec.group_job_id,
            child_job_ids=tuple(spec.child_job_ids),
            exclusive=spec.exclusive,
            inputs=inputs_of(spec.payload),
        )
        return Admitted(job, spec)

    def _schedule(self, request: queue_pb2.CreateJobRequest, path: str) -> int | None:
        if not request.HasField("schedule_time"):
            return None
        at = request.schedule_time.ToMilliseconds()
        now = self.clock()
        if at > now + _FARTHEST_MS:
            raise invalid_field(join(path, "schedule_time"), "must be at most 30 days ahead")
        return at if at > now else None


def _parents(after: Sequence[str], path: str) -> tuple[str, ...]:
    """The ids of `after`, each once."""
    for index, job_id in enumerate(after):
        if not _JOB_ID.fullmatch(job_id):
            raise refused("JOB_NOT_FOUND", join(path, f"after[{index}]"), f"no job has the id {job_id!r}")
    return tuple(dict.fromkeys(after))


def idempotency(request: Any, *, method: str, owner: str, key: str | None) -> Idempotency | None:
    """What makes this call repeatable: its key and a hash of its content. None where no key is given."""
    if key is None:
        return None
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField("request_id")
    fingerprint = hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()
    return Idempotency(owner, method, key, fingerprint)
