"""Model files on their way from the buckets to nodes: for callers, or because jobs wait that no node can run."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from fleet.v1 import command_pb2, types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.fetching import ShelfFile, best_fetch, fetch_plan
from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeView
from fleet_server.domain.placement import Situation
from fleet_server.domain.speeds import Timing
from fleet_server.services.bucket_shelf import BUCKET_OF, BucketShelf

_log = structlog.get_logger("fleet.models")
Tell = Callable[[types_pb2.OperationProgress], None]
Fetch = tuple[str, str, str]
"""Node, kind and name."""


class Runs(Protocol):
    """What is asked of `Commands`."""

    async def run(
        self,
        node_id: str,
        command: command_pb2.Command,
        *,
        timeout: float,  # noqa: ASYNC109 - it travels with the command
        progress: Tell | None = None,
    ) -> command_pb2.CommandEnd: ...


class Measured(Protocol):
    """Where measured speeds are kept."""

    def fetched(self, node_id: str, size_bytes: int, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """`blame_seconds` after its first failure a node is asked again, twice as long after each next one, at most
    `longest_blame_seconds`."""

    timeout_seconds: float = 3_600.0
    look_seconds: float = 1.0
    """A lane is looked at so often."""
    settle_seconds: float = 10.0
    """So long a node that has brought a file may take to name it in its inventory."""
    patience_seconds: float = 5.0
    """So long a lane is left to the replica that holds the best node's stream."""
    blame_seconds: float = 5.0
    longest_blame_seconds: float = 300.0


@dataclass(slots=True)
class _Look:
    """What is known of a lane that no node can run."""

    looked: float = -math.inf
    since: float = 0.0
    settled: float = -math.inf
    task: asyncio.Task[None] | None = None


class Fetches:
    """Each file is brought to a node once, however many ask. `here` says whether this replica holds a node's stream;
    `tell` hears of progress."""

    def __init__(
        self,
        commands: Runs,
        shelf: BucketShelf,
        measured: Measured,
        timing: Timing,
        *,
        here: Callable[[str], bool],
        tell: Tell,
        settings: FetchSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._commands = commands
        self._shelf = shelf
        self._measured = measured
        self._timing = timing
        self._here = here
        self._tell = tell
        self._settings = settings or FetchSettings()
        self._clock = clock
        self._under_way: dict[Fetch, asyncio.Task[vision_pb2.ModelDownload]] = {}
        self._lanes: dict[str, _Look] = {}
        self._failures: dict[Fetch, int] = {}

    async def aclose(self) -> None:
        """Gives up waiting; the nodes go on by themselves."""
        tasks: list[asyncio.Task[Any]] = [*self._under_way.values()]
        tasks += [look.task for look in self._lanes.values() if look.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def bring(self, node_id: str, file: ShelfFile, request_id: str | None = None) -> vision_pb2.ModelDownload:
        """Has the node bring the file, or joins who has it do so; cancelling it does not end the download.

        Raises what `Commands.run` does: the node's word on why it could not among it.
        """
        key = node_id, file.kind, file.name
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(
                self._run(node_id, file, request_id), name=f"fetch {file.name}"
            )
            task.add_done_callback(lambda done: self._over(key, done))
        return await asyncio.shield(task)

    @property
    def watching(self) -> bool:
        """Whether there is anything to bring."""
        return not self._shelf.empty

    def consider(self, situation: Situation) -> None:
        """Looks for lanes whose jobs no node can run without a file of the buckets; never waits."""
        if not self.watching:
            return
        now = self._clock()
        for demand in situation.demands:
            lane = demand.lane
            if demand.waiting > 0 and not demand.paused and (lane.model or lane.loras):
                self._consider(lane, situation, now)
        if len(self._lanes) > 4_096:
            self._lanes = {lane_id: look for lane_id, look in self._lanes.items() if look.task is not None}

    def _consider(self, lane: Lane, situation: Situation, now: float) -> None:
        look = self._lanes.get(lane.lane_id)
        if look is not None and (look.task is not None or now < look.settled):
            return
        if look is not None and now - look.looked < self._settings.look_seconds:
            return
        found = best_fetch(situation.nodes, lane, self._shelf, self._timing, situation.now_ms)
        if found is None or self._comes_already(situation.nodes, lane):
            self._lanes.pop(lane.lane_id, None)
            return
        if look is None:
            look = self._lanes[lane.lane_id] = _Look(since=now)
        look.looked = now
        node, files = found
        if not self._here(node.node_id):
            if now - look.since < self._settings.patience_seconds:
                return
            mine = [one for one in situation.nodes if self._here(one.node_id)]
            found = best_fetch(mine, lane, self._shelf, self._timing, situation.now_ms)
            if found is None:
                return
            node, files = found
        look.task = asyncio.create_task(self._bring_all(node.node_id, files), name=f"fetch for lane {lane.lane_id}")
        look.task.add_done_callback(lambda _: self._settle(look))

    def _comes_already(self, nodes: Iterable[NodeView], lane: Lane) -> bool:
        """Whether all that a node lacks is on its way there."""
        if not self._under_way:
            return False
        for node in nodes:
            plan = fetch_plan(node, lane, self._shelf)
            if isinstance(plan, tuple) and all(
                (node.node_id, file.kind, file.name) in self._under_way for file in plan
            ):
                return True
        return False

    def _settle(self, look: _Look) -> None:
        failed = look.task is None or look.task.cancelled() or look.task.exception() is not None
        look.task = None
        if not failed:
            look.settled = self._clock() + self._settings.settle_seconds

    async def _bring_all(self, node_id: str, files: tuple[ShelfFile, ...]) -> None:
        for file in files:
            _log.info("a model is brought for jobs that wait", node_id=node_id, name=file.name, bytes=file.size_bytes)
            await self.bring(node_id, file)

    async def _run(self, node_id: str, file: ShelfFile, request_id: str | None) -> vision_pb2.ModelDownload:
        command = command_pb2.Command(
            download=command_pb2.DownloadFile(
                name=file.name,
                kind=file.kind,
                reference=f"s3://{BUCKET_OF[file.kind]}/{file.name}",
                size_bytes=file.size_bytes,
                sha256=file.sha256,
                etag=file.etag,
            )
        )
        key, begun = (node_id, file.kind, file.name), self._clock()

        def heard(progress: types_pb2.OperationProgress) -> None:
            if request_id is not None:
                progress.request_id = request_id
            self._tell(progress)

        try:
            end = await self._commanded(node_id, command, heard)
        except FleetError as error:
            self._failed(key, file, error)
            heard(self._last(node_id, file, 0, f"failed: {error.detail}"))
            raise
        self._failures.pop(key, None)
        if end.download.status == "downloaded":
            self._measured.fetched(node_id, file.size_bytes, self._clock() - begun)
        heard(self._last(node_id, file, file.size_bytes, end.download.status))
        return end.download

    async def _commanded(self, node_id: str, command: command_pb2.Command, heard: Tell) -> command_pb2.CommandEnd:
        seconds = self._settings.timeout_seconds
        try:
            return await self._commands.run(node_id, command, timeout=seconds, progress=heard)
        except FleetError as error:
            if error.reason != "OUTCOME_UNKNOWN":
                raise
        # The agent fell over it. A download may be begun again: what is there is there, or goes on where it was.
        return await self._commands.run(node_id, command, timeout=seconds, progress=heard)

    def _failed(self, key: Fetch, file: ShelfFile, error: FleetError) -> None:
        count = self._failures[key] = min(self._failures.get(key, 0) + 1, 20)
        settings = self._settings
        seconds = min(settings.blame_seconds * 2 ** (count - 1), settings.longest_blame_seconds)
        words = f"it could not bring {file.name} from S3 ({error.reason}: {error.detail}); tried again in {seconds:g} s"
        self._shelf.blame(key[0], file, words, seconds)
        _log.warning(
            "a model was not brought", node_id=key[0], name=file.name, reason=error.reason, detail=error.detail
        )

    def _over(self, key: Fetch, done: asyncio.Task[vision_pb2.ModelDownload]) -> None:
        self._under_way.pop(key, None)
        if not done.cancelled():
            # Marks it as seen where nobody waits any more.
            done.exception()

    @staticmethod
    def _last(node_id: str, file: ShelfFile, done: int, message: str) -> types_pb2.OperationProgress:
        return types_pb2.OperationProgress(
            operation="model_download",
            node_id=node_id,
            name=file.name,
            progress=100,
            message=message,
            done_bytes=done,
            total_bytes=file.size_bytes,
        )
