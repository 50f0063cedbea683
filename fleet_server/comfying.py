"""The ComfyUI gateway, put together: what nodes' ComfyUIs have, prompts and files, and the door on its own port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import structlog

from fleet_server.comfy import ComfyParts, ComfySettings, Sockets, comfy_app
from fleet_server.comfy.parts import Downloads
from fleet_server.comfy.posture import Keys
from fleet_server.filing import Filing
from fleet_server.guarding import guarded_by
from fleet_server.http import HttpServer, PortTakenError, bind
from fleet_server.readiness import StartError
from fleet_server.services.comfy_files import ComfyFiles
from fleet_server.services.comfy_nodes import Asks, ComfyNodes
from fleet_server.services.comfy_prompts import ComfyPrompts
from fleet_server.services.comfy_tracker import ComfyTracker
from fleet_server.services.events import EventHub
from fleet_server.services.fleet import FleetView
from fleet_server.services.frame_relay import FrameRelay, Relay
from fleet_server.services.frames import FrameHub
from fleet_server.services.graphs import Graphs
from fleet_server.services.intake import Intake
from fleet_server.services.queue import JobQueue
from fleet_server.services.sessions import Sessions
from fleet_server.settings import Settings
from fleet_server.store import Store

_log = structlog.get_logger("fleet.comfy")


class Comfying:
    """Makes these parts; `connect` once the rest is there, then `open`, `run`, `stop`. `graphs` is for the intake.

    Graphs and their nodes are followed also where the door is closed: workflows come over the other doors too.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        fleet: FleetView,
        sessions: Sessions,
        commands: Asks,
        filing: Filing,
        clock: Callable[[], int],
        relay: Relay,
    ) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._frames = FrameHub()
        sessions.listen("frame", self._frames.take)
        self._nodes = ComfyNodes(store, fleet, commands)
        self._files = ComfyFiles(store, filing.calls.inputs, filing.reader)
        self.graphs = Graphs(self._nodes, self._files)
        self._sockets = Sockets(store.comfy.told)
        self._relay = FrameRelay(relay, self._frames, self._elsewhere)
        self._listeners: list[socket.socket] = []
        self._http: HttpServer | None = None

    @property
    def port(self) -> int | None:
        """The gateway's port; None where it is closed."""
        return None if self._http is None else self._http.port

    def connect(self, queue: JobQueue, intake: Intake, hub: EventHub, keys: Keys, downloads: Downloads) -> None:
        """The use cases of the other doors, and the keys."""
        self._keys = keys
        self._tracker = ComfyTracker(
            self._store, hub, self._frames, self._sockets, clock=self._clock, failed=self._nodes.stale
        )
        prompts = ComfyPrompts(self._store, queue, intake, self.graphs, self._tracker, clock=self._clock)
        self._parts = ComfyParts(
            prompts, self._tracker, self._nodes, self._files, downloads, self._sockets, ComfySettings()
        )

    def open(self) -> None:
        """Listens. A port that is taken closes this door alone, unless it was asked for: then it raises StartError.

        What holds the port may be a ComfyUI of this very machine.
        """
        settings = self._settings
        if settings.comfy_port is None:
            return
        try:
            self._listeners = bind(settings.host, settings.comfy_port, "comfy-port")
        except PortTakenError as error:
            if "comfy_port" in settings.model_fields_set:
                raise StartError(str(error)) from error
            _log.warning("the ComfyUI gateway stays closed: its port is taken", detail=str(error))
            return
        guard = guarded_by(settings, comfy_app(self._parts, self._keys))
        self._http = HttpServer(guard, self._listeners, settings.stop_grace_seconds)

    async def run(self) -> None:
        """Until cancelled; `stop` lets the requests under way come to their end."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for loop in (self._nodes.run(), self._tracker.run(), self._relay.run()):
                    tasks.create_task(loop, name="comfy")
                if self._http is not None:
                    tasks.create_task(self._http.run(), name="comfy-http")
        finally:
            for listener in self._listeners:
                listener.close()

    def _elsewhere(self, job_id: str) -> bool:
        """Whether the prompt's client is not here, and may be at another replica."""
        live = self._tracker.live(job_id)
        return live is not None and bool(live.client_id) and not self._sockets.has(live.owner, live.client_id)

    def stop(self) -> None:
        """No more requests are taken; clients are told that we go."""
        self._sockets.close()
        if self._http is not None:
            self._http.stop()
