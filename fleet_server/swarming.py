"""The swarm's side of the server, put together: its services, their changes, their scaling; the registry."""

from __future__ import annotations

import asyncio
import time

from fleet_server.domain.errors import FleetError
from fleet_server.embedded.identity import server_name
from fleet_server.rpc.swarm import SwarmParts
from fleet_server.services.autoscaler import Autoscaler, AutoscaleSettings
from fleet_server.services.commands import Commands
from fleet_server.services.fleet import FleetView
from fleet_server.services.models import ModelCatalog
from fleet_server.services.registry import Registry, RegistrySettings
from fleet_server.services.sessions import Sessions
from fleet_server.services.swarm import Swarm
from fleet_server.services.swarm_news import SwarmNews
from fleet_server.settings import Settings
from fleet_server.store import Store

_MODEL_JOBS = "image_gen"


class Swarming:
    """Makes these parts, runs their loops, and closes them."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        fleet: FleetView,
        sessions: Sessions,
        commands: Commands,
        catalog: ModelCatalog,
    ) -> None:
        def real_name(name: str, job_type: str | None) -> str:
            try:
                return catalog.resolve(name, job_type or _MODEL_JOBS).resolved or name
            except FleetError:
                # No node has it yet: that may be why the service is to grow.
                return name

        self._swarm = Swarm(fleet, commands, store.swarm, store.replies)
        self._news = SwarmNews(self._swarm, store.swarm)
        sessions.listen("service", self._news.take)
        self._autoscaler = Autoscaler(
            self._swarm,
            self._news,
            store.swarm,
            store.jobs,
            replica=server_name(settings.data_dir),
            clock=time.monotonic,
            real_name=real_name,
            settings=AutoscaleSettings(
                look_seconds=settings.autoscale_seconds, calm_seconds=settings.autoscale_calm_seconds
            ),
        )
        password = settings.registry_password
        self._registry = Registry(
            RegistrySettings(
                url=settings.registry_url,
                username=settings.registry_username,
                password="" if password is None else password.get_secret_value(),
            )
        )
        self.parts = SwarmParts(self._swarm, self._autoscaler, self._registry)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._news.run(), name="swarm-news")
            tasks.create_task(self._autoscaler.run(), name="autoscale")

    async def aclose(self) -> None:
        """Waits for the changes under way, closes the connections."""
        await self._swarm.aclose()
        await self._registry.aclose()
