"""Files of the server, put together: outputs on the disk and in S3, the gallery, inputs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fleet.v1 import types_pb2
from fleet.v1.node_pb2 import JobComplete

from fleet_server.rpc.outputs import OutputParts
from fleet_server.services.completion import Completions
from fleet_server.services.deletions import Deletions
from fleet_server.services.endings import Endings
from fleet_server.services.file_reader import FileReader
from fleet_server.services.gallery import Gallery
from fleet_server.services.gallery_feed import GalleryFeed
from fleet_server.services.input_uploads import InputSettings, InputUploads
from fleet_server.services.inputs import InputResolver
from fleet_server.services.output_files import OutputFiles
from fleet_server.services.output_lists import OutputLists
from fleet_server.services.output_views import OutputViews
from fleet_server.services.references import References
from fleet_server.services.sweep_calls import SweepCalls
from fleet_server.services.sweeper import Sweeper
from fleet_server.services.sweeps import Sweeps, SweepSettings
from fleet_server.settings import Settings
from fleet_server.storage.gallery_index import GalleryIndex
from fleet_server.storage.outputs import LocalOutputs, OutputLimits
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.thumbnails import Thumbnails
from fleet_server.store import Store

Tell = Callable[[types_pb2.OperationProgress], None]


class Filing:
    """Makes these parts, opens and closes their files, runs their loops. `home` is this server's name.

    `tell` may be set until `run`: who hears of the progress of syncs, cleanups and moves.
    """

    def __init__(self, settings: Settings, store: Store, s3: S3Store, home: str, clock: Callable[[], int]) -> None:
        folder = settings.data_dir
        self.home = home
        self.s3 = s3
        self.tell: Tell = lambda _: None
        self.local = LocalOutputs(folder / "outputs", OutputLimits(reserve_bytes=settings.output_reserve_bytes))
        self.inputs = LocalOutputs(
            folder / "inputs", OutputLimits(reserve_bytes=settings.output_reserve_bytes, cache_bytes=0)
        )
        self._thumbnails = Thumbnails(folder / "thumbnails")
        self.files = OutputFiles(self.local, s3, store.outputs, home)
        views = self._views = OutputViews(s3)
        self._store = store
        self._index = GalleryIndex(folder / "gallery.sqlite")
        self._feed = GalleryFeed(store.outputs, self._index, views)
        self._deletions = Deletions(store, self.local, self._thumbnails, s3, home)
        self.gallery = Gallery(store.outputs, self.files, self._thumbnails, views, self._feed, self._deletions)
        self._sweeps = Sweeps(
            store,
            self.local,
            Sweeper(store, self.local, s3, home),
            home,
            clock=clock,
            tell=self._told,
            settings=SweepSettings(
                interval_seconds=settings.output_sync_seconds,
                max_age_hours=settings.output_max_age_hours,
                eager=settings.mode == "production"
                if settings.output_sync_eager is None
                else settings.output_sync_eager,
            ),
        )
        self.resolver = InputResolver(store.jobs, store.outputs, store.inputs, s3)
        self.references = References(store.outputs, store.inputs, s3)
        inputs = InputUploads(
            store.inputs,
            self.inputs,
            s3,
            home,
            clock=clock,
            settings=InputSettings(ttl_seconds=settings.input_ttl_seconds),
        )
        self._input_uploads = inputs
        lists = OutputLists(store.outputs, self.local, s3, views)
        self.calls = OutputParts(SweepCalls(self._sweeps, store.replies), lists, inputs)
        self.reader = FileReader(self.files, store.outputs, store.inputs, self.inputs, s3, home)

    def _told(self, progress: types_pb2.OperationProgress) -> None:
        self.tell(progress)

    def completions(
        self, endings: Endings, taken: Callable[[str, JobComplete], None], backoff_first_ms: int
    ) -> Completions:
        """What settles the ends of attempts: their outputs become files of this server."""
        return Completions(
            self._store,
            self.local,
            endings=endings,
            taken=taken,
            backoff_first_ms=backoff_first_ms,
            stored=self._sweeps.stored,
            home=self.home,
        )

    async def refresh(self, job: types_pb2.Job) -> None:
        """The outputs of the job's result say where they are now. Raises STORE_UNAVAILABLE."""
        outputs = job.result.outputs
        self._views.refresh(outputs, await self._store.outputs.get_many([output.filename for output in outputs]))

    async def open(self) -> None:
        """Opens the folders. Raises OSError."""
        await self.local.open()
        await self.inputs.open()
        await self._index.open()

    async def run(self) -> None:
        """Until cancelled."""
        ends = [self.s3.on_back(part.wake) for part in (self._sweeps, self._deletions, self._input_uploads)]
        try:
            async with asyncio.TaskGroup() as tasks:
                for loop in (self._sweeps.run, self._deletions.run, self._feed.run, self._input_uploads.run):
                    tasks.create_task(loop(), name=loop.__qualname__)
        finally:
            for end in ends:
                end()

    async def finish(self) -> None:
        """Lets what callers began come to an end, within bounds."""
        await self._sweeps.aclose()
        await self._deletions.aclose()

    async def close(self) -> None:
        """Ends the threads of the folders."""
        await self._thumbnails.aclose()
        await self._index.aclose()
        await self.inputs.aclose()
        await self.local.aclose()
