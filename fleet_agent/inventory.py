"""What a node can do: its engines and model files, and which engine runs which file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fleet.v1 import node_pb2, types_pb2

from fleet_agent.engines.base import ModelFile
from fleet_agent.engines.models import ModelFolder
from fleet_agent.settings import AgentSettings
from fleet_agent.slot_process import describe_engines

JOB_TYPE_WORDS: Mapping[str, types_pb2.JobType.ValueType] = {
    name.removeprefix("JOB_TYPE_").lower(): number for name, number in types_pb2.JobType.items() if number
}


class Inventory:
    """Engines (asked once, at the start) and model files (scanned again on `rescan`)."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._folder = ModelFolder(settings.models_folder)
        self._infos: dict[str, dict[str, Any]] = {}
        self._statuses: list[dict[str, Any]] = []
        self._files: dict[str, ModelFile] = {}
        self.warnings: tuple[str, ...] = ()

    async def load(self) -> None:
        """Asks a child process for the engines and scans the model folder."""
        described = await describe_engines(
            self._settings.models_folder, self._settings.data_dir, self._settings.engines
        )
        self._infos, self._statuses = described["infos"], described["statuses"]
        await self.rescan()

    async def rescan(self) -> bool:
        """Looks at the model folder again; whether something changed."""
        scan = await asyncio.to_thread(self._folder.scan)
        files = {file.name: file for file in scan.files}
        for info in self._infos.values():
            for name in info["builtin_models"]:
                files.setdefault(name, ModelFile(name, None, "checkpoint", architecture=_builtin_family(info)))
        changed = files != self._files
        self._files = files
        self.warnings = tuple(f"{path}: {problem}" for path, problem in sorted(scan.problems.items()))
        return changed

    async def hash_files(self) -> bool:
        """Hashes files that have no hash yet, in a thread; whether something changed."""
        await asyncio.to_thread(self._folder.hash_missing)
        return await self.rescan()

    @property
    def job_types(self) -> list[str]:
        """What the engines run."""
        return sorted({word for info in self._infos.values() for word in info["job_types"]})

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
            engine = self._engine_of(file)
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

    def file(self, name: str) -> ModelFile | None:
        """A model file by name."""
        return self._files.get(name)

    def engine_for(self, job_type: str, model: ModelFile | None) -> str | None:
        """The engine that runs this type with this model."""
        if model is not None:
            engine = self._engine_of(model)
            return engine if engine is not None and job_type in self._infos[engine]["job_types"] else None
        return next((name for name in sorted(self._infos) if job_type in self._infos[name]["job_types"]), None)

    def version_of(self, engine: str) -> str:
        """Version of an engine."""
        return str(self._infos[engine]["version"])

    def _engine_of(self, file: ModelFile) -> str | None:
        for name in sorted(self._infos):
            info = self._infos[name]
            if file.name in info["builtin_models"]:
                return name
            if file.path is not None and file.architecture in info["architectures"]:
                return name
        return None


def _builtin_family(info: Mapping[str, Any]) -> str | None:
    families = info["architectures"]
    return families[0] if families else None


def model_fields(file: ModelFile | None) -> dict[str, Any] | None:
    """A model file for a slot's frame."""
    if file is None:
        return None
    return {**asdict(file), "path": None if file.path is None else str(file.path)}
