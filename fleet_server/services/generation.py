"""Direct generation: a job like any other, whose caller waits for its picture."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import structlog
from fleet.v1 import fleet_pb2, types_pb2

from fleet_server.domain.errors import REASON_CODES, FleetError
from fleet_server.domain.fetching import NO_SHELF, Shelf, fetch_plan
from fleet_server.domain.job import JobRecord, JobState, Priority
from fleet_server.domain.placement import Refusal, feasible
from fleet_server.services.endings import Ending
from fleet_server.services.events import EventHub
from fleet_server.services.intake import Admitted, Intake, JobDefaults, idempotency
from fleet_server.services.lanes import lane_of
from fleet_server.services.outlook import may_ride
from fleet_server.services.ports import Attempts, Files, Line, Nodes
from fleet_server.services.rates import Rates
from fleet_server.services.shield import Shield
from fleet_server.services.views import JobViews
from fleet_server.store import Idempotency, JobStore

_log = structlog.get_logger("fleet.generation")
_LONGEST_CHAIN = 16


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """`queue_ttl_ms` ends a job that no caller waits for any more because the server died; `poll_seconds` is how long a
    caller relies on events alone; `cancel_seconds` bounds the cancelling for a caller who left."""

    queue_ttl_ms: int = 300_000
    timeout_ms: int = 300_000
    queued_jobs: int = 1_000_000
    poll_seconds: float = 5.0
    cancel_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Generated:
    """A picture and what made it. `resolved_model` is None unless the name asked for is an alias."""

    data: bytes
    content_type: str
    filename: str
    seed: int
    job_id: str
    resolved_model: str | None


class Generation:
    """Makes pictures for callers who wait."""

    def __init__(
        self,
        jobs: JobStore,
        intake: Intake,
        views: JobViews,
        hub: EventHub,
        nodes: Nodes,
        files: Files,
        dispatcher: Line,
        attempts: Attempts,
        rates: Rates,
        settings: GenerationSettings | None = None,
        *,
        shelf: Shelf = NO_SHELF,
    ) -> None:
        self._jobs = jobs
        self._intake = intake
        self._views = views
        self._hub = hub
        self._nodes = nodes
        self._files = files
        self._dispatcher = dispatcher
        self._attempts = attempts
        self._rates = rates
        self._shelf = shelf
        self._settings = settings or GenerationSettings()
        self._waiting: Counter[str] = Counter()
        self._shield = Shield()

    async def aclose(self) -> None:
        """Waits for submits and cancels under way."""
        await self._shield.aclose(self._settings.cancel_seconds)

    async def generate(self, request: fleet_pb2.FleetGenerateRequest, *, owner: str, key: str | None) -> Generated:
        """The picture. Cancelling this call cancels the job, unless another caller waits for it too.

        Raises what `Intake.image` and `JobStore.submit` do; NO_NODE at once where no online node could run it; and
        what the job failed with.
        """
        admitted = await self._intake.picture(
            request,
            owner=owner,
            priority=Priority.HIGH,
            direct=True,
            defaults=JobDefaults(timeout_ms=self._settings.timeout_ms, queue_ttl_ms=self._settings.queue_ttl_ms),
        )
        self._check_nodes(admitted.spec)
        once = idempotency(request, method="Fleet/Generate", owner=owner, key=key)
        own_id = admitted.job.job_id
        # Looked out for before it is submitted: no end is missed.
        with self._hub.expect_end(own_id) as ending:
            job_id = await self._submitted(admitted, once)
            async with self._caller(job_id):
                ended = await (self._ended(own_id, ending) if job_id == own_id else self._joined(job_id))
                return await self._picture(ended)

    def waiting(self, job_id: str) -> int:
        """How many callers of this replica wait for the job."""
        return self._waiting[job_id]

    def could_run(self, spec: types_pb2.JobSpec) -> bool:
        """Whether an online node could run such a job, if need be with files that it brings first."""
        lane = lane_of(spec)
        return any(not isinstance(fetch_plan(node, lane, self._shelf), Refusal) for node in self._nodes.online())

    async def status(self) -> fleet_pb2.GetGenerateStatusResponse:
        """Direct generations under way on this replica, and what a request sent now would find."""
        records = [record for record in await self._jobs.get_many(list(self._waiting)) if record is not None]
        records.sort(key=lambda record: (record.created_ms, record.job_id))
        reply = fleet_pb2.GetGenerateStatusResponse(jobs=await self._views.messages(records))
        reply.queued = sum(record.state is JobState.QUEUED for record in records)
        reply.running = sum(record.state is JobState.RUNNING for record in records)
        spec = self._default_spec()
        lane = lane_of(spec)
        able = [node for node in self._nodes.online() if feasible(node, lane) is None]
        reply.slots = sum(node.slots for node in able)
        reply.slots_free = sum(node.slots_free for node in able)
        if not able:
            reply.status = "unavailable"
            return reply
        reply.status = "ready" if reply.slots_free else "busy"
        run_ms = self._rates.run_ms(lane.lane_id)
        if run_ms is not None:
            waves = 1 + (0 if reply.slots_free else (reply.queued + 1) / max(1, reply.slots))
            reply.eta_seconds = round(run_ms * waves / 1000, 3)
        return reply

    def _default_spec(self) -> types_pb2.JobSpec:
        request = fleet_pb2.FleetGenerateRequest(prompt="x")
        try:
            admitted = self._intake.image(request, owner="", priority=Priority.HIGH, direct=True)
        except FleetError:
            # The default model is not there: no node can run a default request.
            return types_pb2.JobSpec(job_type=types_pb2.JOB_TYPE_IMAGE_GEN, target_cluster="vision", resolved_model="-")
        return admitted.spec

    def _check_nodes(self, spec: types_pb2.JobSpec) -> None:
        if not self.could_run(spec):
            what = f"the model {spec.resolved_model}" if spec.resolved_model else "this job type"
            raise FleetError(
                "NO_NODE",
                f"no online node can run {what} now: try again, or queue it by POST /api/vision/generate",
            )

    @asynccontextmanager
    async def _caller(self, job_id: str) -> AsyncIterator[None]:
        """Counts a caller who waits; when the last leaves before the end, the job is cancelled."""
        self._waiting[job_id] += 1
        try:
            yield
        except asyncio.CancelledError:
            if self._waiting[job_id] == 1:
                await self._leave(job_id)
            raise
        finally:
            self._waiting[job_id] -= 1
            if not self._waiting[job_id]:
                del self._waiting[job_id]

    async def _submitted(self, admitted: Admitted, once: Idempotency | None) -> str:
        """Submits the job, or joins the one that the same key made before; its id."""
        submit = self._shield.start(self._submit(admitted, once))
        try:
            return await asyncio.shield(submit)
        except asyncio.CancelledError:
            # The store may have it already or a moment from now: what comes of it has no caller.
            with contextlib.suppress(asyncio.CancelledError):
                await self._shield.run(self._cancel_after(submit))
            raise

    async def _cancel_after(self, submit: asyncio.Task[str]) -> None:
        with contextlib.suppress(FleetError):
            job_id = await submit
            if not self._waiting[job_id]:
                await self._cancel(job_id)

    async def _submit(self, admitted: Admitted, once: Idempotency | None) -> str:
        """The job to wait for. Failures are not remembered: an ended one without a picture gives way to a new one."""
        self._views.keep(admitted.job.job_id, admitted.spec)
        for _ in range(_LONGEST_CHAIN):
            jobs = [admitted.job]
            rides = may_ride(jobs) and self._dispatcher.rides()
            submitted = await self._jobs.submit(
                jobs,
                idempotency=once,
                limit=self._settings.queued_jobs,
                posted=partial(self._dispatcher.expect, jobs) if rides else None,
            )
            job_id = submitted.job_ids[0]
            if not submitted.replayed:
                if not rides:
                    self._dispatcher.wake()
                return job_id
            earlier = await self._jobs.get(job_id)
            if once is None or (earlier is not None and earlier.state not in (JobState.FAILED, JobState.CANCELLED)):
                return job_id
            # Keys of callers have no newline, so these are ours; every replica follows the same chain.
            once = replace(once, key=f"{once.key.partition(chr(10))[0]}\n{job_id}")
        raise FleetError("IDEMPOTENCY_KEY_REUSED", "request_id: too many tries with this key failed; use another")

    async def _joined(self, job_id: str) -> JobRecord:
        """The end of a job that an earlier call began, and that may be over."""
        with self._hub.expect_end(job_id) as ending:
            ending.tell()
            return await self._ended(job_id, ending)

    async def _ended(self, job_id: str, ending: Ending) -> JobRecord:
        while True:
            await ending.wait(self._settings.poll_seconds)
            record = ending.record or await self._jobs.get(job_id)
            if record is None:
                raise FleetError("INTERNAL", f"the job {job_id} was deleted while its caller waited")
            if record.state.ended:
                return record

    async def _leave(self, job_id: str) -> None:
        """Cancels a job whose caller has gone; bounded, and finished even if this is cancelled too."""
        with contextlib.suppress(asyncio.CancelledError):
            await self._shield.run(self._cancel(job_id))

    async def _cancel(self, job_id: str) -> None:
        try:
            async with asyncio.timeout(self._settings.cancel_seconds):
                record = await self._jobs.cancel(job_id)
                token = record.token or record.last_token
                if record.node_id and token:
                    await self._attempts.cancel_attempt(job_id, record.node_id, token)
        except TimeoutError:
            _log.warning("a generation could not be cancelled in time; its queue TTL ends it", job_id=job_id)
        except FleetError as error:
            # JOB_ENDED and JOB_NOT_FOUND are what was wanted; without the store its TTL ends it.
            if error.reason not in ("JOB_ENDED", "JOB_NOT_FOUND"):
                _log.warning("a generation could not be cancelled", job_id=job_id, detail=error.detail)

    async def _picture(self, record: JobRecord) -> Generated:
        if record.state is not JobState.SUCCEEDED:
            raise failure(record)
        spec = types_pb2.JobSpec.FromString(record.spec)
        outputs = types_pb2.JobResult.FromString(record.result).outputs
        if not outputs:
            raise FleetError("ENGINE_FAILED", f"job {record.job_id} ended without a picture: see the node's log")
        output = outputs[0]
        data = await self._files.read(output.filename)
        if data is None:
            raise FleetError("INTERNAL", f"the picture {output.filename} of job {record.job_id} is not on this server")
        alias = spec.HasField("resolved_model") and spec.resolved_model != spec.target_model
        return Generated(
            data=data,
            content_type=output.content_type,
            filename=output.filename,
            seed=output.seed if output.HasField("seed") else spec.payload.image_gen.seed,
            job_id=record.job_id,
            resolved_model=spec.resolved_model if alias else None,
        )


_OWN_ANSWERS = {"QUEUE_TTL_EXPIRED": "TIMEOUT", "NODE_LOST": "NO_NODE", "POISON": "ENGINE_FAILED"}
_PASSED_ON = frozenset(
    {"ENGINE_FAILED", "OUT_OF_MEMORY", "TIMEOUT", "DISK_FULL", "MODEL_NOT_FOUND", "LORA_NOT_FOUND", "INPUT_NOT_FOUND"}
)


def failure(record: JobRecord) -> FleetError:
    """What the caller of a job that brought no picture is told: a reason that the call documents."""
    if record.state is JobState.CANCELLED:
        return FleetError("JOB_ENDED", f"job {record.job_id} was cancelled by another call: send the request again")
    error = types_pb2.JobError.FromString(record.error)
    reason = _OWN_ANSWERS.get(error.reason, error.reason)
    if reason not in _PASSED_ON and reason != "NO_NODE":
        reason = "ENGINE_FAILED"
    detail = error.detail or "the job failed without saying why"
    return FleetError(reason, f"{detail} (job {record.job_id})", code=REASON_CODES[reason])
