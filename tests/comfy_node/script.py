"""What a node has and how it behaves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.comfy_node import classes, files
from tests.comfy_node.execution import Failure


@dataclass
class Script:
    """What a node has and how it behaves; may be changed while it runs, from any thread."""

    checkpoints: tuple[str, ...] = ("base.safetensors",)
    loras: tuple[str, ...] = ()
    node_classes: Mapping[str, classes.Config] = field(default_factory=lambda: dict(classes.STANDARD))
    step_seconds: float | None = 0.0
    """Of each step; None: what the graph says."""
    previews: bool = True
    preview_bytes: int = 0
    """Previews are padded to so many."""
    failures: dict[str, list[Failure]] = field(default_factory=dict)
    """By class; each is used once."""
    hold_at: int | None = None
    """A graph waits before this step of its sampler (0: before each node without steps) until `release`."""
    queue_held: bool = False
    """No graph is begun."""
    frames_held: bool = False
    """Nothing is said on the sockets."""
    hold_paths: set[str] = field(default_factory=set)
    """Requests to these paths wait until `release`."""
    refuse: dict[str, int] = field(default_factory=dict)
    """Requests to these paths are answered with that status."""
    prompt_ids: str = "any"
    """`any`, `uuid` (as new versions: others are 400) or `ignored` (as old ones)."""
    vram_total: int = 25276514304
    vram_free: int = 23623368704
    held: threading.Event = field(default_factory=threading.Event)
    """Something waits for `release`."""

    def __post_init__(self) -> None:
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def release(self) -> None:
        """Lets all that waits go on, and holds nothing any more."""
        self.hold_at, self.queue_held, self.frames_held = None, False, False
        self.hold_paths = set()
        self.held.clear()
        self.wake()

    def wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(event.set)

    def on_release(self, event: asyncio.Event) -> None:
        self._waiting.append((asyncio.get_running_loop(), event))

    async def until(self, over: Callable[[], bool]) -> None:
        """Waits until a release, or what interrupts it, has made this true."""
        while not over():
            event = asyncio.Event()
            self.on_release(event)
            # A release by another thread may have come since the look.
            if over():
                return
            self.held.set()
            await event.wait()

    async def before_step(self, step: int, own_seconds: float, interrupted: Callable[[], bool]) -> None:
        await self.until(lambda: self.hold_at != step or interrupted())
        await asyncio.sleep(own_seconds if self.step_seconds is None else self.step_seconds)

    def failure(self, name: str) -> Failure | None:
        due = self.failures.get(name)
        return due.pop(0) if due else None

    def preview(self, step: int) -> bytes | None:
        return files.preview(step).ljust(self.preview_bytes, b"\0") if self.previews else None

    def known(self, name: str) -> classes.Config:
        return self.node_classes[name]
