"""The end of an attempt: an agent's report becomes the job's result, its outputs' records and one step in the store."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

import structlog
from fleet.v1.node_pb2 import CompleteOutcome, JobComplete, UploadedOutput
from fleet.v1.types_pb2 import EngineResult, JobAttempt, JobError, JobResult, JobSpec, Output, OutputMetadata

from fleet_server.domain.errors import JOB_REASON_CODES, REASON_CODES, Code, FleetError
from fleet_server.domain.job import JobRecord
from fleet_server.domain.retry import FIRST_MS, backoff_ms
from fleet_server.services.endings import Endings
from fleet_server.services.nodes import now_ms, set_time
from fleet_server.services.output_views import object_key
from fleet_server.services.uploads import accepts_output, output_name, output_stem
from fleet_server.storage.outputs import LocalOutputs
from fleet_server.store import Completion, Outcome, OutputRow, Report, Store

_log = structlog.get_logger("fleet.completion")

MAX_DATA_BYTES = 65_536
"""Larger outputs are uploaded."""

MAX_MAKING_BYTES = 32_768
"""A larger recipe is not kept with each output: it is the job's, for as long as that is kept."""

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


@dataclass(frozen=True, slots=True)
class Ended:
    """A report of an end. `spec` is the job's where the caller holds the attempt to be current, else b""."""

    complete: JobComplete
    spec: bytes = b""


class Completions:
    """Settles reports of agents. Each report may come any number of times; it takes effect once.

    `taken(node_id, complete)` is called for each that did, once, for what is learned from it, `stored()` where it had
    outputs; neither may wait. `home` is this server, on whose disk outputs are stored.
    """

    def __init__(
        self,
        store: Store,
        outputs: LocalOutputs,
        *,
        draw: Callable[[], float] = random.random,
        endings: Endings | None = None,
        taken: Callable[[str, JobComplete], None] = lambda node_id, complete: None,
        backoff_first_ms: int = FIRST_MS,
        stored: Callable[[], None] = lambda: None,
        home: str = "",
    ) -> None:
        self._store = store
        self._outputs = outputs
        self._endings = endings or Endings()
        self._draw = draw
        self._taken = taken
        self._backoff_first_ms = backoff_first_ms
        self._stored = stored
        self._home = home

    async def settle(self, node_id: str, complete: JobComplete, spec: bytes = b"") -> CompleteOutcome.ValueType:
        """What became of one report, see `settle_many`. Raises STORE_UNAVAILABLE: nothing is known yet, ask again."""
        outcome = (await self.settle_many(node_id, [Ended(complete, spec)]))[0]
        if isinstance(outcome, FleetError):
            raise outcome
        return outcome

    async def settle_many(self, node_id: str, ended: Sequence[Ended]) -> list[CompleteOutcome.ValueType | FleetError]:
        """What became of each report, in order; a FleetError (STORE_UNAVAILABLE: ask again) stands for its own alone.

        Successes whose spec is known go to the store together, the others each for itself.
        """
        outcomes: dict[int, CompleteOutcome.ValueType | FleetError] = {}
        plain = [n for n, one in enumerate(ended) if one.spec and not one.complete.HasField("error")]
        files = [n for n in plain if ended[n].complete.outputs]
        if len(plain) == len(ended) and not files:
            return list(await self._settle_plain(node_id, ended))
        if len(files) == 1:
            ready = [await self._ready(ended[files[0]].complete)]
        else:
            ready = await asyncio.gather(*(self._ready(ended[n].complete) for n in files))
        unready = {n for n, is_ready in zip(files, ready, strict=True) if not is_ready}
        plain = [n for n in plain if n not in unready]
        rest = [n for n in range(len(ended)) if n not in set(plain)]
        others = asyncio.gather(*(self._settle_one(node_id, ended[n]) for n in rest))
        outcomes.update(zip(plain, await self._settle_plain(node_id, [ended[n] for n in plain]), strict=True))
        outcomes.update(zip(rest, await others, strict=True))
        return [outcomes[n] for n in range(len(ended))]

    async def _settle_plain(
        self, node_id: str, ended: Sequence[Ended]
    ) -> Sequence[CompleteOutcome.ValueType | FleetError]:
        at = now_ms()
        reports = [_report(node_id, one.complete, one.spec, at, self._home) for one in ended]
        try:
            completions = await self._store.jobs.complete_many(reports)
        except FleetError as error:
            return [error] * len(ended)
        outcomes = []
        for one, report, completion in zip(ended, reports, completions, strict=True):
            self._tell(one.complete, one.spec, report, completion)
            outcomes.append(await self._finish(node_id, one.complete, completion, failed=False))
        return outcomes

    async def _settle_one(self, node_id: str, one: Ended) -> CompleteOutcome.ValueType | FleetError:
        complete, spec = one.complete, one.spec
        error = complete.error if complete.HasField("error") else None
        retryable = complete.retryable
        try:
            record = await self._store.jobs.get(complete.job_id)
            if error is None and (spec or accepts_output(record, complete.token)):
                wrong = await self._save_small(complete) or await self._wrong_output(complete)
                if wrong:
                    error, retryable = job_error("OUTPUT_NOT_FOUND", wrong), True
            if error is None:
                spec = spec or (record.spec if record is not None else b"")
                completion = await self._succeed(node_id, complete, spec)
            else:
                completion = await self._fail(node_id, complete, error, retryable, record)
            return await self._finish(node_id, complete, completion, failed=error is not None)
        except FleetError as fault:
            return fault

    async def _finish(
        self, node_id: str, complete: JobComplete, completion: Completion, *, failed: bool
    ) -> CompleteOutcome.ValueType:
        """Removes files that no job has, tells of a report that took effect."""
        if complete.outputs and (completion.outcome is not Outcome.OK or failed):
            await self._discard(complete)
        if completion.outcome is Outcome.OK:
            self._taken(node_id, complete)
            if complete.outputs and not failed:
                self._stored()
        return _OUTCOMES[completion.outcome]

    async def _succeed(self, node_id: str, complete: JobComplete, raw_spec: bytes) -> Completion:
        report = _report(node_id, complete, raw_spec, now_ms(), self._home)
        completion = (await self._store.jobs.complete_many([report]))[0]
        self._tell(complete, raw_spec, report, completion)
        return completion

    def _tell(self, complete: JobComplete, raw_spec: bytes, report: Report, completion: Completion) -> None:
        if completion.outcome is not Outcome.OK or not self._endings.awaits(complete.job_id):
            return
        record = completion.record
        if record is not None:
            self._endings.tell(complete.job_id, replace(record, spec=raw_spec, result=report.result))

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
            backoff_ms=backoff_ms(number, self._draw(), first_ms=self._backoff_first_ms),
            result=_result(complete).SerializeToString() + _of_engine(complete).SerializeToString(),
        )

    async def _ready(self, complete: JobComplete) -> bool:
        """Whether all its outputs are on the disk, with receipts."""
        try:
            return not (await self._save_small(complete) or await self._wrong_output(complete))
        except FleetError:
            # `_settle_one` meets it again, and says it.
            return False

    async def _save_small(self, complete: JobComplete) -> str:
        """Puts outputs that came in the report on the disk, each with a receipt; why one cannot be taken, or "".

        Raises DISK_FULL.
        """
        for index, output in enumerate(complete.outputs):
            if not output.HasField("data"):
                continue
            data, receipt = output.data, output.receipt
            if len(data) > MAX_DATA_BYTES:
                return f"outputs[{index}].data: has {len(data)} bytes; more than {MAX_DATA_BYTES} are to be uploaded"
            name = output_name(complete.token, index, output.content_type)
            try:
                await self._outputs.write(name, _one(data), size=receipt.size_bytes, sha256=receipt.sha256)
            except FleetError as error:
                if error.reason != "INVALID_FIELD":
                    raise
                return f"outputs[{index}].data: {error.detail}"
            # If this comes again because the store was away, the file is there.
            receipt.filename = name
            output.ClearField("data")
        return ""

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


async def _one(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _report(node_id: str, complete: JobComplete, raw_spec: bytes, at_ms: int, home: str) -> Report:
    """A success as the store takes it."""
    result = _result(complete)
    rows = []
    if complete.outputs:
        spec = JobSpec.FromString(raw_spec)
        making = _making(spec)
        for uploaded in complete.outputs:
            output = _output(uploaded, complete, spec, node_id, at_ms)
            record = output.SerializeToString()
            key = object_key(output.filename, output.metadata)
            rows.append(
                OutputRow(output.filename, complete.job_id, at_ms, output.size_bytes, record, key, making, home)
            )
            output.ClearField("metadata")
            result.outputs.add().CopyFrom(output)
    return Report(
        complete.job_id,
        complete.token,
        result.SerializeToString() + _of_engine(complete).SerializeToString(),
        rows,
        _ms(complete.load_seconds),
        _ms(complete.run_seconds),
        _ms(complete.upload_seconds),
    )


def _making(spec: JobSpec) -> bytes:
    """What makes the outputs again, less what was of that one job alone; b"" where it is large."""
    again = JobSpec(job_type=spec.job_type, payload=spec.payload, target_cluster=spec.target_cluster)
    if spec.HasField("target_model"):
        again.target_model = spec.target_model
    if spec.HasField("resolved_model"):
        again.resolved_model = spec.resolved_model
    making = again.SerializeToString()
    return making if len(making) <= MAX_MAKING_BYTES else b""


def _result(complete: JobComplete) -> JobResult:
    result = JobResult(segments=complete.segments)
    for name in ("text", "finish_reason", "exit_code"):
        if complete.HasField(name):
            setattr(result, name, getattr(complete, name))
    if complete.HasField("usage"):
        result.usage.CopyFrom(complete.usage)
    return result


def _of_engine(complete: JobComplete) -> EngineResult:
    """What stands behind the JobResult."""
    found = EngineResult(record_json=complete.engine_record_json)
    for uploaded in complete.outputs:
        if uploaded.HasField("engine_file"):
            found.outputs.add(file=uploaded.engine_file, filename=uploaded.receipt.filename)
    return found


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
