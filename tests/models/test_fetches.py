"""Downloads that the server has nodes do: when, where, once; and what becomes of failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fleet.v1 import command_pb2, types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.fetching import ShelfFile
from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeView
from fleet_server.domain.placement import Situation
from fleet_server.domain.speeds import SpeedBook
from fleet_server.services.bucket_shelf import BucketShelf
from fleet_server.services.fetches import Fetches, FetchSettings
from fleet_server.storage.s3 import S3Store
from tests.models.test_fetching import ABLE, FAR, WANTS, WORDS
from tests.unit.placing import NODE, NOW, Waiting
from tests.waiting import wait_until

ONE, TWO = replace(ABLE, node_id="n1"), replace(ABLE, node_id="n2")


@dataclass
class Nodes:
    """What nodes answer: nothing until `end` says so."""

    asked: list[tuple[str, command_pb2.DownloadFile]] = field(default_factory=list)
    _waiting: dict[tuple[str, str], asyncio.Future[str]] = field(default_factory=dict)

    async def run(
        self,
        node_id: str,
        command: command_pb2.Command,
        *,
        timeout: float,  # noqa: ASYNC109 - as in Commands
        progress: Callable[[types_pb2.OperationProgress], None] | None = None,
    ) -> command_pb2.CommandEnd:
        file = command.download
        self.asked.append((node_id, file))
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[node_id, file.name] = answer
        if progress is not None:
            progress(types_pb2.OperationProgress(operation="model_download", node_id=node_id, progress=50))
        status = await answer
        return command_pb2.CommandEnd(download=vision_pb2.ModelDownload(node_id=node_id, status=status))

    def end(self, node_id: str, name: str = "far", status: str | FleetError = "downloaded") -> None:
        answer = self._waiting.pop((node_id, name))
        if isinstance(status, FleetError):
            answer.set_exception(status)
        else:
            answer.set_result(status)

    @property
    def names(self) -> list[tuple[str, str]]:
        return [(node_id, file.name) for node_id, file in self.asked]


@dataclass
class Desk:
    """The service, with a clock of the test's."""

    nodes: Nodes
    shelf: BucketShelf
    fetches: Fetches
    book: SpeedBook
    told: list[types_pb2.OperationProgress]
    here: set[str]
    now: float = 0.0

    def consider(self, nodes: Sequence[NodeView], *lanes: Lane, waiting: int = 1, paused: bool = False) -> None:
        demands = [Waiting(lane, waiting, paused=paused) for lane in lanes or (WANTS,)]
        self.fetches.consider(Situation(nodes, demands, NOW))


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    nodes, book, told, here = Nodes(), SpeedBook(), list[types_pb2.OperationProgress](), {"agx0", "n1", "n2"}
    shelf = BucketShelf(S3Store(None), tmp_path / "x", clock=lambda: made.now)
    shelf._files = {(file.kind, file.name): file for file in (FAR, WORDS)}
    fetches = Fetches(
        nodes,
        shelf,
        book,
        book,
        here=lambda node_id: node_id in here,
        tell=told.append,
        settings=FetchSettings(blame_seconds=10),
        clock=lambda: made.now,
    )
    made = Desk(nodes, shelf, fetches, book, told, here)
    yield made
    await fetches.aclose()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_jobs_that_no_node_can_run_have_the_best_node_bring_the_file_once(desk: Desk) -> None:
    desk.book.fetched("n1", 10**7, 1)
    desk.book.fetched("n2", 10**9, 1)
    for _ in range(5):
        desk.consider([ONE, TWO])
        await settled()
        desk.now += 2
    ((node_id, file),) = desk.nodes.asked
    assert node_id == "n2"
    assert file == command_pb2.DownloadFile(
        name="far", kind="checkpoint", reference="s3://fleet-models/far", size_bytes=FAR.size_bytes, etag="e1"
    )
    desk.now += 10
    desk.nodes.end("n2")
    await settled()
    assert desk.book.fetch_speed(TWO) == pytest.approx((10**9 + FAR.size_bytes / 20) / 2)
    # Until its next heartbeat the node does not name the file; it is not asked again meanwhile.
    desk.consider([ONE, TWO])
    await settled()
    assert len(desk.nodes.asked) == 1


async def test_model_and_loras_come_one_after_the_other(desk: Desk) -> None:
    lane = replace(WANTS, loras=("words",))
    desk.consider([ONE], lane)
    await settled()
    assert desk.nodes.names == [("n1", "far")]
    desk.nodes.end("n1")
    await settled()
    assert desk.nodes.names == [("n1", "far"), ("n1", "words")]
    assert desk.nodes.asked[1][1].reference == "s3://fleet-loras/words"


@pytest.mark.parametrize(("waiting", "paused"), [(0, False), (3, True)])
async def test_lanes_that_want_nothing_now_bring_nothing(desk: Desk, waiting: int, paused: bool) -> None:
    desk.consider([ONE], waiting=waiting, paused=paused)
    await settled()
    assert desk.nodes.asked == []


async def test_where_a_node_has_it_nothing_is_brought(desk: Desk) -> None:
    has = replace(ABLE, node_id="n2", slots_free=0, models={"far": replace(NODE.models["big"], name="far")})
    desk.consider([ONE, has])
    await settled()
    assert desk.nodes.asked == []


async def test_lanes_that_want_the_same_file_share_the_download(desk: Desk) -> None:
    desk.consider([ONE, TWO], WANTS)
    await settled()
    # By now another node would be the better one.
    busy = replace(ONE, slots_free=0, free_at_ms=(NOW + 500_000,))
    desk.consider([busy, TWO], replace(WANTS, lane_id="l3"), replace(WANTS, lane_id="l4", loras=("ink",)))
    await settled()
    assert desk.nodes.names == [("n1", "far")]
    # One that the first node may not run is brought to another.
    desk.consider([ONE, TWO], replace(WANTS, lane_id="l5", node_id="n2"))
    await settled()
    assert desk.nodes.names == [("n1", "far"), ("n2", "far")]


async def test_a_node_that_fails_is_passed_by_for_a_while_and_says_why(desk: Desk) -> None:
    desk.consider([ONE, TWO])
    await settled()
    desk.nodes.end("n1", status=FleetError("DISK_FULL", "no room"))
    await settled()
    words = desk.shelf.trouble("n1", "checkpoint", "far")
    assert words == "it could not bring far from S3 (DISK_FULL: no room); tried again in 10 s"
    desk.now += 2
    desk.consider([ONE, TWO])
    await settled()
    assert desk.nodes.names == [("n1", "far"), ("n2", "far")]
    desk.nodes.end("n2", status=FleetError("NODE_OFFLINE", "gone"))
    await settled()
    desk.now += 2
    desk.consider([ONE, TWO])
    await settled()
    assert len(desk.nodes.asked) == 2, "nobody is left"
    desk.now += 7
    desk.consider([ONE, TWO])
    await settled()
    assert desk.nodes.names[2:] == [("n1", "far")]
    desk.nodes.end("n1", status=FleetError("DISK_FULL", "no room"))
    await settled()
    assert str(desk.shelf.trouble("n1", "checkpoint", "far")).endswith("in 20 s")


async def test_the_replica_with_the_best_node_brings_it_and_another_only_when_it_does_not(desk: Desk) -> None:
    desk.here.discard("n1")
    desk.consider([ONE, TWO])
    await settled()
    assert desk.nodes.asked == []
    desk.now += 6
    desk.consider([ONE, TWO])
    await settled()
    assert desk.nodes.names == [("n2", "far")]


async def test_however_many_callers_ask_the_node_is_asked_once(desk: Desk) -> None:
    asking = [asyncio.create_task(desk.fetches.bring("n1", FAR, "r1")) for _ in range(5)]
    desk.consider([ONE])
    await settled()
    asking[0].cancel()
    await settled()
    assert desk.nodes.names == [("n1", "far")]
    desk.nodes.end("n1", status="present")
    assert {one.status for one in await asyncio.gather(*asking[1:])} == {"present"}
    assert [(one.progress, one.message, one.request_id) for one in desk.told] == [
        (50, "", "r1"),
        (100, "present", "r1"),
    ]
    assert desk.book.fetch_speed(ONE) is None, "what was there says nothing of speed"
    failing = asyncio.create_task(desk.fetches.bring("n1", FAR))
    await settled()
    desk.nodes.end("n1", status=FleetError("MODEL_NOT_FOUND", "gone"))
    with pytest.raises(FleetError, match="gone"):
        await failing
    assert desk.told[-1].progress == 100 and "failed: gone" in desk.told[-1].message


async def test_a_file_of_an_architecture_that_nobody_loads_is_left(desk: Desk) -> None:
    desk.shelf._files = {("checkpoint", "far"): ShelfFile("far", "checkpoint", 1, architecture="sdxl")}
    desk.consider([ONE])
    await wait_until(lambda: True)
    assert desk.nodes.asked == []


async def test_a_download_whose_outcome_is_unknown_is_asked_for_again_once(desk: Desk) -> None:
    unknown = FleetError("OUTCOME_UNKNOWN", "the agent fell")
    asking = asyncio.create_task(desk.fetches.bring("n1", FAR))
    await settled()
    desk.nodes.end("n1", status=unknown)
    await settled()
    desk.nodes.end("n1")
    assert (await asking).status == "downloaded" and len(desk.nodes.asked) == 2
    asking = asyncio.create_task(desk.fetches.bring("n1", FAR))
    await settled()
    desk.nodes.end("n1", status=unknown)
    await settled()
    desk.nodes.end("n1", status=unknown)
    with pytest.raises(FleetError, match="fell"):
        await asking
