"""Models, put together: what the buckets have, what is on its way to nodes, what callers have nodes do."""

from __future__ import annotations

import asyncio

from fleet.v1 import types_pb2

from fleet_server.contract import EMBEDDED_ALIASES
from fleet_server.services.bucket_shelf import BucketShelf, ShelfSettings
from fleet_server.services.fetches import Fetches, Runs, Tell
from fleet_server.services.fleet import FleetView
from fleet_server.services.model_desk import ModelDesk
from fleet_server.services.models import CatalogSettings, ModelCatalog
from fleet_server.services.object_reads import ObjectReads
from fleet_server.services.sessions import Sessions
from fleet_server.services.speeds import Speeds
from fleet_server.settings import Settings
from fleet_server.storage.s3 import S3Store
from fleet_server.store import Store


class Modelling:
    """Makes these parts; `run` is one task, `aclose` ends what they began.

    `tell` may be set until `run`: who hears of the progress of downloads.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        s3: S3Store,
        fleet: FleetView,
        sessions: Sessions,
        commands: Runs,
        speeds: Speeds,
    ) -> None:
        self.tell: Tell = lambda _: None
        aliases = EMBEDDED_ALIASES if settings.mode == "embedded" else {}
        default = settings.default_model or next(iter(aliases), None)
        self.shelf = BucketShelf(
            s3, settings.data_dir / "models.json", ShelfSettings(refresh_seconds=settings.models_refresh_seconds)
        )
        self.catalog = ModelCatalog(fleet, CatalogSettings(aliases=aliases, default_model=default), self.shelf)
        self.fetches = Fetches(
            commands,
            self.shelf,
            speeds,
            speeds.book,
            here=lambda node_id: sessions.live(node_id) is not None,
            tell=self._told,
        )
        self.desk = ModelDesk(fleet, self.catalog, commands, self.shelf, self.fetches, store.replies, self._told)
        self.reads = ObjectReads(s3, self.shelf)

    def _told(self, progress: types_pb2.OperationProgress) -> None:
        self.tell(progress)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self.shelf.run()
            # Without S3 there is nothing to look at.
            await asyncio.Event().wait()
        finally:
            await self.fetches.aclose()

    async def aclose(self) -> None:
        """Ends what was begun for callers."""
        await self.desk.aclose()
