"""Microseconds a message, JSON in and out: our converters against google.protobuf.json_format.

`python bench/codec.py [ROUNDS]`. The contenders take turns within each round, so that noise meets all alike; the
table shows median and range of the rounds. The readers are compared before anything is timed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import orjson
from fleet.v1 import queue_pb2, types_pb2
from google.protobuf import json_format
from google.protobuf.message import Message

from fleet_server.protojson import JsonCodec, loads

CALLS = 400
codec = JsonCodec()


def job() -> types_pb2.Job:
    """A finished job as the queue's list shows it."""
    message = types_pb2.Job(
        job_id="0198f2c4-7a1e-7c3b-9d52-3f0e8a6b1c2d",
        job_type=types_pb2.JOB_TYPE_IMAGE_GEN,
        status=types_pb2.JOB_STATUS_RUNNING,
        priority=types_pb2.JOB_PRIORITY_HIGH,
        generation=1,
        version=7,
        target_cluster="vision",
        target_model="SDXL_4GB_FP8.safetensors",
        resolved_model="sketch",
        target_labels={"zone": "a", "gpu": "agx"},
        eta_seconds=1.4,
        progress=50,
        step=10,
        steps=20,
        node_id="agx0",
        attempt=1,
        max_retries=3,
        timeout_seconds=3600,
        queue_ttl_seconds=604800,
        callback_url="https://your-app.com/webhook",
    )
    message.payload.update(
        {"prompt": "beautiful landscape", "width": 1024, "height": 1024, "steps": 20, "seed": 4021337, "cfg": 7.5}
    )
    message.create_time.FromJsonString("2026-11-22T10:00:00.120Z")
    message.start_time.FromJsonString("2026-11-22T10:00:00.310Z")
    message.update_time.FromJsonString("2026-11-22T10:00:01.020Z")
    message.timings.queued_seconds = 0.19
    return message


CREATE = orjson.dumps(
    {
        "job_type": "image_gen",
        "payload": {"prompt": "beautiful landscape", "width": 1024, "height": 1024, "steps": 20, "seed": 4021337},
        "priority": "high",
        "target_cluster": "vision",
        "target_labels": {"zone": "a"},
        "callback_url": "https://your-app.com/webhook",
        "max_retries": 3,
        "timeout_seconds": 3600,
    }
)


def us(work: Callable[[], object]) -> float:
    """Mean microseconds of a call."""
    start = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - start) / CALLS * 1e6


def contenders() -> dict[str, Callable[[], object]]:
    """What is timed."""
    message = job()
    text = codec.encode_bytes(message)
    plain = types_pb2.Job()
    plain.CopyFrom(message)
    plain.ClearField("payload")
    oracle = json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None)
    kind = types_pb2.Job.DESCRIPTOR
    create = queue_pb2.CreateJobRequest.DESCRIPTOR
    if codec.decode(kind, loads(text)) != json_format.Parse(oracle, types_pb2.Job()) or message != codec.decode(
        kind, loads(text)
    ):
        raise SystemExit("the readers disagree")
    upper = CREATE.replace(b'"image_gen"', b'"JOB_TYPE_IMAGE_GEN"').replace(b'"high"', b'"JOB_PRIORITY_HIGH"')

    def parse(body: bytes, into: type[Message]) -> Message:
        return json_format.Parse(body, into())

    return {
        "out  Job: codec": lambda: codec.encode_bytes(message),
        "out  Job: json_format to dict + orjson": lambda: orjson.dumps(
            json_format.MessageToDict(
                message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
        ),
        "out  Job: json_format": lambda: json_format.MessageToJson(
            message, preserving_proto_field_name=True, indent=None
        ),
        "out  Job without payload: codec": lambda: codec.encode_bytes(plain),
        "in   Job: codec": lambda: codec.decode(kind, loads(text)),
        "in   Job: json_format": lambda: parse(oracle.encode(), types_pb2.Job),
        "in   CreateJob: codec": lambda: codec.decode(create, loads(CREATE)),
        "in   CreateJob: json_format": lambda: parse(upper, queue_pb2.CreateJobRequest),
        "read Job text: loads": lambda: loads(text),
        "read Job text: orjson, not strict": lambda: orjson.loads(text),
        "read Job text: json with duplicate check": lambda: json.loads(text, object_pairs_hook=_no_duplicates),
    }


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def main() -> None:
    """Runs the rounds and prints the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    work = contenders()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, call in work.items():
            times[name].append(us(call))
    for name, taken in times.items():
        kept = sorted(taken[1:])  # The first round warms up.
        line = f"{name:44} {statistics.median(kept):8.1f} us  [{kept[0]:.1f} - {kept[-1]:.1f}]"
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
