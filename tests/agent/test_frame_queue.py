"""Frames of engines' own protocols on their way out: in order, bounded, their pictures limited, before the end."""

from __future__ import annotations

import json

from fleet.v1 import node_pb2

from fleet_agent import frame_queue
from fleet_agent.frame_queue import FrameQueue
from fleet_agent.outbox import Outbox


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _text(kind: str, token: str = "t", **data: object) -> node_pb2.AgentMessage:
    frame = node_pb2.EngineFrame(job_id=f"job-{token}", token=token, text=json.dumps({"type": kind, "data": data}))
    return node_pb2.AgentMessage(frame=frame)


_JPEG = bytes((0, 0, 0, 1, 0, 0, 0, 1))


def _picture(data: bytes = _JPEG, token: str = "t") -> node_pb2.AgentMessage:
    return node_pb2.AgentMessage(frame=node_pb2.EngineFrame(job_id=f"job-{token}", token=token, binary=data))


def _kinds(messages: list[node_pb2.AgentMessage]) -> list[str]:
    return [json.loads(one.frame.text)["type"] if one.frame.text else "picture" for one in messages]


def _all(queue: FrameQueue) -> list[node_pb2.AgentMessage]:
    found = []
    while (message := queue.take()) is not None:
        found.append(message)
    assert not queue
    return found


def test_frames_keep_their_order_over_attempts() -> None:
    queue = FrameQueue()
    for number in range(5):
        queue.put(_text("executing", token=f"t{number % 2}", n=number))
    assert [json.loads(one.frame.text)["data"]["n"] for one in _all(queue)] == [0, 1, 2, 3, 4]


def test_pictures_of_one_attempt_come_ten_times_a_second() -> None:
    queue = FrameQueue(clock := Clock())
    for _ in range(100):
        queue.put(_picture())
        queue.put(_picture(token="other"))
        clock.now += 0.01
    # And a few that came early.
    assert 20 <= len(_all(queue)) <= 2 * (10 + frame_queue.BURST + 1)


def test_results_that_come_as_frames_are_not_limited() -> None:
    """SaveImageWebsocket sends its pictures as PNG; texts are no pictures at all."""
    queue = FrameQueue(Clock())
    for _ in range(20):
        queue.put(_picture(bytes((0, 0, 0, 1, 0, 0, 0, 2))))
        queue.put(_picture(bytes((0, 0, 0, 3))))
    assert len(_all(queue)) == 40


def test_where_too_many_wait_pictures_give_way_first_and_then_progress() -> None:
    queue = FrameQueue(clock := Clock())
    queue.put(_text("execution_start"))
    for number in range(frame_queue.LIMIT):
        clock.now += 1
        queue.put(_picture() if number % 2 else _text("progress", n=number))
    queue.put(_text("executed"))
    kinds = _kinds(_all(queue))
    assert len(kinds) == frame_queue.LIMIT
    assert kinds[0] == "execution_start"
    assert kinds[-1] == "executed"
    assert kinds.count("progress") == frame_queue.LIMIT // 2
    for _ in range(frame_queue.LIMIT):
        queue.put(_text("progress_state"))
    queue.put(_text("executed"))
    assert _kinds(_all(queue)).count("executed") == 1


def test_it_is_bounded_in_bytes_too() -> None:
    queue = FrameQueue(clock := Clock())
    for _ in range(30):
        clock.now += 1
        queue.put(_picture(_JPEG + bytes((1 << 20) - 8)))
    assert len(_all(queue)) == frame_queue.LIMIT_BYTES >> 20


async def test_what_waits_of_an_attempt_goes_before_its_end() -> None:
    outbox = Outbox()
    for number in range(frame_queue.LAST_PROGRESS + 2):
        outbox.frame(_text("progress", n=number))
    for size in (8, 9 << 16, 9 << 16, 8):
        outbox.frame(_picture(_JPEG.ljust(size, b"x")))
    outbox.frame(_text("executed"))
    outbox.frame(_text("executing", token="other"))
    outbox.tick(node_pb2.AgentMessage(tick=node_pb2.JobTick(token="t", progress=50, text="ab", text_offset=3)))
    outbox.finish("t")
    outbox.control(node_pb2.AgentMessage(complete=node_pb2.JobComplete(token="t")))
    said = [await outbox.next() for _ in range(frame_queue.LAST_PROGRESS + 6)]
    assert said[0].WhichOneof("message") == "tick"
    *progress, large, last, executed, end, other = said[1:]
    assert [len(one.frame.binary) for one in (large, last)] == [9 << 16, 8], "of the pictures the last, in few bytes"
    told = [json.loads(one.frame.text)["data"]["n"] for one in progress]
    assert told == list(range(2, frame_queue.LAST_PROGRESS + 2)), "the last of the progress, in its order"
    assert json.loads(executed.frame.text)["type"] == "executed"
    assert end.HasField("complete")
    assert other.frame.token == "other"


async def test_texts_are_put_together_while_they_wait() -> None:
    outbox = Outbox()
    for at, text in ((0, "a"), (1, "bc")):
        outbox.tick(node_pb2.AgentMessage(tick=node_pb2.JobTick(token="t", text=text, text_offset=at)))
    outbox.tick(node_pb2.AgentMessage(tick=node_pb2.JobTick(token="t", progress=40)))
    tick = (await outbox.next()).tick
    assert (tick.text, tick.text_offset, tick.progress) == ("abc", 0, 40)
    outbox.tick(node_pb2.AgentMessage(tick=node_pb2.JobTick(token="t", text="d", text_offset=3)))
    tick = (await outbox.next()).tick
    assert (tick.text, tick.text_offset) == ("d", 3)
