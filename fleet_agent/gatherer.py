"""Which of a slot's tasks are run together: those that wait, and are alike for their engine."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeGuard

from fleet_agent.engines.base import Engine, EngineError
from fleet_agent.engines.batch import BatchEngine
from fleet_agent.frames import Message
from fleet_agent.slot_tasks import task_of

_ALIKE = ("engine", "model", "loras")


class Gatherer:
    """Takes messages of `work`, in their order but that what joins a batch comes early. For one thread.

    `most` tasks at once; the first of a batch waits up to `wait_seconds` for others, which is little beside what a
    batch takes. Exclusive work runs alone, since its process may be ended at the end of its lease.
    """

    def __init__(
        self,
        work: queue.SimpleQueue[Message],
        engine: Callable[[str, str | None], Engine],
        most: int,
        wait_seconds: float,
    ) -> None:
        self._work = work
        self._engine = engine
        self._most = most
        self._wait = wait_seconds
        self._batching: dict[type[Engine], bool] = {}
        self._later: deque[Message] = deque()

    def next(self) -> list[Message]:
        """What to do next: tasks to run together, or one message of any kind. Waits until there is one."""
        first = self._later.popleft() if self._later else self._work.get()
        if self._most == 1 or first["do"] != "run" or first.get("lease_until") is not None:
            return [first]
        try:
            limit, key = self._judge(first)
        except Exception:
            # What it does not understand it says when it is asked to run it.
            return [first]
        batch = [first]
        self._take_waiting(batch, min(limit, self._most), key)
        deadline = time.monotonic() + self._wait
        while len(batch) < min(limit, self._most) and not any(one["do"] != "run" for one in self._later):
            try:
                message = self._work.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            (batch if self._joins(message, key) else self._later).append(message)
        return batch

    def _take_waiting(self, batch: list[Message], limit: int, key: Any) -> None:
        """Those put off earlier, up to the first that is no task: loading and unloading keep their places."""
        kept: deque[Message] = deque()
        while self._later and len(batch) < limit and self._later[0]["do"] == "run":
            message = self._later.popleft()
            (batch if self._joins(message, key) else kept).append(message)
        self._later.extendleft(reversed(kept))

    def _joins(self, message: Message, key: Any) -> bool:
        if message["do"] != "run" or message.get("lease_until") is not None:
            return False
        try:
            return bool(self._judge(message)[1] == key)
        except Exception:
            return False

    def _judge(self, message: Message) -> tuple[int, Any]:
        """How many like this one may run together, and what they have in common. Raises what the engine does."""
        model = message["model"]
        engine = self._engine(message["engine"], None if model is None else model["name"])
        if not self._batches(engine):
            raise EngineError("INVALID_FIELD", "this engine runs one task at a time")
        task = task_of(message)
        return engine.batch_limit(task), (*(message[name] for name in _ALIKE), engine.batch_key(task))

    def _batches(self, engine: Engine) -> TypeGuard[BatchEngine]:
        """Whether it can run several; asked once of a class, since a protocol's names are looked up one by one."""
        kind = type(engine)
        if kind not in self._batching:
            self._batching[kind] = isinstance(engine, BatchEngine)
        return self._batching[kind]
