"""What is learned from work: speeds, loads, free slots, what is quarantined; and what survives a restart."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fleet.v1 import node_pb2 as pb
from fleet.v1 import types_pb2

from fleet_server.domain.job import Claim, JobRecord, JobState, Priority, WaitReason
from fleet_server.domain.node import LoadedView, ModelView, NodeStatus, NodeView
from fleet_server.domain.placement import Refused
from fleet_server.domain.quarantine import FAILURES, FIRST_SECONDS
from fleet_server.domain.speeds import Unit, Work
from fleet_server.services.lanes import lane_of
from fleet_server.services.speeds import UNKNOWN_RUN_SECONDS, Speeds, work_of
from fleet_server.store import Store
from tests.services.agents.agent import wait_until

NOW = 1_763_805_600_000
NODE = NodeView(
    "agx0",
    NodeStatus.ONLINE,
    clusters=frozenset({"vision"}),
    job_types=frozenset({"image_gen"}),
    engines=frozenset({"sketch"}),
    slots=2,
    slots_free=2,
    models={"sketch": ModelView("sketch", engine="sketch"), "ink": ModelView("ink", kind="lora")},
)
WARM = replace(NODE, loaded=(LoadedView("sketch"),))


def spec(steps: int = 10, **image: object) -> types_pb2.JobSpec:
    payload = types_pb2.ImagePayload(prompt="x", width=100, height=100, steps=steps, **image)  # type: ignore[arg-type]
    return types_pb2.JobSpec(
        job_type=types_pb2.JOB_TYPE_IMAGE_GEN,
        payload=types_pb2.Payload(image_gen=payload),
        target_cluster="vision",
        resolved_model="sketch",
    )


def claim(number: int, wanted: types_pb2.JobSpec | None = None) -> Claim:
    wanted = wanted or spec()
    record = JobRecord(
        f"job-{number}", JobState.RUNNING, WaitReason.NONE, "image_gen", Priority.NORMAL, "vision", "lane", "sketch",
        "", 1, 1, 1, 0, 3, 60_000, 60_000, NOW, NOW, NOW, node_id="agx0", spec=wanted.SerializeToString(),
    )  # fmt: skip
    return Claim(record, f"token-{number}")


def done(number: int, *, load: float = 0.0, run: float = 2.0, reason: str = "") -> pb.JobComplete:
    error = types_pb2.JobError(reason=reason) if reason else None
    return pb.JobComplete(
        job_id=f"job-{number}", token=f"token-{number}", load_seconds=load, run_seconds=run, error=error
    )


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.ms = NOW

    def __call__(self) -> int:
        return self.ms


def test_what_an_engine_measured_of_itself_counts_until_a_job_has_run() -> None:
    clock = Clock()
    speeds = Speeds(clock=clock)
    warmed = replace(NODE, loaded=(LoadedView("sketch", "sketch", pixel_steps_per_second=1_000.0),))
    speeds.seen(warmed, (), 2)
    assert speeds.book.speed("agx0", "sketch", "sketch", Unit.PIXEL_STEPS) == 1_000.0
    # Other nodes are guessed from it, as from any measurement.
    assert speeds.book.speed("other", "sketch", "sketch", Unit.PIXEL_STEPS) == 1_000.0
    speeds.sent(claim(1), warmed)
    speeds.taken("agx0", done(1, run=200.0))
    now = speeds.book.speed("agx0", "sketch", "sketch", Unit.PIXEL_STEPS)
    assert now is not None and 500.0 < now < 1_000.0
    speeds.seen(replace(warmed, slots_free=1), (), 1)
    assert speeds.book.speed("agx0", "sketch", "sketch", Unit.PIXEL_STEPS) == now
    speeds.seen(replace(warmed, loaded=(LoadedView("m", "e", pixel_steps_per_second=0.0),)), (), 2)
    assert speeds.book.speed("agx0", "m", "e", Unit.PIXEL_STEPS) is None


@pytest.mark.parametrize(
    ("payload", "work"),
    [
        ({"image_gen": types_pb2.ImagePayload(width=64, height=32, steps=5)}, Work(Unit.PIXEL_STEPS, 64 * 32 * 5)),
        (
            {"video_gen": types_pb2.VideoPayload(width=64, height=32, steps=5, frames=16)},
            Work(Unit.PIXEL_STEPS, 64 * 32 * 5 * 16),
        ),
        ({"llm_inference": types_pb2.LlmPayload(max_tokens=100)}, Work(Unit.TOKENS, 100)),
        ({"transcription": types_pb2.TranscriptionPayload(audio="input:x")}, Work(Unit.JOBS, 1)),
    ],
)
def test_work_is_counted_in_what_its_kind_has(payload: dict[str, object], work: Work) -> None:
    asked = types_pb2.Payload(**payload)  # type: ignore[arg-type]
    assert work_of(types_pb2.JobSpec(payload=asked)) == work


def test_speeds_and_loads_are_learned_from_reports() -> None:
    speeds = Speeds(clock=Clock())
    speeds.sent(claim(1), NODE)
    speeds.taken("agx0", done(1, load=8.0, run=2.0))
    lane = lane_of(spec())
    assert speeds.book.run_seconds(NODE, lane) == pytest.approx(2.0)
    assert speeds.book.measured_cold_seconds(NODE, "sketch") == 8.0
    # Twice the work takes twice as long.
    assert speeds.book.seconds(NODE, "sketch", work_of(spec(steps=20))) == pytest.approx(4.0)
    # What was in memory already says nothing of loads, and the time that a LoRA took is not the model's.
    speeds.sent(claim(2), WARM)
    speeds.taken("agx0", done(2, load=1.0, run=2.0))
    speeds.sent(claim(3, spec(loras=[types_pb2.LoraUse(name="ink")])), NODE)
    speeds.taken("agx0", done(3, load=9.0, run=2.0))
    assert speeds.book.measured_cold_seconds(NODE, "sketch") == 8.0


def test_a_node_is_guessed_from_what_it_has_run_and_what_others_have() -> None:
    """It is half as fast as the others with one model: so it is taken to be with the next."""
    book = Speeds(clock=Clock()).book
    job = Work(Unit.PIXEL_STEPS, 1e6)
    for other in range(20):
        book.ran(f"n{other}", "sketch", "sketch", job, 2.0)
        book.ran(f"n{other}", "big", "sketch", job, 10.0)
    book.ran("agx0", "sketch", "sketch", job, 4.0)
    guess = book.seconds(replace(NODE, models={}), "big", job)
    assert guess is not None and 19 < guess < 21
    assert book.seconds(NODE, "unheard of", job) is None


def test_a_report_counts_once_and_for_its_own_node() -> None:
    speeds = Speeds(clock=Clock())
    speeds.sent(claim(1), NODE)
    speeds.taken("other", done(1, run=50.0))
    speeds.taken("agx0", done(1, run=50.0))
    assert speeds.book.run_seconds(NODE, lane_of(spec())) is None


def test_taken_slots_are_expected_to_be_free_after_load_and_run() -> None:
    clock = Clock()
    speeds = Speeds(clock=clock)
    speeds.sent(claim(1), NODE)
    speeds.taken("agx0", done(1, load=8.0, run=2.0))
    speeds.sent(claim(2), NODE)
    speeds.sent(claim(3), WARM)
    busy = speeds.seen(NODE, ("job-2", "job-3"), 0)
    assert busy.free_at_ms == (NOW + 2_000, NOW + 10_000)
    assert busy.slots_free == 0
    assert speeds.seen(NODE, ("job-2", "job-3"), 0) is busy
    # What has left the node holds no slot; what nobody here sent is guessed.
    clock.ms += 1_000
    assert speeds.seen(NODE, ("job-2",), 1).free_at_ms == (NOW + 10_000,)
    unknown = NOW + 1_000 + int(UNKNOWN_RUN_SECONDS * 1000)
    assert speeds.seen(NODE, ("job-2", "job-9"), 0).free_at_ms == (NOW + 10_000, unknown)


def test_a_model_that_fails_to_load_again_and_again_is_quarantined_for_a_while() -> None:
    clock = Clock()
    speeds = Speeds(clock=clock)

    def fail(number: int, node: NodeView = NODE, reason: str = "ENGINE_FAILED") -> frozenset[str]:
        speeds.sent(claim(number), node)
        speeds.taken("agx0", done(number, reason=reason))
        return speeds.seen(NODE, (), 2).quarantined

    assert [fail(number) for number in range(FAILURES - 1)] == [frozenset()] * (FAILURES - 1)
    assert fail(7) == {"sketch"}
    assert Refused.QUARANTINED.value == "QUARANTINED"
    clock.ms += int(FIRST_SECONDS * 1000)
    assert speeds.seen(NODE, (), 2).quarantined == frozenset()
    # It stays suspect until it has worked.
    assert fail(8) == {"sketch"}
    clock.ms += int(2 * FIRST_SECONDS * 1000)
    speeds.sent(claim(9), NODE)
    speeds.taken("agx0", done(9))
    assert fail(10) == frozenset()


def test_what_says_nothing_of_the_node_puts_nothing_into_quarantine() -> None:
    speeds = Speeds(clock=Clock())
    for number in range(5):
        # In memory already; the job's own fault; one job alone.
        for node, reason, job in (
            (WARM, "ENGINE_FAILED", number),
            (NODE, "INVALID_FIELD", number),
            (NODE, "ENGINE_FAILED", 99),
        ):
            speeds.sent(claim(job), node)
            speeds.taken("agx0", done(job, reason=reason))
    assert speeds.seen(NODE, (), 2).quarantined == frozenset()


def test_a_deleted_node_leaves_nothing_behind() -> None:
    speeds = Speeds(clock=Clock())
    for number in range(FAILURES):
        speeds.sent(claim(number), NODE)
        speeds.taken("agx0", done(number, reason="ENGINE_FAILED"))
    speeds.sent(claim(8), NODE)
    speeds.taken("agx0", done(8, load=8.0))
    speeds.sent(claim(9), NODE)
    speeds.forget("agx0")
    assert speeds.book.dump("agx0") == {"speeds": [], "loads": {}}
    again = speeds.seen(NODE, (), 2)
    assert (again.quarantined, again.free_at_ms) == (frozenset(), ())


async def test_what_was_learned_survives_a_restart(store: Store) -> None:
    first = Speeds(clock=Clock(), shelf=store.speeds, write_seconds=0.01)
    running = asyncio.create_task(first.run())
    first.sent(claim(1), NODE)
    first.taken("agx0", done(1, load=8.0, run=2.0))

    async def kept() -> bool:
        return "agx0" in await store.speeds.read()

    await wait_until(kept)
    running.cancel()
    await asyncio.wait([running])
    await store.speeds.write({"broken": b"\xff", "odd": b"[1]"})
    second = Speeds(clock=Clock(), shelf=store.speeds, write_seconds=0.01)
    again = asyncio.create_task(second.run())
    await wait_until(lambda: second.book.measured_cold_seconds(NODE, "sketch") == 8.0)
    assert second.book.seconds(NODE, "sketch", work_of(spec())) == pytest.approx(2.0)
    again.cancel()
    await asyncio.wait([again])
