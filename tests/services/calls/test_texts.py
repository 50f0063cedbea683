"""Texts as a listener is told of them: whatever ticks are lost, in order, each character once, all before the end."""

from __future__ import annotations

from fleet.v1 import types_pb2

from fleet_server.services.listener import Listener
from fleet_server.services.mailbox import EventFilter, Happening, Mailbox
from fleet_server.services.texts import Texts

LLM = types_pb2.JOB_TYPE_LLM_INFERENCE
TEXT = "one two three"


def tick(offset: int, text: str, attempt: int = 1) -> Happening:
    progress = types_pb2.JobProgress(job_id="j", generation=1, attempt=attempt, text=text, text_offset=offset)
    return Happening(types_pb2.Event(job_progress=progress), "job_progress", job_id="j")


def update(status: types_pb2.JobStatus.ValueType, attempt: int) -> Happening:
    job = types_pb2.Job(job_id="j", job_type=LLM, generation=1, attempt=attempt, status=status)
    return Happening(types_pb2.Event(job_update=job), "job_update", id="1-0", job_id="j")


def end(text: str = TEXT, attempt: int = 1, job_type: types_pb2.JobType.ValueType = LLM) -> Happening:
    result = types_pb2.JobResult(text=text)
    job = types_pb2.Job(job_id="j", job_type=job_type, generation=1, attempt=attempt, result=result)
    return Happening(types_pb2.Event(job_complete=job), "job_complete", id="9-0", job_id="j")


QUEUED, RUNNING = update(types_pb2.JOB_STATUS_QUEUED, 0), update(types_pb2.JOB_STATUS_RUNNING, 1)


def heard(*happenings: Happening) -> str:
    """The text put together as a client does it: each part at its place, none twice; it must end with the end."""
    texts, said = Texts(), ""
    told = [one for happening in happenings for one in texts.in_order(happening)]
    assert told[-1] is happenings[-1]
    for one in told:
        progress = one.event.job_progress
        if progress.HasField("text"):
            if progress.text_offset == 0:
                said = ""
            assert (progress.text_offset, progress.job_id) == (len(said), "j")
            said += progress.text
    return said


def test_nothing_is_changed_where_nothing_is_lost() -> None:
    texts = Texts()
    for happening in (QUEUED, RUNNING, tick(0, "one "), tick(4, "two three"), end()):
        assert list(texts.in_order(happening)) == [happening]
        assert next(iter(texts.in_order(update(types_pb2.JOB_STATUS_FAILED, 1)))).kind == "job_update"


def test_what_is_lost_is_told_before_the_end() -> None:
    whole = [tick(0, "one "), tick(4, "two "), tick(8, "three")]
    for begun in ([QUEUED], [RUNNING], [QUEUED, RUNNING]):
        for lost in range(8):
            kept = [one for number, one in enumerate(whole) if not lost >> number & 1]
            assert heard(*begun, *kept, end()) == TEXT


def test_parts_that_overlap_are_told_once() -> None:
    assert heard(RUNNING, tick(0, "one t"), tick(4, "two "), tick(4, "two "), tick(2, "e two three"), end()) == TEXT


def test_another_attempt_begins_anew() -> None:
    again = [tick(0, "one ", attempt=2), end(attempt=2)]
    assert heard(RUNNING, tick(0, "uno due"), *again) == TEXT
    assert heard(RUNNING, tick(0, "uno due"), end(attempt=2)) == TEXT
    assert heard(
        RUNNING, tick(0, "uno"), update(types_pb2.JOB_STATUS_QUEUED, 1), tick(4, "two ", 2), end("one two ", 2)
    )


def test_who_comes_in_the_middle_begins_there() -> None:
    texts = Texts()
    middle = tick(4, "two ")
    assert list(texts.in_order(middle)) == [middle]
    rest, last = texts.in_order(end())
    assert (rest.event.job_progress.text, rest.event.job_progress.text_offset) == ("three", 8)
    assert rest.kind == "job_progress" and rest.id == "" and last.kind == "job_complete"


def test_texts_of_other_jobs_are_no_stream() -> None:
    heard_speech = end(job_type=types_pb2.JOB_TYPE_TRANSCRIPTION)
    assert list(Texts().in_order(heard_speech)) == [heard_speech]


def test_who_wants_no_progress_gets_none() -> None:
    box = Mailbox(EventFilter(kinds=frozenset({"job_complete"})), limit=8, ticks_limit=8)
    assert [one.kind for one in Listener(box, "0").news(end())] == ["job_complete"]


async def test_a_slow_listener_gets_the_parts_together() -> None:
    box = Mailbox(EventFilter(), limit=8, ticks_limit=8)
    for number in range(3):
        box.put_tick(tick(number, str(number)))
    last = await box.take()
    assert last is not None and (last.event.job_progress.text, last.event.job_progress.text_offset) == ("012", 0)
