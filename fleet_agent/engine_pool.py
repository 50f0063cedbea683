"""The engines of one slot. A pinned model has an engine of its own, so that no other model puts it out of memory."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from fleet_agent.engines.base import Engine, ModelFile


@dataclass(slots=True)
class _Own:
    """An engine that holds one model alone."""

    engine: Engine
    pinned: bool


class EnginePool:
    """Makes engines by name when they are first needed. For one thread."""

    def __init__(self, make: Callable[[str], Engine]) -> None:
        self._make = make
        self._shared: dict[str, Engine] = {}
        self._own: dict[tuple[str, str], _Own] = {}

    def engine(self, name: str, model: str | None) -> Engine:
        """The engine for a task with this model. One that is pinned no more makes room for another model now."""
        own = self._own.get((name, model or ""))
        if own is not None:
            return own.engine
        for key in [key for key, one in self._own.items() if key[0] == name and not one.pinned]:
            self._own.pop(key).engine.unload(key[1])
        return self._common(name)

    def load(self, name: str, model: ModelFile, *, pin: bool) -> None:
        """Has the model in memory; `pin`: for good, else until another takes its place. Raises what the engine does."""
        own = self._own.get((name, model.name))
        if own is not None:
            own.engine.load(model)
            own.pinned = pin
        elif not pin:
            engine = self.engine(name, model.name)
            if model.name not in _names(engine):
                engine.load(model)
        else:
            self._own[name, model.name] = _Own(self._alone(name, model), True)

    def unload(self, name: str, model: str) -> None:
        """Frees the model, pinned or not; nothing where it is not in memory."""
        own = self._own.pop((name, model), None)
        if own is not None:
            own.engine.unload(model)
        if name in self._shared:
            self._shared[name].unload(model)

    def loaded(self) -> list[dict[str, Any]]:
        """Models in memory, as frames carry them; an engine that cannot tell has none."""
        return [
            {"engine": name, "pinned": pinned, **asdict(model)}
            for name, engine, pinned in self._engines()
            for model in _loaded(engine)
        ]

    def _engines(self) -> Iterator[tuple[str, Engine, bool]]:
        for name, engine in self._shared.items():
            yield name, engine, False
        for (name, _), own in self._own.items():
            yield name, own.engine, own.pinned

    def _common(self, name: str) -> Engine:
        engine = self._shared.get(name)
        if engine is None:
            engine = self._shared[name] = self._make(name)
        return engine

    def _alone(self, name: str, model: ModelFile) -> Engine:
        """An engine with that model and no other in memory."""
        shared = self._shared.get(name)
        if shared is not None and _names(shared) == [model.name]:
            return self._shared.pop(name)
        engine = self._make(name)
        try:
            engine.load(model)
        except BaseException:
            with contextlib.suppress(Exception):
                engine.unload(model.name)
            raise
        if shared is not None:
            shared.unload(model.name)
        return engine


def _names(engine: Engine) -> list[str]:
    return [model.name for model in _loaded(engine)]


def _loaded(engine: Engine) -> list[Any]:
    try:
        return list(engine.loaded())
    except Exception:
        traceback.print_exc()
        return []
