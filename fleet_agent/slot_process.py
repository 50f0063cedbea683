"""One slot as the agent sees it: its child process, started again whenever it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from fleet_agent import frames
from fleet_agent.engine_options import NO_OPTIONS, as_environment
from fleet_agent.inbox import Frame, Inbox
from fleet_agent.memory_limit import EXIT_CODE

_log = structlog.get_logger("fleet.agent.slot")
_BACKOFF_SECONDS = (0.1, 0.5, 2, 5, 15)
_START_SECONDS = 60.0
_READ_BYTES = 65_536
_TOO_MUCH = "it needed more memory than FLEET_AGENT_ENGINE_MEMORY_BYTES lets it have"
_LAST = frozenset({"done", "failed", "cancelled"})
# The child has no call to make: what it does not know, no plug-in gives away.
_SECRETS = frozenset({"FLEET_API_KEY"})


class SlotCrashedError(RuntimeError):
    """The child ended, or could not be started; `str` says how, `reason` is that of the attempt's end."""

    @property
    def reason(self) -> str:
        return "OUT_OF_MEMORY" if _TOO_MUCH in str(self) else "ENGINE_FAILED"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in the child's memory; times are of the monotonic clock."""

    engine: str
    name: str
    memory_bytes: int
    loras: tuple[str, ...]
    loaded_at: float
    used_at: float
    pinned: bool = False
    pixel_steps_per_second: float | None = None


async def spawn_child(
    models: Path, data: Path, *more: str, stdin: int, options: Mapping[str, str] = NO_OPTIONS
) -> asyncio.subprocess.Process:
    """Starts a slot's program. It leads a process group, so that Ctrl-C on a terminal is the agent's alone to hear."""
    own = ["--models", str(models), "--data", str(data), "--parent", str(os.getpid())]
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fleet_agent.slot",
        *own,
        *more,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name not in _SECRETS} | as_environment(options),
        # (uvloop knows no `process_group`; a session is one too.)
        start_new_session=True,
    )


def kill_group(process: asyncio.subprocess.Process) -> None:
    """Ends a child that `spawn_child` started, and what it started itself, at once."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class SlotProcess:
    """Gives its child at most `seats` tasks at a time; what else is asked of it waits its turn.

    With several seats the child runs those together that its engine can batch, and one that has to be killed takes the
    others with it. Its methods may be called from any task of the loop.
    """

    def __init__(
        self,
        index: int,
        models: Path,
        data: Path,
        options: Mapping[str, str] = NO_OPTIONS,
        *,
        seats: int = 1,
        batch_wait_seconds: float = 0.0,
    ) -> None:
        self._index = index
        self.seats = seats
        self._batch_wait = batch_wait_seconds
        self._folders = (models, data)
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()
        self._crashes = 0
        self._accounted = False
        """The child's end is no crash, or has been counted as one."""
        self._reader: asyncio.Task[None] | None = None
        self._inboxes: dict[str, Inbox] = {}
        self._unwritten: list[bytes] = []
        self._loaded: tuple[Loaded, ...] = ()
        self._turn = asyncio.Semaphore(seats)
        self._at_work = 0
        self._cancelled: dict[str, asyncio.Event] = {}

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def busy(self) -> bool:
        """Whether the child is at work, or about to be."""
        return self._at_work > 0

    @property
    def loaded(self) -> tuple[Loaded, ...]:
        """What the child had in memory at its last word; nothing where it has ended."""
        return self._loaded if self.pid is not None else ()

    async def start(self) -> None:
        """Starts the child where there is none, after a pause that grows with crashes in a row.

        Raises SlotCrashedError where it does not come up.
        """
        async with self._starting:
            if self.pid is not None:
                return
            if self._crashes:
                await asyncio.sleep(_BACKOFF_SECONDS[min(self._crashes, len(_BACKOFF_SECONDS)) - 1])
            self._loaded, self._accounted, self._unwritten = (), False, []
            try:
                batch = ("--batch", str(self.seats), "--batch-wait", str(self._batch_wait))
                process = self._process = await spawn_child(
                    *self._folders, *batch, stdin=asyncio.subprocess.PIPE, options=self._options
                )
            except OSError as error:
                self._crashes += 1
                raise SlotCrashedError(f"the engine's process could not be started: {error}") from error
            await self._greeted(process)

    async def _greeted(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            async with asyncio.timeout(_START_SECONDS):
                frame = await frames.receive(process.stdout)
        except BaseException as error:
            kill_group(process)
            if not isinstance(error, TimeoutError | frames.BadFrameError):
                raise
            frame = None
        if frame is None:
            self._crashes += 1
            kill_group(process)
            raise SlotCrashedError(f"the engine's process could not be started: {await self._ending(process)}")
        self._reader = asyncio.create_task(self._hand_out(process), name=f"slot-{self._index}")

    async def _hand_out(self, process: asyncio.subprocess.Process) -> None:
        """Reads the child's frames as long as it lives, and hands each to the task that it is about."""
        assert process.stdout is not None
        why: Exception | None = None
        parts = frames.Parts()
        try:
            while data := await process.stdout.read(_READ_BYTES):
                parts.feed(data)
                while (frame := parts.next()) is not None:
                    inbox = self._inboxes.get(frame[0].get("token", ""))
                    if inbox is not None:
                        await inbox.put(frame)
                # What is already here comes without a wait: an engine that talks without end must not keep the loop
                # from its heartbeats. (Of one task two frames come between two turns of the others: see Inbox.)
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        except Exception as error:
            why = error
        for inbox in self._inboxes.values():
            inbox.end(why)

    async def run(self, message: frames.Message) -> AsyncGenerator[tuple[frames.Message, bytes], None]:
        """Sends a task and yields its frames up to the last one: done, failed or cancelled.

        Raises SlotCrashedError where the child ends first, BadFrameError where it does not speak frames. A child that
        was gone before it took the task is replaced, once.
        """
        token = message["token"]
        cancelled = self._cancelled[token] = asyncio.Event()
        try:
            if not await self._my_turn(cancelled):
                yield {"event": "cancelled", "token": token}, b""
                return
            self._at_work += 1
            try:
                taken = False
                for last_try in (False, True):
                    if not await self._started_or_cancelled(cancelled):
                        yield {"event": "cancelled", "token": token}, b""
                        return
                    with self._told(message) as inbox:
                        while inbox is not None and (frame := await self._next(inbox, message)) is not None:
                            taken = True
                            yield frame
                            if frame[0]["event"] in _LAST:
                                return
                    process = self._process
                    assert process is not None
                    how = await self._crashed(process)
                    if taken or last_try or cancelled.is_set():
                        raise SlotCrashedError(how)
            finally:
                self._at_work -= 1
                self._turn.release()
        finally:
            self._cancelled.pop(token, None)

    async def ask(self, message: frames.Message, begun: Callable[[], None]) -> frames.Message:
        """Has the child load or unload a model when its turn comes; its last word, done or failed.

        `begun` is called when the child is asked. Raises SlotCrashedError where it ends first, BadFrameError where it
        does not speak frames. Not to be cancelled: the child would go on.
        """
        async with self._turn:
            self._at_work += 1
            try:
                await self.start()
                begun()
                with self._told(message) as inbox:
                    if inbox is not None and (frame := await self._next(inbox, message)) is not None:
                        return frame[0]
                process = self._process
                assert process is not None
                raise SlotCrashedError(await self._crashed(process))
            finally:
                self._at_work -= 1

    async def _my_turn(self, cancelled: asyncio.Event) -> bool:
        """Takes the turn; false where the task was cancelled before it came."""
        if not self._turn.locked():
            return await self._turn.acquire()
        turn = asyncio.ensure_future(self._turn.acquire())
        stop = asyncio.ensure_future(cancelled.wait())
        taken = False
        try:
            await asyncio.wait({turn, stop}, return_when=asyncio.FIRST_COMPLETED)
            taken = turn.done() and not stop.done()
            return taken
        finally:
            stop.cancel()
            if not taken and not turn.cancel() and not turn.cancelled():
                # It came all the same.
                self._turn.release()

    async def _started_or_cancelled(self, stop: asyncio.Event) -> bool:
        """Waits for the child; false where the task was cancelled meanwhile."""
        if self.pid is not None and not stop.is_set() and not self._starting.locked():
            return True
        async with asyncio.TaskGroup() as tasks:
            cancelled = tasks.create_task(stop.wait())
            starting = tasks.create_task(self._try_start())
            await asyncio.wait({cancelled, starting}, return_when=asyncio.FIRST_COMPLETED)
            cancelled.cancel()
            starting.cancel()
        if stop.is_set():
            return False
        crash = starting.result()
        if crash is not None:
            raise crash
        return True

    async def _try_start(self) -> SlotCrashedError | None:
        try:
            await self.start()
        except SlotCrashedError as crash:
            return crash
        return None

    @contextlib.contextmanager
    def _told(self, message: frames.Message) -> Iterator[Inbox | None]:
        """Gives the child a task, whose frames come into the inbox for as long as the block lasts and the child lives.
        None: it is gone."""
        process, token = self._process, message["token"]
        assert process is not None and process.stdin is not None and self._reader is not None
        if self._reader.done():
            yield None
            return
        inbox = self._inboxes[token] = Inbox()
        try:
            self._write(process, frames.encode({"do": "run", **message}))
            yield inbox
        finally:
            self._inboxes.pop(token, None)
            inbox.end()

    async def _next(self, inbox: Inbox, message: frames.Message) -> Frame | None:
        """The next frame of a task; None where the child has ended."""
        frame = await inbox.take()
        if frame is not None and "loaded" in frame[0]:
            self._crashes = 0
            self._note(frame[0]["loaded"], message)
        return frame

    def _note(self, loaded: list[dict[str, Any]], message: frames.Message) -> None:
        """Keeps what the child has in memory, and since when."""
        now = time.monotonic()
        before = {(model.engine, model.name): model for model in self._loaded}
        model = message["model"]
        noted = []
        for fields in loaded:
            engine, name = fields["engine"], fields["name"]
            old = before.get((engine, name))
            used = engine == message["engine"] and (model is None or model["name"] == name)
            noted.append(
                Loaded(
                    engine=engine,
                    name=name,
                    memory_bytes=fields["memory_bytes"],
                    loras=tuple(fields["loras"]),
                    loaded_at=now if old is None else old.loaded_at,
                    used_at=now if used or old is None else old.used_at,
                    pinned=fields["pinned"],
                    pixel_steps_per_second=fields.get("pixel_steps_per_second"),
                )
            )
        self._loaded = tuple(noted)

    def cancel(self, token: str) -> None:
        """Tells the child to stop a task at its next step; a task that it has not been given yet is not begun."""
        cancelled = self._cancelled.get(token)
        if cancelled is None:
            return
        cancelled.set()
        self._tell(token, {"do": "cancel", "token": token})

    def extend(self, token: str, until: float) -> None:
        """The lease of exclusive work lasts until then (monotonic): its child may live so long."""
        self._tell(token, {"do": "lease", "token": token, "until": until})

    def _tell(self, token: str, message: frames.Message) -> None:
        """Says it to the child, if it has been given that task."""
        process = self._process
        if token in self._inboxes and self.pid is not None and process is not None:
            self._write(process, frames.encode(message))

    def _write(self, process: asyncio.subprocess.Process, data: bytes) -> None:
        """What is said to a child in one go is one write."""
        if not self._unwritten:
            asyncio.get_running_loop().call_soon(self._write_all, process, self._unwritten)
        self._unwritten.append(data)

    def _write_all(self, process: asyncio.subprocess.Process, data: list[bytes]) -> None:
        if process is self._process and process.stdin is not None:
            process.stdin.write(b"".join(data))
        data.clear()

    def kill(self) -> None:
        """Ends the child, and what it started, at once; no crash of its own."""
        if self._process is not None:
            self._accounted = True
            kill_group(self._process)

    async def close(self) -> None:
        """Ends the child and waits for it."""
        self.kill()
        if self._process is not None:
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    async def _crashed(self, process: asyncio.subprocess.Process) -> str:
        """How a child ended that had work to do; counted once, however many tasks it had."""
        how = await self._ending(process)
        if not self._accounted and process is self._process:
            self._crashes += 1
            self._accounted = True
        return how

    async def _ending(self, process: asyncio.subprocess.Process) -> str:
        code = await process.wait()
        # What an engine started, and left behind when it fell, would hold its memory and its GPU.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdin is not None:
            process.stdin.close()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == EXIT_CODE:
            how = f"was ended: {_TOO_MUCH}"
        _log.warning("the engine's process has ended", slot=self._index, how=how)
        return f"the engine's process {how}"
