"""What a callback says: the job as events show it, in less than 20 kB."""

from __future__ import annotations

from collections.abc import Callable

import orjson
from fleet.v1 import types_pb2

from fleet_server.protojson import JsonCodec

LIMIT_BYTES = 20_000
KEPT_OUTPUTS = 16
_KEPT_DETAIL = 1_000


def _attempts(job: types_pb2.Job) -> None:
    job.ClearField("attempts")


def _text(job: types_pb2.Job) -> None:
    job.result.ClearField("text")


def _segments(job: types_pb2.Job) -> None:
    job.result.ClearField("segments")


def _later_outputs(job: types_pb2.Job) -> None:
    del job.result.outputs[KEPT_OUTPUTS:]


def _long_words(job: types_pb2.Job) -> None:
    """Beyond the contract's list, so that the limit holds whatever an engine said."""
    job.ClearField("target_labels")
    if job.HasField("error"):
        job.error.detail = job.error.detail[:_KEPT_DETAIL]


def _outputs(job: types_pb2.Job) -> None:
    job.result.ClearField("outputs")


_EMPTYING: tuple[Callable[[types_pb2.Job], None], ...] = (
    _attempts,
    _text,
    _segments,
    _later_outputs,
    _long_words,
    _outputs,
)
"""What is left out, one after the other, until the rest is short enough."""


def callback_body(codec: JsonCodec, job: types_pb2.Job) -> bytes:
    """The body of a callback, the same at every try: `type`, `timestamp` (the job's end) and `data`."""
    kept = types_pb2.Job()
    kept.CopyFrom(job)
    end = codec.encode_field(kept, types_pb2.Job.DESCRIPTOR.fields_by_name["end_time"])

    def body() -> bytes:
        return orjson.dumps({"type": "job.complete", "timestamp": end, "data": codec.encode(kept)})

    made = body()
    for empty in _EMPTYING:
        if len(made) < LIMIT_BYTES:
            break
        empty(kept)
        made = body()
    return made
