"""Which node brings a file of the buckets, and what a waiting job is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from fleet_server.domain.feasibility import Refusal, Refused
from fleet_server.domain.fetching import NO_SHELF, ShelfFile, best_fetch, cold_fetch_seconds, fetch_plan
from fleet_server.domain.job import Lane
from fleet_server.domain.node import Loadable, NodeStatus, NodeView
from fleet_server.domain.outlook import look
from fleet_server.domain.placement import Situation
from fleet_server.domain.ranking import NO_TIMING
from fleet_server.domain.speeds import SpeedBook
from tests.unit.placing import LANE, NODE, NOW, Waiting

ABLE = replace(NODE, loadable=(Loadable("sketch", ("sketch",), ("image_gen",)),))
FAR = ShelfFile("far", "checkpoint", 1_000_000_000, "e1", architecture="sketch")
WORDS = ShelfFile("words", "lora", 1_000_000, "e2", architecture="sketch")
WANTS = replace(LANE, lane_id="l2", model="far")


@dataclass
class Shelf:
    """Buckets with these files."""

    files: tuple[ShelfFile, ...] = (FAR, WORDS)
    troubles: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def find(self, kind: str, name: str) -> ShelfFile | None:
        return next((file for file in self.files if (file.kind, file.name) == (kind, name)), None)

    def trouble(self, node_id: str, kind: str, name: str) -> str | None:
        return self.troubles.get((node_id, kind, name))


def refusal(node: NodeView, lane: Lane, shelf: Shelf) -> Refusal:
    plan = fetch_plan(node, lane, shelf)
    assert isinstance(plan, Refusal)
    return plan


def test_what_is_missing_is_brought() -> None:
    assert fetch_plan(ABLE, WANTS, Shelf()) == (FAR,)
    assert fetch_plan(ABLE, replace(WANTS, loras=("ink", "words")), Shelf()) == (FAR, WORDS)
    assert fetch_plan(ABLE, replace(LANE, loras=("words",)), Shelf()) == (WORDS,)
    assert fetch_plan(ABLE, LANE, Shelf()) == ()


@pytest.mark.parametrize(
    ("node", "lane", "shelf", "reason", "words"),
    [
        (ABLE, WANTS, Shelf(()), Refused.MODEL_MISSING, "does not have the model far"),
        (NODE, WANTS, Shelf(), Refused.MODEL_MISSING, "brings none from S3"),
        (ABLE, WANTS, Shelf((replace(FAR, architecture="sdxl"),)), Refused.MODEL_MISSING, "no engine of it loads that"),
        (ABLE, WANTS, Shelf((replace(FAR, architecture=""),)), Refused.MODEL_MISSING, "architecture is unknown"),
        (replace(ABLE, largest_file_bytes=999), WANTS, Shelf(), Refused.MODEL_MISSING, "more than its budget"),
        (ABLE, WANTS, Shelf(troubles={("agx0", "checkpoint", "far"): "hm"}), Refused.MODEL_MISSING, "^hm$"),
        (ABLE, replace(LANE, loras=("none",)), Shelf(), Refused.LORA_MISSING, "LoRA none"),
        (ABLE, replace(WANTS, loras=("none",)), Shelf(), Refused.MODEL_MISSING, "model far"),
        (replace(ABLE, status=NodeStatus.DOWN), WANTS, Shelf(), Refused.OFFLINE, "down"),
        (replace(ABLE, cordoned=True), WANTS, Shelf(), Refused.CORDONED, "uncordon"),
        (replace(ABLE, gpu_memory_bytes=10**9), WANTS, Shelf(), Refused.VRAM_TOO_SMALL, "needs 1.0 GiB"),
        (replace(ABLE, quarantined=frozenset({"far"})), WANTS, Shelf(), Refused.QUARANTINED, "again and again"),
        (ABLE, replace(WANTS, job_type="video_gen"), Shelf(), Refused.CAPABILITY_MISSING, "no ready engine"),
        (ABLE, replace(WANTS, node_id="other"), Shelf(), Refused.PINNED_ELSEWHERE, "other only"),
    ],
)
def test_why_a_node_brings_nothing(node: NodeView, lane: Lane, shelf: Shelf, reason: Refused, words: str) -> None:
    found = refusal(node, lane, shelf)
    assert found.reason is reason
    assert found.detail == words.strip("^$") if words[0] == "^" else words in found.detail


def test_a_model_that_some_engine_loads_but_not_for_this_type_is_not_brought() -> None:
    other = replace(ABLE, loadable=(Loadable("sketch", ("sketch",), ("video_gen",)),))
    assert refusal(other, WANTS, Shelf()).reason is Refused.CAPABILITY_MISSING


def test_nothing_is_brought_where_a_node_has_it_busy_or_not() -> None:
    has = replace(
        ABLE, node_id="has", slots_free=0, models={**NODE.models, "far": replace(NODE.models["big"], name="far")}
    )
    assert best_fetch([ABLE, has], WANTS, Shelf(), NO_TIMING, NOW) is None
    away = replace(has, status=NodeStatus.DISCONNECTED)
    found = best_fetch([ABLE, away], WANTS, Shelf(), NO_TIMING, NOW)
    assert found is not None and found[0] is ABLE
    assert best_fetch([NODE], WANTS, Shelf(), NO_TIMING, NOW) is None
    assert best_fetch([ABLE], WANTS, NO_SHELF, NO_TIMING, NOW) is None


def test_the_node_that_is_ready_first_brings_it() -> None:
    book = SpeedBook()
    book.fetched("slow", 10_000_000, 1)
    book.fetched("fast", 500_000_000, 1)
    slow, fast = (replace(ABLE, node_id=name) for name in ("slow", "fast"))
    found = best_fetch([slow, fast], WANTS, Shelf(), book, NOW)
    assert found is not None and found[0] is fast
    # It comes while the node is still at work, so a slot that is soon free costs nothing.
    soon = replace(fast, slots_free=0, free_at_ms=(NOW + 1_500,))
    late = replace(fast, slots_free=0, free_at_ms=(NOW + 500_000,))
    book.fetched("mid", 333_000_000, 1)
    found = best_fetch([slow, soon, replace(ABLE, node_id="mid")], WANTS, Shelf(), book, NOW)
    assert found is not None and found[0] is soon
    found = best_fetch([slow, late], WANTS, Shelf(), book, NOW)
    assert found is not None and found[0] is slow
    half = replace(slow, node_id="slow", models={**slow.models, "words": replace(NODE.models["ink"], name="words")})
    found = best_fetch([half, replace(ABLE, node_id="x")], replace(LANE, loras=("words",)), Shelf(), book, NOW)
    assert found is None


def test_of_nodes_alike_all_replicas_choose_the_same() -> None:
    nodes = [replace(ABLE, node_id=name) for name in ("c", "a", "b")]
    for order in (nodes, nodes[::-1]):
        found = best_fetch(order, WANTS, Shelf(), NO_TIMING, NOW)
        assert found is not None and found[0].node_id == "a"


def test_a_cold_cost_is_the_download_and_the_load() -> None:
    book = SpeedBook()
    book.fetched("agx0", 200_000_000, 1)
    assert cold_fetch_seconds(ABLE, WANTS, (FAR,), book) == pytest.approx(5 + 1e9 / 400e6)
    assert cold_fetch_seconds(ABLE, WANTS, (FAR,), NO_TIMING) == pytest.approx(10 + 1e9 / 400e6)


def test_speeds_of_downloads_are_kept() -> None:
    book, again = SpeedBook(), SpeedBook()
    book.fetched("agx0", 100, 1)
    book.fetched("agx0", 300, 1)
    assert book.fetch_speed(ABLE) == 200
    assert book.fetch_speed(replace(ABLE, node_id="new")) == pytest.approx(140)
    again.restore("agx0", book.dump("agx0"))
    assert again.fetch_speed(ABLE) == 200
    again.forget("agx0")
    assert again.fetch_speed(ABLE) == 200, "the fleet's"
    assert SpeedBook().fetch_speed(ABLE) is None


def verdicts(nodes: list[NodeView], shelf: Shelf) -> dict[str, tuple[bool, str, float | None]]:
    situation = Situation(nodes, [Waiting(WANTS)], NOW)
    outlook = look(nodes, WANTS, situation, timing=NO_TIMING, run_seconds=lambda node: None, shelf=shelf)
    return {one.node_id: (one.refusal is None, one.detail, one.load_seconds) for one in outlook.verdicts}


def test_an_explanation_names_the_download() -> None:
    able, detail, seconds = verdicts([ABLE], Shelf())["agx0"]
    assert able and detail == "brings far from S3 first: 1,000 MB, about 10 s"
    assert seconds == pytest.approx(12.5)
    has = replace(ABLE, node_id="has", models={**NODE.models, "far": replace(NODE.models["big"], name="far")})
    both = verdicts([ABLE, has], Shelf())
    assert both["has"][0] and not both["agx0"][0]
    assert both["agx0"][1] == "it does not have the model far"
    sick = Shelf(troubles={("agx0", "checkpoint", "far"): "it could not bring far from S3 (DISK_FULL: no room)"})
    assert verdicts([ABLE], sick)["agx0"][:2] == (False, "it could not bring far from S3 (DISK_FULL: no room)")
