"""Finds engines: the built-in ones and those of the entry-point group `fleet.engines`.

A plug-in that does not import, start or answer `info()` is reported with its error and left out; it never takes
the agent with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from fleet_agent.engines.base import (
    ENTRY_POINT_GROUP,
    Engine,
    EngineError,
    EngineFactory,
    EngineInfo,
    EngineSettings,
)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One engine as the node reports it: `ready`, or `failed` with `detail` saying why."""

    name: str
    version: str
    status: Literal["ready", "failed"]
    detail: str | None
    job_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Registry:
    """The engines that work here, by name, and the status of every one that was asked for."""

    engines: Mapping[str, Engine]
    infos: Mapping[str, EngineInfo]
    statuses: tuple[EngineStatus, ...]

    def for_job_type(self, job_type: str) -> str | None:
        """Return the name of the first engine, by name, that runs this job type."""
        return next((name for name in sorted(self.infos) if job_type in self.infos[name].job_types), None)


def _sketch(settings: EngineSettings) -> Engine:
    from fleet_agent.engines.sketch.engine import SketchEngine

    return SketchEngine(settings)


def _fixed(settings: EngineSettings) -> Engine:
    from fleet_agent.engines.fixed import FixedEngine

    return FixedEngine(settings)


def _comfyui(settings: EngineSettings) -> Engine:
    from fleet_agent.engines.comfyui.engine import ComfyUIEngine

    return ComfyUIEngine(settings)


def _openai(settings: EngineSettings) -> Engine:
    from fleet_agent.engines.openai.engine import OpenAIEngine

    return OpenAIEngine(settings)


def _sdxl_trt(settings: EngineSettings) -> Engine:
    from fleet_agent.engines.sdxl_trt import SdxlTrtEngine

    return SdxlTrtEngine(settings)


def _diffusers(settings: EngineSettings) -> Engine:
    from fleet_agent.engines.diffusers.engine import DiffusersEngine

    return DiffusersEngine(settings)


def _container(settings: EngineSettings) -> Engine:
    from fleet_agent.engines.container.engine import ContainerEngine

    return ContainerEngine(settings)


BUILT_IN: Mapping[str, EngineFactory] = {
    "sketch": _sketch,
    "fixed": _fixed,
    "comfyui": _comfyui,
    "openai": _openai,
    "sdxl_trt": _sdxl_trt,
    "diffusers": _diffusers,
    "container": _container,
}
ONLY_WHEN_ASKED = frozenset({"fixed", "diffusers"})
NEEDS: Mapping[str, str] = {
    "comfyui": "comfyui_url",
    "openai": "openai_url",
    "sdxl_trt": "sdxl_trt_urls",
    "container": "docker",
}
"""Engines that are made where this option is given, or when asked for by name."""


def by_default(options: Mapping[str, str]) -> list[str]:
    """The built-in engines that run where none is asked for."""
    names = [name for name in BUILT_IN if name not in ONLY_WHEN_ASKED]
    return [name for name in names if name not in NEEDS or options.get(NEEDS[name])]


def installed() -> list[metadata.EntryPoint]:
    """Return the entry points of installed plug-ins, sorted by name."""
    return sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name)


def discover(
    settings: EngineSettings,
    wanted: Sequence[str] | None = None,
    *,
    plugins: Iterable[metadata.EntryPoint] | None = None,
) -> Registry:
    """Make the engines named by `wanted`, or, when it is None, those of `by_default` and all plug-ins.

    A plug-in of a built-in engine's name is refused: two engines of one name would hide each other.
    """
    engines: dict[str, Engine] = {}
    infos: dict[str, EngineInfo] = {}
    failed: dict[str, EngineStatus] = {}
    entries: dict[str, list[metadata.EntryPoint]] = {}
    for entry in installed() if plugins is None else plugins:
        entries.setdefault(entry.name, []).append(entry)
    if wanted is None:
        wanted = [*by_default(settings.options), *entries]
    for name in sorted(set(wanted)):
        try:
            engine, info = _make(name, entries.get(name, []), settings)
        except (Exception, SystemExit) as error:
            failed[name] = EngineStatus(name, "", "failed", _describe(error), ())
            continue
        engines[name], infos[name] = engine, info
    ready = {n: EngineStatus(n, i.version, "ready", i.detail, i.job_types) for n, i in infos.items()}
    statuses = tuple(sorted({**ready, **failed}.values(), key=lambda status: status.name))
    return Registry(engines, infos, statuses)


def create(name: str, settings: EngineSettings) -> Engine:
    """Make one engine by name: what a slot's child process calls. Raises what the plug-in raises."""
    entries = [entry for entry in installed() if entry.name == name]
    return _make(name, entries, settings)[0]


def _make(name: str, entries: Sequence[metadata.EntryPoint], settings: EngineSettings) -> tuple[Engine, EngineInfo]:
    engine: object = _factory(name, entries)(settings)
    if not isinstance(engine, Engine):
        made = type(engine).__name__
        raise EngineError("ENGINE_FAILED", f"the factory of {name!r} returned {made}, not an Engine")
    info: object = engine.info()
    if not isinstance(info, EngineInfo) or not info.job_types:
        raise EngineError("ENGINE_FAILED", f"info() of {name!r} must return an EngineInfo with a job type")
    return engine, info


def _factory(name: str, entries: Sequence[metadata.EntryPoint]) -> EngineFactory:
    if name in BUILT_IN:
        if entries:
            raise EngineError("ENGINE_FAILED", f"the plug-in {entries[0].value} takes the name of a built-in engine")
        return BUILT_IN[name]
    if not entries:
        raise EngineError(
            "ENGINE_FAILED",
            f"no engine named {name!r}: install a package with the entry point {ENTRY_POINT_GROUP}:{name}",
        )
    if len(entries) > 1:
        values = ", ".join(sorted(entry.value for entry in entries))
        raise EngineError("ENGINE_FAILED", f"several plug-ins are named {name!r}: {values}; uninstall all but one")
    factory: EngineFactory = entries[0].load()
    if not callable(factory):
        raise EngineError("ENGINE_FAILED", f"the entry point {entries[0].value} is not callable; name a factory")
    return factory


def _describe(error: BaseException) -> str:
    if isinstance(error, EngineError):
        return error.detail
    return f"{type(error).__name__}: {error}"[:500]
