"""The models of this node as the server commands them: brought, loaded, unloaded, pinned."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog
from fleet.v1 import command_pb2, types_pb2, vision_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from fleet_agent.commands import CommandChannel, CommandDesk, CommandFault
from fleet_agent.engines.base import ModelKind
from fleet_agent.inventory import Inventory
from fleet_agent.model_control import ControlError, ModelControl, Pins
from fleet_agent.model_downloads import Download, DownloadError, DownloadSettings, ModelDownloads
from fleet_agent.model_shelf import FileKey, ModelShelf, Source
from fleet_agent.runner import Runner
from fleet_agent.settings import AgentSettings

_log = structlog.get_logger("fleet.agent.models")
_TELL_SECONDS = 0.5
_KINDS: dict[str, ModelKind] = {"checkpoint": "checkpoint", "lora": "lora"}


class ModelRoom:
    """`register` its commands, `open`, `run` as one task, `aclose` in the end. `changed` is called when what the server
    knows of this node's models is not true any more."""

    def __init__(
        self, settings: AgentSettings, inventory: Inventory, runner: Runner, changed: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._inventory = inventory
        self._runner = runner
        self._changed = changed
        self._shelf = ModelShelf(settings.models_folder, sync_bytes=settings.download_sync_bytes)
        self._control = ModelControl(
            runner, inventory, Pins(settings.data_dir / "pins.json"), timeout_seconds=settings.load_timeout_seconds
        )
        self._downloads = ModelDownloads(
            self._shelf,
            DownloadSettings(
                budget_bytes=settings.models_budget_bytes,
                floor_bytes=settings.disk_floor_bytes,
                evict_any=settings.models_evict_any,
                patience_seconds=settings.download_patience_seconds,
            ),
            downloader=lambda: runner.downloader,
            in_use=self._control.in_use,
            forget=self._forget,
            arrived=self._arrived,
        )

    def register(self, desk: CommandDesk) -> None:
        """Takes the commands about models."""
        desk.register("load_model", self._load)
        desk.register("unload_model", self._unload)
        desk.register("download", self._download)

    async def open(self) -> None:
        """Reads the pins, tidies up downloads that nobody has asked for again."""
        await self._control.open()
        await self._downloads.open()

    async def run(self) -> None:
        """Keeps pinned models in memory, and notes which files are used, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._control.run(self._settings.rescan_seconds))
            tasks.create_task(self._note_use())

    async def aclose(self) -> None:
        """Ends what is under way; downloads are resumed when they are asked for again."""
        await self._downloads.aclose()
        await self._control.aclose()

    async def _note_use(self) -> None:
        before: frozenset[FileKey] = frozenset()
        while True:
            now = frozenset(self._runner.files_in_use())
            # What was at work at the last look may have ended since.
            await asyncio.to_thread(self._shelf.used, list(self._paths(now | before)))
            before = now
            await asyncio.sleep(self._settings.rescan_seconds)

    def _paths(self, keys: Iterable[FileKey]) -> Iterable[Path]:
        for key in keys:
            file = self._inventory.file(*key)
            if file is not None and file.path is not None:
                yield file.path

    def _forget(self, key: FileKey) -> None:
        self._inventory.forget(key)
        self._changed()

    async def _arrived(self, path: Path, sha256: str) -> None:
        await self._inventory.arrived(path, sha256)
        self._changed()

    # Commands.

    async def _load(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        request = command.load_model
        await channel.progress(self._progress("model_load", request.model, 0, f"loading {request.model}"))
        try:
            await self._control.load(request.model, pin=request.pin)
        except ControlError as error:
            raise CommandFault(error.reason, error.detail) from error
        self._changed()
        loaded = self._loaded(request.model)
        if loaded is None:
            raise CommandFault("OUT_OF_MEMORY", f"{request.model} was loaded, and put out of memory by another at once")
        return command_pb2.CommandEnd(loaded_model=loaded)

    async def _unload(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        name = command.unload_model.model
        before = self._loaded(name)
        try:
            await self._control.unload(name)
        except ControlError as error:
            raise CommandFault(error.reason, error.detail) from error
        self._changed()
        return command_pb2.CommandEnd(
            loaded_model=before or types_pb2.LoadedModel(node_id=self._settings.node_id, name=name)
        )

    async def _download(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        asked = command.download
        kind = _KINDS.get(asked.kind)
        if kind is None:
            raise CommandFault("INVALID_FIELD", f"kind: must be checkpoint or lora; got {asked.kind!r}")
        source = Source(kind, asked.name, asked.reference, asked.size_bytes, asked.sha256, asked.etag)
        while True:
            download = self._downloads.begin(source)
            try:
                status = await self._followed(download, channel)
            except DownloadError as error:
                if download.source != source:
                    continue
                raise CommandFault(error.reason, error.detail) from error
            # Another version of the file was on its way: ours comes after it.
            if download.source == source:
                break
        brought = vision_pb2.ModelDownload(node_id=self._settings.node_id, status=status, size_bytes=source.size_bytes)
        return command_pb2.CommandEnd(download=brought)

    async def _followed(self, download: Download, channel: CommandChannel) -> str:
        """Tells how far it is until it has ended."""
        assert download.task is not None
        told = -1
        while not download.task.done():
            await asyncio.wait([download.task], timeout=_TELL_SECONDS)
            if download.done_bytes != told and not download.task.done():
                told = download.done_bytes
                await channel.progress(self._bytes(download))
        # (Shielded by `wait` above: a command that is given up does not end the download.)
        return download.task.result()

    def _bytes(self, download: Download) -> types_pb2.OperationProgress:
        """How far it is: 100 is for the end."""
        source, done = download.source, download.done_bytes
        percent = min(99, done * 100 // max(1, source.size_bytes))
        progress = self._progress("model_download", source.name, percent, f"bringing {source.name}")
        progress.done_bytes, progress.total_bytes = done, source.size_bytes
        return progress

    def _progress(self, operation: str, name: str, percent: int, message: str) -> types_pb2.OperationProgress:
        return types_pb2.OperationProgress(
            operation=operation, node_id=self._settings.node_id, name=name, progress=percent, message=message
        )

    def _loaded(self, name: str) -> types_pb2.LoadedModel | None:
        file = next((file for file in self._runner.loaded() if file.name == name), None)
        if file is None:
            return None
        loaded = types_pb2.LoadedModel(
            node_id=self._settings.node_id,
            name=name,
            engine=file.engine,
            memory_bytes=file.memory_bytes,
            loras=file.loras,
            pinned=file.pinned,
            running_jobs=sum(1 for key in self._runner.files_in_use() if key == ("checkpoint", name)),
        )
        for field, ago in ((loaded.load_time, file.loaded_seconds_ago), (loaded.last_used_time, file.used_seconds_ago)):
            now = Timestamp()
            now.GetCurrentTime()
            field.FromNanoseconds(now.ToNanoseconds() - int(ago * 1e9))
        return loaded
