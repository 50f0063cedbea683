"""The only place that wires everything that answers calls."""

from __future__ import annotations

import asyncio
import secrets
import time
from urllib.parse import urlsplit

import uuid_utils
from fleet.v1 import types_pb2
from prometheus_client import CollectorRegistry

from fleet_server import __version__
from fleet_server.bridge.docs import docs_routes
from fleet_server.bridge.guard import HostOriginGuard
from fleet_server.bridge.settings import BridgeSettings
from fleet_server.bridge.transcoder import Bridge
from fleet_server.callbacks import Callbacks
from fleet_server.comfying import Comfying
from fleet_server.commanding import LOG_ENTRY, Commanding
from fleet_server.contract import DOCUMENTED_PATHS, SERVICES, api_document
from fleet_server.domain.webhook_signature import SecretError
from fleet_server.embedded.identity import server_name
from fleet_server.enrolling import Enrolment
from fleet_server.filing import Filing
from fleet_server.guarding import guarded_by
from fleet_server.keeping import Keeping
from fleet_server.keyfile import KeyFile, KeyFileError
from fleet_server.modelling import Modelling
from fleet_server.protojson import JsonCodec
from fleet_server.readiness import Readiness, StartError
from fleet_server.rpc.auth import ApiKey, KeyRing
from fleet_server.rpc.fleet import FleetServicer
from fleet_server.rpc.invoke import Invoker
from fleet_server.rpc.methods import Method, methods_of
from fleet_server.rpc.metrics import RpcMetrics
from fleet_server.rpc.node import NodeServicer
from fleet_server.rpc.queue import QueueServicer
from fleet_server.rpc.server import GrpcServer
from fleet_server.rpc.validation import validate
from fleet_server.rpc.vision import VisionServicer
from fleet_server.services.authority import AuthorityError
from fleet_server.services.commands import Commands
from fleet_server.services.dead import DeadLetters
from fleet_server.services.decisions import DecisionLog
from fleet_server.services.dispatch import Dispatcher
from fleet_server.services.endings import Endings
from fleet_server.services.estimates import Estimates
from fleet_server.services.events import EventHub
from fleet_server.services.explain import Explainer
from fleet_server.services.fleet import FleetView
from fleet_server.services.generation import Generation, GenerationSettings
from fleet_server.services.intake import Intake
from fleet_server.services.operations import Operations
from fleet_server.services.pauses import Pauses
from fleet_server.services.payloads import PayloadReader
from fleet_server.services.progress import ProgressHub
from fleet_server.services.queue import JobQueue
from fleet_server.services.rates import Rates
from fleet_server.services.reaper import Reaper, ReaperSettings
from fleet_server.services.reruns import Reruns
from fleet_server.services.session import SessionSettings
from fleet_server.services.sessions import Sessions
from fleet_server.services.speeds import Speeds
from fleet_server.services.status import StatusBoard, StatusSettings
from fleet_server.services.tick_relay import TickRelay
from fleet_server.services.uploads import Uploads
from fleet_server.services.views import JobViews
from fleet_server.services.webhooks import Webhooks
from fleet_server.settings import PUBLISHED_KEYS, Settings
from fleet_server.special import front_page, guarded, metrics
from fleet_server.storage.s3 import S3Store
from fleet_server.store import Store
from fleet_server.swarming import Swarming

EVENT = types_pb2.Event.DESCRIPTOR.full_name


def now_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class Server:
    """Everything that answers calls, over one store. `start`, then `stop`, once each."""

    def __init__(self, settings: Settings, store: Store, readiness: Readiness, s3: S3Store) -> None:
        self._settings = settings
        self.store = self._store = store
        self.s3 = s3
        self._readiness = readiness
        self.registry = CollectorRegistry()
        self._callbacks = _callbacks(settings)
        self._codec = JsonCodec()
        self._wire()

    def _wire(self) -> None:
        settings, store = self._settings, self._store
        self._filing = Filing(settings, store, self.s3, server_name(settings.data_dir), now_ms)
        self.fleet = FleetView()
        self._ticks = ProgressHub()
        self._relay = TickRelay(store.broadcast, self._ticks)
        endings = Endings()
        self._speeds = Speeds(clock=now_ms, shelf=store.speeds)
        self._sessions = Sessions(
            store,
            self.fleet,
            self._ticks,
            self._filing.completions(endings, self._speeds.taken, int(settings.retry_backoff_seconds * 1000)),
            settings=SessionSettings(
                heartbeat_seconds=settings.heartbeat_seconds,
                persist_seconds=2.8 * settings.heartbeat_seconds,
                lease_seconds=settings.lease_seconds,
                accept_seconds=settings.accept_seconds,
            ),
            replica=self._filing.home,
            version=__version__,
            inputs=self._filing.resolver,
        )
        self.commands = Commands(self._sessions, self.fleet)
        self.comfy = Comfying(
            settings, store, self.fleet, self._sessions, self.commands, self._filing, now_ms, self._relay
        )
        self.enrolment = _enrolment(settings, store)
        self._keeping = Keeping(
            store, self.fleet, self._sessions, self.commands, self._filing.resolver, self.enrolment.joins
        )
        self.machines = self._keeping.parts.machines
        self._modelling = Modelling(settings, store, self.s3, self.fleet, self._sessions, self.commands, self._speeds)
        catalog, shelf = self._modelling.catalog, self._modelling.shelf
        self._decisions = None if settings.decisions_file is None else DecisionLog(settings.decisions_file)
        self._dispatcher = Dispatcher(
            store,
            self.fleet,
            self._sessions,
            speeds=self._speeds,
            on_decision=None if self._decisions is None else self._decisions.note,
            watcher=self._modelling.fetches,
        )
        self._modelling.shelf.subscribe(self._dispatcher.wake)
        self._reaper = Reaper(
            store,
            self.fleet,
            self._dispatcher.wake,
            replica=self._filing.home,
            settings=ReaperSettings(
                settings.reap_grace_seconds, settings.reap_interval_seconds, lease_seconds=settings.lease_seconds
            ),
        )
        rates = Rates(now_ms)
        pauses = Pauses(store.pauses, self._dispatcher, clock=time.monotonic)
        estimates = Estimates(self._dispatcher, self._speeds.book, rates.run_ms, clock=now_ms)
        views = JobViews(store.jobs, self.fleet, self._ticks, self._codec, pauses, estimates, shelf)
        self._hub = EventHub(
            store.jobs,
            store.events,
            views,
            self.fleet,
            self._ticks,
            rates,
            clock=now_ms,
            endings=endings,
            on_node=self._sessions.told,
        )
        intake = Intake(
            PayloadReader(self._codec, validate, secrets.randbelow),
            catalog,
            self.fleet,
            self._filing.references,
            new_id=lambda: str(uuid_utils.uuid7()),
            clock=now_ms,
            callbacks=self._callbacks.rules,
            refusal=self._readiness.refusal,
            graphs=self.comfy.graphs,
        )
        self._sender = self._callbacks.sender(store, views, self._codec, now_ms, self.registry)
        self._queue = JobQueue(store.jobs, intake, views, self._dispatcher, self._sessions, None, self._filing.refresh)
        self._dead = DeadLetters(store.jobs, store.replies, views, self._dispatcher)
        self._generation = Generation(
            store.jobs,
            intake,
            views,
            self._hub,
            self.fleet,
            self._filing.files,
            self._dispatcher,
            self._sessions,
            rates,
            GenerationSettings(
                queue_ttl_ms=int(settings.generate_timeout_seconds * 1000),
                timeout_ms=int(settings.generate_timeout_seconds * 1000),
            ),
            shelf=shelf,
        )
        board = StatusBoard(
            store,
            self.fleet,
            catalog,
            rates,
            StatusSettings(version=__version__, mode=settings.mode),
            estimates,
            clock=now_ms,
            refusal=self._readiness.refusal,
            notices=lambda: [*self._reaper.notices(), *self.s3.notices()],
            s3=lambda: self.s3.part_status,
        )
        explainer = Explainer(store.jobs, self._dispatcher, self._speeds, intake, clock=now_ms, shelf=shelf)
        self._keys = KeyRing(_keys(settings), clock=time.monotonic)
        self.agent_key, self.key_file = self._open_keys()
        self._filing.tell = self._modelling.tell = Operations(self._hub, clock=now_ms).tell
        self._filing.reader.objects = self._modelling.reads
        self.comfy.connect(self._queue, intake, self._hub, self._keys, self._filing.gallery)
        reruns = Reruns(store, self._queue, catalog, self._filing.resolver)
        servicers = (
            FleetServicer(board, self._generation, self._hub, self._check_key, self._filing.calls),
            VisionServicer(self._queue, self._filing.gallery, reruns, catalog, self.fleet, self._modelling.desk),
            QueueServicer(
                self._queue,
                self._hub,
                board,
                Webhooks(store.jobs, store.webhooks, self._sender.wake),
                explainer=explainer,
                pauses=pauses,
                dead=self._dead,
            ),
            NodeServicer(
                self.fleet,
                self._sessions,
                Uploads(store, self._filing.local),
                self.commands,
                self._keeping.parts,
                self._filing.reader,
            ),
        )
        self._swarming = Swarming(settings, store, self.fleet, self._sessions, self.commands, catalog)
        servicers[0].swarm_parts = self._swarming.parts
        self._commanding = Commanding(store, self.fleet, self._sessions, self.commands, self._filing.tell)
        self._commanding.relay_by(self._filing.home, self.enrolment, lambda: self.agent_key)
        servicers[0].container_parts = self._commanding.parts
        methods: list[Method] = []
        for service, servicer in zip(SERVICES, servicers, strict=True):
            methods += methods_of(service, servicer, public=_PUBLIC.get(service.name, ()))
        self._invoker = Invoker(
            methods,
            keys=self._keys,
            metrics=RpcMetrics(self.registry, methods),
            identities=self.enrolment.joins,
            open_scopes=self.enrolment.open_scopes,
        )
        self._grpc = GrpcServer(self._invoker)

    def _open_keys(self) -> tuple[str | None, KeyFile | None]:
        """The key of the agent beside us, and the file of keys. Raises StartError where the file cannot be used."""
        settings = self._settings
        given = None if settings.api_key is None else settings.api_key.get_secret_value()
        if settings.api_keys_file is None:
            if given is None and settings.insecure_no_auth:
                given = secrets.token_hex(32)
                self._keys.replace([ApiKey.of("fleet-agent", given)])
            return given, None
        own = given or secrets.token_hex(32)
        others = _keys(settings) or [ApiKey.of("fleet-agent", own)]
        published = frozenset() if settings.loopback else PUBLISHED_KEYS
        file = KeyFile(settings.api_keys_file, others, self._keys.replace, published=published)
        try:
            file.load()
        except KeyFileError as error:
            raise StartError(str(error)) from None
        return own, file

    @property
    def _guarded(self) -> bool:
        """Whether pages need a key too."""
        return self._keys.required and not self._settings.insecure_no_auth

    def _check_key(self, key: str | None, context: object) -> None:
        self._keys.owner(key, context.peer())  # type: ignore[attr-defined]

    def http_app(self, origin: str) -> tuple[HostOriginGuard, Bridge]:
        """The ASGI application, its guard outermost."""
        self._callbacks.own_port(urlsplit(origin).port)
        page = front_page(__version__, origin)
        plain = [page, metrics(self.registry)]
        special = [*plain, *docs_routes(lambda: api_document(plain))]
        bridge = Bridge(
            SERVICES,
            self._invoker,
            self._codec,
            special=guarded(special, self._invoker.authenticate) if self._guarded else special,
            required_paths=DOCUMENTED_PATHS,
            settings=BridgeSettings(shared_messages=frozenset({EVENT, LOG_ENTRY})),
        )
        return guarded_by(self._settings, bridge), bridge

    async def start(self, tasks: asyncio.TaskGroup) -> tuple[int, list[asyncio.Task[None]]]:
        """Opens the files, starts the loops, then the gRPC door; its port and the loops, which run for ever."""
        await self._filing.open()
        self.comfy.open()
        parts = (
            self._hub,
            self._sessions,
            self._dispatcher,
            self._speeds,
            self._reaper,
            self._sender,
            self._relay,
            self.comfy,
            self._keeping,
            self._swarming,
            self._commanding,
            self._filing,
            self._modelling,
        )
        loops = [part.run for part in parts]
        if self.key_file is not None:
            loops.append(self.key_file.run)
        if self._decisions is not None:
            loops.append(self._opened(self._decisions).run)
        running = [tasks.create_task(loop(), name=loop.__qualname__) for loop in loops]
        await self._sessions.loaded()
        try:
            port = await self.enrolment.open(self._grpc)
            self._commanding.door.set_result(self.enrolment.door(port))
        except OSError as error:
            raise StartError(str(error)) from error
        self._callbacks.own_port(port)
        self._callbacks.own_port(self.comfy.port)
        return port, running

    @staticmethod
    def _opened(decisions: DecisionLog) -> DecisionLog:
        try:
            decisions.open()
        except OSError as error:
            raise StartError(
                f"decisions_file: {error.filename} cannot be written ({error.strerror}): give another with "
                "FLEET_DECISIONS_FILE"
            ) from error
        return decisions

    async def stop(self, bridge: Bridge, grace_seconds: float) -> None:
        """Ends streams and sessions, lets calls under way finish, closes the doors."""
        await self._grpc.set_serving(False)
        self.comfy.stop()
        self._hub.close()
        await bridge.shut_down()
        await self._sessions.shutdown()
        await self._sender.shut_down(min(grace_seconds, _LAST_CALLBACKS_SECONDS))
        await self._grpc.stop(grace_seconds)
        await self._generation.aclose()
        await self._queue.aclose()
        await self._dead.aclose()
        await self._swarming.aclose()
        await self._commanding.aclose()
        await self._modelling.aclose()
        await self._filing.finish()

    async def close_files(self) -> None:
        """Ends the threads of the file rooms."""
        await self._filing.close()


_LAST_CALLBACKS_SECONDS = 2.0
"""What a stop waits for receivers; what they have not answered by then is sent again later."""

_PUBLIC = {"Fleet": ("GetHealth", "Connect"), "Node": ("Join",)}
"""Methods that need no key."""


def _keys(settings: Settings) -> list[ApiKey]:
    return [] if settings.api_key is None else [ApiKey.of("default", settings.api_key.get_secret_value())]


def _callbacks(settings: Settings) -> Callbacks:
    try:
        return Callbacks(settings)
    except SecretError as error:
        raise StartError(str(error)) from None


def _enrolment(settings: Settings, store: Store) -> Enrolment:
    try:
        return Enrolment(settings, store)
    except AuthorityError as error:
        raise StartError(str(error)) from None
