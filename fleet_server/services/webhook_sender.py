"""Sends the callbacks that are due: one task a replica, beside everything else and in nobody's way.

At least once: a callback is claimed in the store, sent, and its outcome written. A sender that dies in between leaves
a claim that ends by itself; the callback is sent again then, with the same webhook-id.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import structlog
from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord
from fleet_server.domain.webhook import Answer, DeliveryState, RetryPlan, Verdict, judge
from fleet_server.domain.webhook_signature import SecretBook, signature_header
from fleet_server.protojson import JsonCodec
from fleet_server.services.callbacks import parse_receiver
from fleet_server.services.webhook_body import callback_body
from fleet_server.services.webhook_hosts import HostLimits, Hosts
from fleet_server.services.webhook_log import with_try
from fleet_server.services.webhook_post import Poster
from fleet_server.store import HookRow, Store, ends_with_callback

_log = structlog.get_logger("fleet.webhooks")
_MARGIN = 4 / 3
"""How much of the request's time must be left of a claim, so that the outcome can be written too."""

_SHORTEST_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class SenderSettings:
    """`seconds` is the most that a request takes, `lease_seconds` how long a claim lasts, twice that at least."""

    plan: RetryPlan = field(default_factory=RetryPlan)
    limits: HostLimits = field(default_factory=HostLimits)
    seconds: float = 15.0
    lease_seconds: float = 60.0
    poll_seconds: float = 1.0
    claim: int = 25
    user_agent: str = "fleet-commander"


@dataclass(frozen=True, slots=True)
class _Due:
    """A claimed callback, ready to be sent until `until` (of the loop's clock)."""

    row: HookRow
    token: str
    record: JobRecord
    url: str
    until: float


class WebhookSender:
    """Claims, sends, writes. `run` has to be running; `wake` says that something may be due.

    `message` makes the Job of a record that has its spec, as events show it; `tell` hears what each try came to.
    """

    def __init__(
        self,
        store: Store,
        message: Callable[[JobRecord], Awaitable[types_pb2.Job]],
        codec: JsonCodec,
        poster: Poster,
        secrets_: SecretBook,
        *,
        clock: Callable[[], int],
        draw: Callable[[], float],
        settings: SenderSettings | None = None,
        tell: Callable[[DeliveryState], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._message = message
        self._codec = codec
        self._poster = poster
        self._secrets = secrets_
        self._clock = clock
        self._draw = draw
        self._tell = tell
        self._settings = settings or SenderSettings()
        self._name = secrets.token_hex(8)
        self._hosts: Hosts[_Due] = Hosts(self._settings.limits)
        self._some = asyncio.Event()
        self._full = False
        self._closing = False
        self._claiming = asyncio.Lock()

    @property
    def closing(self) -> bool:
        """Whether nothing new is claimed any more."""
        return self._closing

    def wake(self) -> None:
        """Something may be due: look."""
        self._some.set()

    async def run(self) -> None:
        """Sends until cancelled. What is under way then is sent again by whoever claims it next."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(), name="webhooks-listen")
            group.create_task(self._claim_on(group), name="webhooks-claim")

    async def shut_down(self, seconds: float) -> None:
        """Claims no more, gives back what waits, and lets what is under way come to its end, at most so long.

        Afterwards `run` is to be cancelled.
        """
        self._closing = True
        with contextlib.suppress(TimeoutError, FleetError):
            async with asyncio.timeout(seconds):
                # A claim that is under way may bring more.
                async with self._claiming:
                    await self._give_back()
                while self._hosts.active:
                    self._some.clear()
                    await self._some.wait()

    async def _give_back(self) -> None:
        for due in self._hosts.drain():
            await self._store.webhooks.defer([(due.row, 0)], due.token)

    async def _listen(self) -> None:
        """Wakes at each end of a job with a callback, so that nothing waits for the next poll."""
        while True:
            with contextlib.suppress(FleetError):
                async with self._store.events.subscribe(hurry=lambda: False) as events:
                    # What ended before we listened.
                    self.wake()
                    async for event in events:
                        if event.type == "gap" or (event.type == "job_complete" and ends_with_callback(event.raw)):
                            self.wake()
            await asyncio.sleep(self._settings.poll_seconds)

    async def _claim_on(self, group: asyncio.TaskGroup) -> None:
        while not self._closing:
            self._some.clear()
            wait = self._settings.poll_seconds
            try:
                async with self._claiming:
                    wait = min(wait, await self._claim())
            except FleetError as error:
                _log.warning("callbacks wait for the store", detail=error.detail)
            except Exception:
                # A fault of ours may cost callbacks time, never the server its life.
                _log.error("callbacks cannot be claimed", trace=traceback.format_exc())
            await self._start(group)
            if wait > 0:
                # Not wait_for: before Python 3.12 it can swallow a cancellation that comes as the event is set.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(wait, _SHORTEST_SECONDS)):
                        await self._some.wait()

    async def _claim(self) -> float:
        """Claims what there is room for; seconds until there is reason to look again."""
        limit = min(self._hosts.room, self._settings.claim)
        self._full = limit == 0
        if limit == 0:
            return self._settings.poll_seconds
        token = secrets.token_hex(8)
        lease = self._settings.lease_seconds
        until = asyncio.get_running_loop().time() + lease
        claims = await self._store.webhooks.claim(self._name, token, limit=limit, lease_ms=int(lease * 1000))
        if claims.rows:
            await self._take(claims.rows, token, until)
            return 0
        return self._settings.poll_seconds if claims.wait_ms is None else claims.wait_ms / 1000

    async def _take(self, rows: Sequence[HookRow], token: str, until: float) -> None:
        """Gives each callback its job's end and a place in line; those without a place go back to the store."""
        now = asyncio.get_running_loop().time()
        found = await self._store.jobs.get_many([row.job_id for row in rows])
        put_off: list[tuple[HookRow, int]] = []
        for row, whole in zip(rows, found, strict=True):
            due = None if whole is None else _due(row, whole, token, until)
            if due is None:
                await self._give_up(row, token)
                continue
            seconds = self._hosts.offer(_host(due.url), due, now)
            if seconds is not None:
                put_off.append((row, int(seconds * 1000)))
        await self._store.webhooks.defer(put_off, token)

    async def _give_up(self, row: HookRow, token: str) -> None:
        """A callback whose job, or whose end of it, is known no more: nothing could be said."""
        _log.warning("a callback's job is gone", webhook_id=row.webhook_id)
        answer = Answer(None, "not called: how the job had ended is known no more")
        log = with_try(row.log, answer, self._clock(), 0.0)
        await self._store.webhooks.settle(row, token, Verdict(DeliveryState.FAILED), log)

    async def _start(self, group: asyncio.TaskGroup) -> None:
        """Begins what may begin now, one in a turn of the loop: all at once would hold up everybody else."""
        while not self._closing and (turn := self._hosts.next()) is not None:
            group.create_task(self._send(group, *turn), name="webhook")
            await asyncio.sleep(0)

    async def _send(self, group: asyncio.TaskGroup, host: str, due: _Due) -> None:
        """One try, from the claim to its outcome. Never raises but when cancelled."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        answer: Answer | None = None
        try:
            if began + _MARGIN * self._settings.seconds > due.until:
                # It waited too long: another sender might have it before we are done.
                await self._store.webhooks.defer([(due.row, 0)], due.token)
            else:
                started_ms = self._clock()
                answer = await self._try(due)
                await self._settle(due, answer, started_ms, loop.time() - began)
        except asyncio.CancelledError:
            # The whole sender is: it must start nothing more.
            self._closing = True
            raise
        except FleetError as error:
            _log.warning(
                "a callback's outcome is not written: it is sent again",
                webhook_id=due.row.webhook_id,
                detail=error.detail,
            )
        finally:
            if answer is None:
                self._hosts.skipped(host)
            else:
                self._hosts.finished(host, answered=answer.status is not None, seconds=loop.time() - began)
            if not self._closing and (turn := self._hosts.next()) is not None:
                group.create_task(self._send(group, *turn), name="webhook")
            if self._full or self._closing or self._hosts.startable:
                self.wake()

    async def _try(self, due: _Due) -> Answer:
        try:
            job = await self._message(due.record)
            body = callback_body(self._codec, job)
            timestamp = self._clock() // 1000
            signature = signature_header(self._secrets.for_url(due.url), due.row.webhook_id, timestamp, body)
            headers = [
                ("Content-Type", "application/json"),
                ("User-Agent", self._settings.user_agent),
                ("webhook-id", due.row.webhook_id),
                ("webhook-timestamp", str(timestamp)),
                ("webhook-signature", signature),
            ]
            return await self._poster.post(due.url, headers, body)
        except FleetError:
            raise
        except Exception:
            # A fault of ours must use its tries up, rather than come back for ever.
            # As text: a renderer that shows variables would show addresses with what is secret in them.
            _log.error("a callback cannot be sent", webhook_id=due.row.webhook_id, trace=traceback.format_exc())
            return Answer(None, "not sent: a fault of the server, whose log says more")

    async def _settle(self, due: _Due, answer: Answer, started_ms: int, seconds: float) -> None:
        verdict = judge(answer, due.row.tries + 1, self._settings.plan, self._draw())
        log = with_try(due.row.log, answer, started_ms, seconds)
        if verdict.state is DeliveryState.FAILED:
            _log.warning("a callback is given up", webhook_id=due.row.webhook_id, detail=answer.detail)
        if await self._store.webhooks.settle(due.row, due.token, verdict, log):
            self._tell(verdict.state)
        else:
            _log.warning("a callback's claim was lost", webhook_id=due.row.webhook_id)


def _due(row: HookRow, whole: JobRecord, token: str, until: float) -> _Due | None:
    """The callback with the job as its generation ended; None where that is known no more, or names no receiver."""
    record = whole
    if row.end is not None:
        made = [(raw, types_pb2.JobAttempt.FromString(raw).generation) for raw in whole.attempts]
        kept = tuple(raw for raw, generation in made if generation <= row.generation)
        record = replace(row.end, spec=whole.spec, attempts=kept)
    elif whole.generation != row.generation or not whole.state.ended:
        return None
    url = types_pb2.JobSpec.FromString(whole.spec).callback_url
    return _Due(row, token, record, url, until) if url else None


def _host(url: str) -> str:
    """Whom an address names, however it is spelled."""
    try:
        receiver = parse_receiver(url)
    except FleetError:
        # Accepted once, by other rules: judged again, and refused, when it is sent.
        return ""
    return f"{receiver.literal or receiver.host}:{receiver.port}"
