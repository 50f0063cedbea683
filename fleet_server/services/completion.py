"""The end of an attempt: an agent's report becomes the job's result, its outputs' records and one step in the store."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import structlog
from fleet.v1.node_pb2 import CompleteOutcome, JobComplete, UploadedOutput
from fleet.v1.types_pb2 import JobAttempt, JobError, JobResult, JobSpec, Output, OutputMetadata

from fleet_server.domain.errors import JOB_REASON_CODES, REASON_CODES, Code
from fleet_server.domain.job import JobRecord
from fleet_server.domain.retry import backoff_ms
from fleet_server.services.endings import Endings
from fleet_server.services.nodes import now_ms, set_time
from fleet_server.services.uploads import accepts_output, output_stem
from fleet_server.storage.outputs import LocalOutputs
from fleet_server.store import Completion, Outcome, OutputRow, Store

_log = structlog.get_logger("fleet.completion")

_OUTCOMES = {
    Outcome.OK: CompleteOutcome.COMPLETE_OUTCOME_OK,
    Outcome.ALREADY: CompleteOutcome.COMPLETE_OUTCOME_ALREADY,
    Outcome.REFUSED: CompleteOutcome.COMPLETE_OUTCOME_REFUSED,
}


def job_error(reason: str, detail: str) -> JobError:
    """A JobError with the code of its reason."""
    return JobError(
        detail=detail,
        code=(REASON_CODES.get(reason) or JOB_REASON_CODES.get(reason, Code.INTERNAL)).name,
        reason=reason,
    )


class Completions:
    """Settles reports of agents. Each report may come any number of times; it takes effect once.

    `taken(node_id, complete)` is called for each that did, once, for what is learned from it; it must not wait.
    """

    def __init__(
        self,
        store: Store,
        outputs: LocalOutputs,
        *,
        draw: Callable[[], float] = random.random,
        endings: Endings | None = None,
        taken: Callable[[str, JobComplete], None] = lambda node_id, complete: None,
    ) -> None:
        self._store = store
        self._outputs = outputs
        self._endings = endings or Endings()
        self._draw = draw
        self._taken = taken

    async def settle(self, node_id: str, complete: JobComplete, spec: bytes = b"") -> CompleteOutcome.ValueType:
        """What became of the report. Raises STORE_UNAVAILABLE: nothing is known yet, ask again.

        `spec` is the job's where the caller holds the attempt to be current: a success need not be looked up then.
        """
        error = complete.error if complete.HasField("error") else None
        retryable = complete.retryable
        record = await self._store.jobs.get(complete.job_id) if error is not None or not spec else None
        if error is None and (spec or accepts_output(record, complete.token)):
            wrong = await self._wrong_output(complete)
            if wrong:
                error, retryable = job_error("OUTPUT_NOT_FOUND", wrong), True
                record = record or await self._store.jobs.get(complete.job_id)
        if error is None:
            completion = await self._succeed(node_id, complete, spec or (record.spec if record is not None else b""))
        else:
            completion = await self._fail(node_id, complete, error, retryable, record)
        if completion.outcome is not Outcome.OK or error is not None:
            await self._discard(complete)
        if completion.outcome is Outcome.OK:
            self._taken(node_id, complete)
        return _OUTCOMES[completion.outcome]

    async def _succeed(self, node_id: str, complete: JobComplete, raw_spec: bytes) -> Completion:
        spec = JobSpec.FromString(raw_spec)
        at = now_ms()
        outputs = [_output(one, complete, spec, node_id, at) for one in complete.outputs]
        rows = [
            OutputRow(one.filename, complete.job_id, at, one.size_bytes, one.SerializeToString()) for one in outputs
        ]
        result = _result(complete)
        for output in outputs:
            result.outputs.add().CopyFrom(output)
            result.outputs[-1].ClearField("metadata")
        raw_result = result.SerializeToString()
        completion = await self._store.jobs.complete(
            complete.job_id,
            complete.token,
            result=raw_result,
            outputs=rows,
            load_ms=_ms(complete.load_seconds),
            run_ms=_ms(complete.run_seconds),
            upload_ms=_ms(complete.upload_seconds),
        )
        if completion.outcome is Outcome.OK and completion.record is not None:
            ended = replace(completion.record, spec=raw_spec, result=raw_result)
            self._endings.tell(complete.job_id, ended)
        return completion

    async def _fail(
        self, node_id: str, complete: JobComplete, error: JobError, retryable: bool, record: JobRecord | None
    ) -> Completion:
        whole = job_error(error.reason or "ENGINE_FAILED", error.detail or "the engine gave no reason")
        if error.code:
            whole.code = error.code
        number = record.attempt if record is not None else 1
        attempt = JobAttempt(attempt=number, node_id=node_id, error=whole)
        if record is not None:
            attempt.generation = record.generation
            set_time(attempt.start_time, record.started_ms or 0)
        set_time(attempt.end_time, now_ms())
        return await self._store.jobs.fail(
            complete.job_id,
            complete.token,
            error=whole.SerializeToString(),
            attempt=attempt.SerializeToString(),
            retryable=retryable,
            backoff_ms=backoff_ms(number, self._draw()),
            result=_result(complete).SerializeToString(),
        )

    async def _wrong_output(self, complete: JobComplete) -> str:
        """Why an output cannot be taken; "" if all are there."""
        for index, output in enumerate(complete.outputs):
            receipt = output.receipt
            if receipt.filename.partition(".")[0] != output_stem(complete.token, index):
                return f"outputs[{index}]: its receipt is not one of this attempt"
            if await self._outputs.size(receipt.filename) != receipt.size_bytes:
                return f"outputs[{index}]: the file is not on the server's disk any more"
        return ""

    async def _discard(self, complete: JobComplete) -> None:
        """Removes the files of a report that was not taken, but none that the index knows."""
        for index, output in enumerate(complete.outputs):
            filename = output.receipt.filename
            if filename.partition(".")[0] != output_stem(complete.token, index):
                continue
            if await self._store.outputs.get(filename) is None and await self._outputs.delete(filename):
                _log.info("removed an output that no job has", filename=filename, job_id=complete.job_id)


def _result(complete: JobComplete) -> JobResult:
    result = JobResult(segments=complete.segments)
    for name in ("text", "finish_reason", "exit_code"):
        if complete.HasField(name):
            setattr(result, name, getattr(complete, name))
    if complete.HasField("usage"):
        result.usage.CopyFrom(complete.usage)
    return result


def _output(uploaded: UploadedOutput, complete: JobComplete, spec: JobSpec, node_id: str, at_ms: int) -> Output:
    filename = uploaded.receipt.filename
    url = f"/api/vision/outputs/{filename}"
    output = Output(
        filename=filename,
        url=url,
        sources=["local"],
        content_type=uploaded.content_type,
        size_bytes=uploaded.receipt.size_bytes,
        sha256=uploaded.receipt.sha256,
        job_id=complete.job_id,
        node_id=node_id,
        metadata=_metadata(complete, spec),
    )
    if uploaded.content_type.startswith("image/"):
        output.thumbnail_url = f"{url}?width=256"
    for name in ("width", "height", "duration_seconds", "seed"):
        if uploaded.HasField(name):
            setattr(output, name, getattr(uploaded, name))
    set_time(output.create_time, at_ms)
    return output


def _metadata(complete: JobComplete, spec: JobSpec) -> OutputMetadata:
    """What the agent says of the making; what the job asked for is ours to say."""
    metadata = OutputMetadata()
    metadata.CopyFrom(complete.metadata)
    if spec.job_type:
        metadata.job_type = spec.job_type
    if spec.HasField("target_model"):
        metadata.model = spec.target_model
    if spec.HasField("resolved_model"):
        metadata.resolved_model = spec.resolved_model
    return metadata


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
