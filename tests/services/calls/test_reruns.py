"""Outputs made again: the same record, seed and model file included, or a word on why not."""

from __future__ import annotations

from typing import Any

import pytest
from fleet.v1 import queue_pb2, types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.reruns import Reruns
from fleet_server.store import OutputRow
from tests.services.calls.desk import ALIAS, Desk, asked

SHA = "ab" * 32


def reruns(desk: Desk) -> Reruns:
    return Reruns(desk.store, desk.queue, desk.catalog, desk.filing.resolver)


async def again(desk: Desk, filename: str, key: str | None = None, **fields: Any) -> types_pb2.JobSpec:
    """The spec of the job that a rerun made."""
    request = asked(vision_pb2.RerunOutputRequest, filename=filename, **fields)
    receipt = await reruns(desk).rerun(request, owner="", key=key)
    return types_pb2.JobSpec.FromString((await desk.record(receipt.job_id)).spec)


async def made(desk: Desk, sha256: str = SHA, **payload: Any) -> tuple[OutputRow, types_pb2.JobSpec]:
    """An output through a job, recorded with the hash of its model file."""
    await desk.submit(payload={"prompt": "a sea", **payload})
    claim = await desk.start()
    row = await desk.complete(claim)
    record = types_pb2.Output.FromString(row.record)
    record.metadata.model_sha256 = sha256
    await desk.store.outputs.update(row.filename, record.SerializeToString())
    return row, types_pb2.JobSpec.FromString(claim.job.spec)


async def refused(desk: Desk, filename: str) -> FleetError:
    with pytest.raises(FleetError) as caught:
        await again(desk, filename)
    return caught.value


async def test_the_same_record_makes_the_same_job(desk: Desk) -> None:
    await desk.add_node()
    row, spec = await made(desk, width=128, steps=7, negative_prompt="", guidance_scale=3.5, n=1)
    new = await again(desk, row.filename, priority="high")
    assert new.payload == spec.payload and new.payload.image_gen.seed == spec.payload.image_gen.seed
    assert (new.target_cluster, new.target_model, new.resolved_model) == ("vision", ALIAS, "sketch")
    assert new.priority == types_pb2.JOB_PRIORITY_HIGH and not new.HasField("callback_url")
    assert (await again(desk, row.filename)).priority == types_pb2.JOB_PRIORITY_NORMAL


async def test_the_same_request_id_makes_one_job(desk: Desk) -> None:
    await desk.add_node()
    row, _ = await made(desk)
    request = asked(vision_pb2.RerunOutputRequest, filename=row.filename)
    one = await reruns(desk).rerun(request, owner="", key="k")
    assert (await reruns(desk).rerun(request, owner="", key="k")).job_id == one.job_id
    assert (await reruns(desk).rerun(request, owner="", key="l")).job_id != one.job_id


async def test_one_image_of_a_group_is_made_again_alone(desk: Desk) -> None:
    await desk.add_node()
    await desk.submit(payload={"prompt": "many", "n": 3, "seed": 10})
    claim = await desk.start()
    row = await desk.complete(claim)
    new = await again(desk, row.filename)
    assert (new.payload.image_gen.n, new.payload.image_gen.seed) == (1, 10) and not new.HasField("group_job_id")


async def test_the_model_is_known_by_its_hash(desk: Desk) -> None:
    await desk.add_node(models=("other",))
    row, _ = await made(desk, model="other")
    gone, _ = await made(desk, "cd" * 32, model="other")
    assert (await again(desk, row.filename)).resolved_model == "other"
    # Another file under the same name will not do; the same file under another name will.
    error = await refused(desk, gone.filename)
    assert error.reason == "MODEL_NOT_FOUND" and "cdcdcdcdcdcd" in error.detail
    await desk.add_node(models=("renamed",))
    new = await again(desk, row.filename)
    assert (new.target_model, new.resolved_model, new.payload.image_gen.model) == ("renamed", "renamed", "renamed")


async def test_where_the_hash_is_not_known_the_name_counts(desk: Desk) -> None:
    await desk.add_node()
    row, _ = await made(desk, "")
    assert (await again(desk, row.filename)).target_model == ALIAS


async def test_without_a_record_there_is_no_rerun(desk: Desk) -> None:
    await desk.add_node()
    bare = types_pb2.Output(filename="bare.png", content_type="image/png").SerializeToString()
    await desk.store.outputs.put(OutputRow("bare.png", "", 1, 1, bare, home="here"))
    assert (await refused(desk, "bare.png")).reason == "NO_RECORD"
    for name in ("nobody.png", "../x"):
        assert (await refused(desk, name)).reason == "OUTPUT_NOT_FOUND"
    # A large recipe is not kept with the output, but the job has it for as long as it is kept.
    row, spec = await made(desk)
    await desk.store.outputs.put(OutputRow("big.png", row.job_id, 1, 1, row.record, home="here"))
    assert (await again(desk, "big.png")).payload == spec.payload


async def test_an_input_from_another_job_is_named_itself(desk: Desk) -> None:
    await desk.add_node()
    parent = await desk.submit()
    first = await desk.complete(await desk.start())
    await desk.submit(after=[parent], payload={"prompt": "more", "init_image": f"job:{parent}"})
    row = await desk.complete(await desk.start())
    assert (await again(desk, row.filename)).payload.image_gen.init_image == f"output:{first.filename}"
    await desk.gallery.delete(first.filename)
    assert (await refused(desk, row.filename)).reason == "INPUT_NOT_FOUND"


async def test_who_may_not_submit_such_a_job_may_not_repeat_it(desk: Desk) -> None:
    await desk.add_node()
    request = asked(queue_pb2.CreateJobRequest, job_type="custom", payload={"engine": "x"})
    spec = types_pb2.JobSpec(job_type=request.job_type, payload=types_pb2.Payload(custom=request.payload))
    record = types_pb2.Output(filename="log.txt").SerializeToString()
    await desk.store.outputs.put(OutputRow("log.txt", "", 1, 1, record, making=spec.SerializeToString(), home="here"))

    def never(job_type: int) -> None:
        raise FleetError("SCOPE_MISSING", f"{job_type}")

    with pytest.raises(FleetError) as caught:
        await reruns(desk).rerun(
            asked(vision_pb2.RerunOutputRequest, filename="log.txt"), owner="", key=None, allowed=never
        )
    assert caught.value.reason == "SCOPE_MISSING"
    assert (await again(desk, "log.txt")).payload.custom == request.payload
