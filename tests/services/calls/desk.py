"""The callers' side put together on a real store, files and views; an agent's steps are taken through the store."""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fleet.v1 import node_pb2, queue_pb2, types_pb2
from google.protobuf.message import Message
from PIL import Image
from uuid_utils import uuid7

from fleet_server.domain.job import Claim, JobRecord, NewJob
from fleet_server.domain.placement import feasible
from fleet_server.filing import Filing
from fleet_server.protojson import JsonCodec, apply_defaults
from fleet_server.rpc.validation import validate
from fleet_server.services.callbacks import CallbackRules
from fleet_server.services.dead import DeadLetters, DeadSettings
from fleet_server.services.endings import Endings
from fleet_server.services.estimates import Estimates
from fleet_server.services.events import EventHub, EventSettings
from fleet_server.services.explain import Explainer
from fleet_server.services.fleet import FleetView
from fleet_server.services.gallery import Gallery
from fleet_server.services.generation import Generation, GenerationSettings
from fleet_server.services.intake import Intake
from fleet_server.services.models import CatalogSettings, ModelCatalog
from fleet_server.services.nodes import beat_of, description_of
from fleet_server.services.pauses import Pauses
from fleet_server.services.payloads import PayloadReader
from fleet_server.services.progress import ProgressHub
from fleet_server.services.queue import JobQueue, QueueSettings
from fleet_server.services.rates import Rates
from fleet_server.services.speeds import Speeds
from fleet_server.services.status import StatusBoard, StatusSettings
from fleet_server.services.views import JobViews
from fleet_server.settings import Settings
from fleet_server.storage.outputs import LocalOutputs
from fleet_server.storage.s3 import S3Store
from fleet_server.store import ClaimRequest, OutputRow, Store
from tests.services.calls.rounds import DeskRounds
from tests.waiting import wait_until

M = TypeVar("M", bound=Message)
ALIAS = "SDXL_4GB_FP8.safetensors"
CODEC = JsonCodec()
STATUS = StatusSettings("1.0.0", store_seconds=50)
"""A store that stands still for seconds is not away."""
_numbers = itertools.count(1)


def asked(kind: type[M], /, **fields: Any) -> M:
    """A request from JSON fields, with defaults filled in and rules held: as `invoke` hands it over."""
    request = kind()
    CODEC.decode_into(request, fields)
    apply_defaults(request)
    validate(request)
    return request


def picture(width: int = 64, height: int = 48, color: str = "red", kind: str = "PNG") -> bytes:
    """A real picture."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), color).save(out, kind)
    return out.getvalue()


class Bell:
    """Stands where dispatch stands: counts how often it was woken, and notes the attempts to stop."""

    def __init__(self) -> None:
        self.rung = 0
        self.stopped: list[tuple[str, str, str]] = []
        self.on_ring: Callable[[], None] = lambda: None

    def wake(self) -> None:
        self.rung += 1
        self.on_ring()

    def expect(self, jobs: Sequence[NewJob]) -> None:
        self.wake()

    def rides(self) -> bool:
        return False

    async def cancel_attempt(self, job_id: str, node_id: str, token: str) -> None:
        self.stopped.append((job_id, node_id, token))


@dataclass
class Desk:
    """Everything a caller reaches."""

    store: Store
    nodes: FleetView
    ticks: ProgressHub
    bell: Bell
    catalog: ModelCatalog
    views: JobViews
    rates: Rates
    hub: EventHub
    pauses: Pauses
    dead: DeadLetters
    queue: JobQueue
    generation: Generation
    files: LocalOutputs
    filing: Filing
    gallery: Gallery
    board: StatusBoard
    endings: Endings
    explainer: Explainer
    speeds: Speeds
    estimates: Estimates
    sessions: dict[str, str] = field(default_factory=dict)

    async def add_node(
        self,
        node_id: str = "agx0",
        *,
        models: Sequence[str] = ("sketch",),
        loras: Sequence[str] = (),
        loaded: Sequence[str] = (),
        job_types: Sequence[types_pb2.JobType.ValueType] = (types_pb2.JOB_TYPE_IMAGE_GEN,),
        slots: int = 1,
        **more: Any,
    ) -> None:
        """Connects a node as an agent with one engine would."""
        files = [
            node_pb2.ModelFile(name=name, kind="checkpoint", size_bytes=7, architecture="sketch", job_types=job_types,
                               engine="sketch", sha256="ab" * 32, format="safetensors")
            for name in models
        ]  # fmt: skip
        files += [
            node_pb2.ModelFile(name=name, kind="lora", size_bytes=3, engine="sketch", trigger_words=["ink"])
            for name in loras
        ]
        hello = node_pb2.Hello(
            node_id=node_id,
            instance_id=f"boot-{node_id}",
            hostname=node_id,
            slots=slots,
            engines=[types_pb2.NodeEngine(name="sketch", version="1", status="ready", job_types=job_types)],
            models=files,
            loaded_models=[node_pb2.LoadedFile(name=name, engine="sketch", memory_bytes=5) for name in loaded],
            **more,
        )
        session = f"session-{next(_numbers)}"
        await self.store.nodes.connect(
            node_id, session=session, instance_id=hello.instance_id, info=description_of(hello), replica="here"
        )
        row = await self.store.nodes.get(node_id)
        assert row is not None
        self.nodes.connected(row, hello, beat_of(hello), address="127.0.0.1", slots_free=slots)
        self.sessions[node_id] = session

    async def in_line(self) -> None:
        """Returns once a job is in line."""

        async def waiting() -> bool:
            return bool(await self.store.jobs.lanes())

        look: Callable[[], bool | Awaitable[bool]] = waiting
        await wait_until(look)

    async def claim(self, node_id: str = "agx0") -> Claim:
        """The next job of any lane that the node can run, given to it."""
        node = self.nodes.node(node_id)
        assert node is not None
        for view in await self.store.jobs.lanes():
            if feasible(node, view.lane) is not None:
                continue
            wish = ClaimRequest(view.lane.lane_id, node_id, self.sessions[node_id], secrets.token_hex(16), 30_000)
            (claim,) = await self.store.jobs.claim([wish])
            if claim is not None:
                return claim
        raise AssertionError("no job waits")

    async def start(self, node_id: str = "agx0") -> Claim:
        """Claims the next job and begins it."""
        claim = await self.claim(node_id)
        assert await self.store.jobs.started(claim.job.job_id, claim.token) is not None
        return claim

    async def save_output(self, claim: Claim, data: bytes, content_type: str = "image/png") -> OutputRow:
        """Writes an output of an attempt to the disk; its row."""
        spec = types_pb2.JobSpec.FromString(claim.job.spec)
        filename = f"{secrets.token_hex(16)}.{content_type.rpartition('/')[2]}"
        sha256 = hashlib.sha256(data).hexdigest()

        async def chunks() -> AsyncIterator[bytes]:
            yield data

        await self.files.write(filename, chunks(), size=len(data), sha256=sha256)
        image = spec.payload.image_gen
        record = types_pb2.Output(
            filename=filename,
            url=f"/api/vision/outputs/{filename}",
            sources=["local"],
            content_type=content_type,
            size_bytes=len(data),
            sha256=sha256,
            seed=image.seed,
            job_id=claim.job.job_id,
            node_id=claim.job.node_id,
            metadata=types_pb2.OutputMetadata(
                prompt=image.prompt, model=spec.target_model, resolved_model=spec.resolved_model
            ),
        )
        at = now_ms()
        record.create_time.FromMilliseconds(at)
        return OutputRow(
            filename, claim.job.job_id, at, len(data), record.SerializeToString(), making=claim.job.spec, home="here"
        )

    async def complete(self, claim: Claim, data: bytes | None = None, content_type: str = "image/png") -> OutputRow:
        """Ends an attempt well, with one picture."""
        row = await self.save_output(claim, data if data is not None else picture(), content_type)
        result = types_pb2.JobResult(outputs=[types_pb2.Output.FromString(row.record)])
        completion = await self.store.jobs.complete(
            claim.job.job_id, claim.token, result=result.SerializeToString(), outputs=[row], load_ms=5, run_ms=70,
            upload_ms=2,
        )  # fmt: skip
        assert completion.outcome == "ok"
        return row

    async def fail(
        self, claim: Claim, reason: str = "ENGINE_FAILED", *, retryable: bool = False, backoff_ms: int = 60_000
    ) -> None:
        """Ends an attempt with an error."""
        error = types_pb2.JobError(detail="it broke", code="INTERNAL", reason=reason)
        attempt = types_pb2.JobAttempt(
            generation=claim.job.generation, attempt=claim.job.attempt, node_id=claim.job.node_id, error=error
        )
        attempt.end_time.FromMilliseconds(now_ms())
        await self.store.jobs.fail(
            claim.job.job_id, claim.token, error=error.SerializeToString(), attempt=attempt.SerializeToString(),
            retryable=retryable, backoff_ms=backoff_ms,
        )  # fmt: skip

    async def run_next(self, data: bytes | None = None) -> Claim:
        """One job from claim to a good end."""
        claim = await self.start()
        await self.complete(claim, data)
        return claim

    async def submit(self, /, **fields: Any) -> str:
        """A queued picture, its fields those of CreateJobRequest; the job's id."""
        request = asked(
            queue_pb2.CreateJobRequest, **{"job_type": "image_gen", "payload": {"prompt": "a sea"}, **fields}
        )
        return (await self.queue.create(request, owner="", key=None)).job_id

    async def record(self, job_id: str) -> JobRecord:
        """What the store holds of a job."""
        found = await self.store.jobs.get(job_id)
        assert found is not None
        return found


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def desk_on(
    store: Store,
    folder: Path,
    *,
    catalog: CatalogSettings | None = None,
    events: EventSettings | None = None,
    queue: QueueSettings | None = None,
    dead: DeadSettings | None = None,
    s3: S3Store | None = None,
    settings: dict[str, Any] | None = None,
    generation: GenerationSettings | None = None,
    callbacks: CallbackRules | None = None,
) -> AsyncIterator[Desk]:
    """A desk, its event hub running."""
    nodes, ticks, bell, rates = FleetView(), ProgressHub(interval_seconds=0.001), Bell(), Rates(now_ms)
    models = ModelCatalog(nodes, catalog or CatalogSettings({ALIAS: "sketch"}, ALIAS))
    pauses = Pauses(store.pauses, bell, clock=time.monotonic, fresh_seconds=0)
    speeds = Speeds(clock=now_ms)
    estimates = Estimates(DeskRounds(nodes), speeds.book, rates.run_ms, clock=now_ms, fresh_ms=-1)
    views = JobViews(store.jobs, nodes, ticks, CODEC, pauses, estimates)
    payloads = PayloadReader(CODEC, validate, random.Random(7).randrange)
    filing = Filing(
        Settings(data_dir=folder, output_reserve_bytes=0, **(settings or {})),
        store,
        s3 or S3Store(None),
        "here",
        now_ms,
    )
    intake = Intake(
        payloads, models, nodes, filing.references, lambda: str(uuid7()), now_ms, callbacks or CallbackRules()
    )
    endings = Endings()
    hub = EventHub(store.jobs, store.events, views, nodes, ticks, rates, clock=now_ms, settings=events, endings=endings)
    jobs = JobQueue(store.jobs, intake, views, bell, bell, queue, filing.refresh)
    await filing.open()
    desk = Desk(
        store, nodes, ticks, bell, models, views, rates, hub, pauses,
        DeadLetters(store.jobs, store.replies, views, bell, dead), jobs,
        Generation(store.jobs, intake, views, hub, nodes, filing.files, bell, bell, rates, generation),
        filing.local, filing, filing.gallery,
        StatusBoard(store, nodes, models, rates, STATUS, estimates, clock=now_ms), endings,
        Explainer(store.jobs, DeskRounds(nodes), speeds, intake, clock=now_ms), speeds, estimates,
    )  # fmt: skip
    running = asyncio.create_task(hub.run())
    try:
        await hub.ready()
        yield desk
    finally:
        await jobs.aclose()
        await desk.dead.aclose()
        await desk.generation.aclose()
        running.cancel()
        await asyncio.wait([running])
        await filing.close()
