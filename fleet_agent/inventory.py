"""What a node can do: its engines and model files, and which engine runs which file."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog
from fleet.v1 import node_pb2, types_pb2

from fleet_agent.daemon import in_daemon
from fleet_agent.describe import describe_engines
from fleet_agent.engines.base import ModelFile, ModelKind
from fleet_agent.engines.models import FOLDERS, ModelFolder
from fleet_agent.engines.registry import NEEDS
from fleet_agent.settings import AgentSettings

_log = structlog.get_logger("fleet.agent.inventory")
JOB_TYPE_WORDS: Mapping[str, types_pb2.JobType.ValueType] = {
    name.removeprefix("JOB_TYPE_").lower(): number for name, number in types_pb2.JobType.items() if number
}
_BUILTIN: Mapping[ModelKind, str] = {"checkpoint": "builtin_models", "lora": "builtin_loras"}
Stamps = frozenset[tuple[str, int, int]]


class Inventory:
    """Engines (asked at the start; those that speak to a program of their own again and again) and model files.

    `watch` keeps both true.
    """

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._folder = ModelFolder(settings.models_folder)
        self._infos: dict[str, dict[str, Any]] = {}
        self._statuses: list[dict[str, Any]] = []
        self._files: dict[tuple[ModelKind, str], ModelFile] = {}
        self._stamps: Stamps = frozenset()
        self._scanning = asyncio.Lock()
        self._stopped = threading.Event()
        self._options = settings.engine_options()
        self._ask_at = 0.0
        self.warnings: tuple[str, ...] = ()

    async def load(self) -> None:
        """Asks a child process for the engines and scans the model folder."""
        described = await self._describe(self._settings.engines)
        self._infos, self._statuses = described["infos"], described["statuses"]
        self._ask_at = time.monotonic() + self._settings.engine_refresh_seconds
        await self.rescan()

    async def _describe(self, wanted: Sequence[str]) -> dict[str, Any]:
        settings = self._settings
        return await describe_engines(
            settings.models_folder, settings.data_dir, wanted, settings.describe_seconds, self._options
        )

    async def watch(self) -> None:
        """Keeps the list of files true, and hashes what is new, for ever. Never on the road of a heartbeat: a folder
        on a network may hang."""
        try:
            while True:
                try:
                    await self._ask_again()
                    await self.rescan()
                    if any(file.sha256 is None and file.path is not None for file in self._files.values()):
                        await in_daemon(lambda: self._folder.hash_missing(self._stopped.is_set), "hash models")
                        await self._scan()
                except Exception as error:
                    _log.warning("the model folder cannot be read", error=repr(error))
                await asyncio.sleep(self._settings.rescan_seconds)
        finally:
            # A thread cannot be cancelled, and a large file takes minutes.
            self._stopped.set()

    async def _ask_again(self) -> None:
        """Asks the engines anew whose programs may have come, gone or changed."""
        changing = [name for name, info in self._infos.items() if info["refresh_seconds"]]
        changing += [one["name"] for one in self._statuses if one["status"] == "failed" and one["name"] in NEEDS]
        if not changing or time.monotonic() < self._ask_at:
            return
        described = await self._describe(changing)
        self._ask_at = time.monotonic() + self._settings.engine_refresh_seconds
        infos = {name: info for name, info in self._infos.items() if name not in changing} | described["infos"]
        rest = [one for one in self._statuses if one["name"] not in changing]
        self._statuses = sorted([*rest, *described["statuses"]], key=lambda one: str(one["name"]))
        if infos != self._infos:
            self._infos = infos
            await self._scan()

    async def rescan(self) -> None:
        """Looks at the model folder again; headers are read only where a file came, went or changed."""
        stamps = await in_daemon(lambda: _stamps(self._settings.models_folder), "look at models")
        if stamps != self._stamps or not self._files:
            await self._scan()
            self._stamps = stamps

    async def _scan(self) -> None:
        # One after the other: what an older one saw must not hide what a newer one has found.
        async with self._scanning:
            await self._scan_now()

    async def _scan_now(self) -> None:
        scan = await in_daemon(self._folder.scan, "scan models")
        files = {(file.kind, file.name): file for file in scan.files}
        for info in self._infos.values():
            for kind, names in _BUILTIN.items():
                for name in info[names]:
                    files.setdefault((kind, name), ModelFile(name, None, kind, architecture=_builtin_family(info)))
        self._files = files
        self.warnings = tuple(f"{path}: {problem}" for path, problem in sorted(scan.problems.items()))

    def engines(self) -> list[types_pb2.NodeEngine]:
        """Each engine with its status, as the server shows it."""
        return [
            types_pb2.NodeEngine(
                name=status["name"],
                version=status["version"],
                status=status["status"],
                detail=status["detail"],
                job_types=[JOB_TYPE_WORDS[word] for word in status["job_types"] if word in JOB_TYPE_WORDS],
            )
            for status in self._statuses
        ]

    def models(self) -> list[node_pb2.ModelFile]:
        """Each model file that some engine can use."""
        found = []
        for file in self._files.values():
            engine = self.engine_of(file)
            if engine is None:
                continue
            words = self._infos[engine]["job_types"]
            found.append(
                node_pb2.ModelFile(
                    name=file.name,
                    kind=file.kind,
                    size_bytes=file.size_bytes,
                    sha256=file.sha256 or "",
                    architecture=file.architecture or "",
                    format="" if file.path is None else "safetensors",
                    trigger_words=file.trigger_words,
                    job_types=[JOB_TYPE_WORDS[word] for word in words if word in JOB_TYPE_WORDS],
                    engine=engine,
                )
            )
        return found

    def intake(self) -> node_pb2.ModelIntake | None:
        """What files of the buckets this node would bring; None where its model folder cannot be written to."""
        if not os.access(self._settings.models_folder, os.W_OK):
            return None
        loadable = [
            node_pb2.LoadableModels(
                engine=name,
                architectures=info["architectures"],
                job_types=[JOB_TYPE_WORDS[word] for word in info["job_types"] if word in JOB_TYPE_WORDS],
            )
            for name, info in sorted(self._infos.items())
            if info["architectures"]
        ]
        return node_pb2.ModelIntake(loadable=loadable, most_bytes=self._settings.models_budget_bytes)

    async def arrived(self, path: Path, sha256: str) -> None:
        """A file with that hash has come."""
        await in_daemon(lambda: self._folder.know(path, sha256), "note a hash")
        await self._scan()

    def forget(self, key: tuple[ModelKind, str]) -> None:
        """The file is about to go: no work may begin with it."""
        self._files.pop(key, None)

    def file(self, kind: ModelKind, name: str) -> ModelFile | None:
        """A model file by kind and name: a LoRA may have a checkpoint's name."""
        return self._files.get((kind, name))

    def engine_for(self, job_type: str, model: ModelFile | None) -> str | None:
        """The engine that runs this type with this model."""
        if model is not None:
            engine = self.engine_of(model)
            return engine if engine is not None and job_type in self._infos[engine]["job_types"] else None
        able = [name for name in sorted(self._infos) if job_type in self._infos[name]["job_types"]]
        return "container" if job_type == "custom" and "container" in able else next(iter(able), None)

    def engine_named(self, name: str, job_type: str) -> str | None:
        """That engine, where it is here and runs this type."""
        return name if name in self._infos and job_type in self._infos[name]["job_types"] else None

    def version_of(self, engine: str) -> str:
        """Version of an engine."""
        return str(self._infos[engine]["version"])

    def engine_of(self, file: ModelFile) -> str | None:
        """The engine that loads this file."""
        for name in sorted(self._infos):
            info = self._infos[name]
            if file.path is None and file.name in info[_BUILTIN[file.kind]]:
                return name
            if file.path is not None and file.architecture in info["architectures"]:
                return name
        return None


def _stamps(folder: Path) -> Stamps:
    """Path, size and time of each model file: what says, without reading any, whether one changed."""
    found = []
    for sub in FOLDERS:
        for path in (folder / sub).rglob("*.safetensors"):
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((str(path), status.st_size, status.st_mtime_ns))
    return frozenset(found)


def _builtin_family(info: Mapping[str, Any]) -> str | None:
    families = info["architectures"]
    return families[0] if families else None


def model_fields(file: ModelFile | None) -> dict[str, Any] | None:
    """A model file for a slot's frame."""
    if file is None:
        return None
    return {**asdict(file), "path": None if file.path is None else str(file.path)}
