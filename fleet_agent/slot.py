"""The child process of a slot: runs engines, one task at a time, and speaks frames over its standard pipes.

Frames in: {"do": "run" | "load" | "unload" | "cancel" | "lease"}. Frames out: {"event": "ready" | "started" |
"progress" | "preview" | "done" | "failed" | "cancelled"}. It ends with its parent: at the end of its input, and by the
kernel's signal.
"""

from __future__ import annotations

import sys

from fleet_agent.parent import die_with_parent

if __name__ == "__main__":
    # Ahead of the imports that take their time, or hang on a folder of the network: an agent that ends meanwhile leaves
    # no process behind.
    die_with_parent(int(sys.argv[sys.argv.index("--parent") + 1]))

import argparse
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from fleet_agent import frames
from fleet_agent.engine_options import engine_options
from fleet_agent.engine_pool import EnginePool
from fleet_agent.engines import registry
from fleet_agent.engines.base import Cancelled, EngineError, EngineResult, EngineSettings
from fleet_agent.engines.batch import BatchEngine, Ended
from fleet_agent.gatherer import Gatherer
from fleet_agent.memory_limit import go_first, limit_memory
from fleet_agent.slot_tasks import failure, model_of, result_of, taken_out, task_of

_MAX_PREVIEW_BYTES = 65_536


class Pipe:
    """The frames to the agent; calls may come from any thread."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, message: frames.Message, blob: bytes = b"") -> None:
        with self._lock:
            self._stream.write(frames.encode(message, blob))
            self._stream.flush()


class PipeReporter:
    """A Reporter whose words go to the agent."""

    def __init__(self, pipe: Pipe, token: str, cancelled: threading.Event) -> None:
        self._pipe = pipe
        self._token = token
        self._cancelled = cancelled
        self._written = 0

    def check(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled

    def progress(self, step: int, steps: int, message: str | None = None) -> None:
        self.check()
        self._pipe.send({"event": "progress", "token": self._token, "step": step, "steps": steps, "message": message})

    def preview(self, content_type: str, data: bytes) -> None:
        self.check()
        if len(data) <= _MAX_PREVIEW_BYTES:
            self._pipe.send({"event": "preview", "token": self._token, "content_type": content_type}, data)

    def text(self, text: str) -> None:
        self.check()
        # A lone surrogate, half of a character that a model wrote, has no place in JSON.
        text = text.encode(errors="replace").decode()
        self._pipe.send({"event": "text", "token": self._token, "text": text, "offset": self._written})
        self._written += len(text)

    def frame(self, frame: str | bytes) -> None:
        self.check()
        if len(frame) > frames.MAX_BLOB_BYTES:
            return
        if isinstance(frame, str):
            self._pipe.send({"event": "frame", "token": self._token, "text": frame})
        else:
            self._pipe.send({"event": "frame", "token": self._token, "text": None}, frame)


class Child:
    """One slot: the main thread works, a second one reads. At most `batch` tasks are run together."""

    def __init__(self, settings: EngineSettings, pipe: Pipe, batch: int, wait_seconds: float) -> None:
        self._pipe = pipe
        self._engines = EnginePool(lambda name: registry.create(name, settings))
        self._work: queue.SimpleQueue[frames.Message] = queue.SimpleQueue()
        self._gatherer = Gatherer(self._work, self._engines.engine, batch, wait_seconds)
        self._lock = threading.Lock()
        self._cancelled: dict[str, threading.Event] = {}
        self._limited = False

    def listen(self, stream: BinaryIO) -> None:
        """Reads frames until the agent is gone, then ends the process at once."""
        try:
            while (frame := frames.read(stream)) is not None:
                self._hear(frame[0])
        except Exception:
            # Deaf to cancellation it must not go on.
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _hear(self, message: frames.Message) -> None:
        with self._lock:
            if message["do"] == "cancel":
                event = self._cancelled.get(message["token"])
                if event is not None:
                    event.set()
            elif message["do"] == "lease":
                if message["token"] in self._cancelled:
                    self._live_until(message["until"])
            elif message["do"] == "run":
                self._cancelled[message["token"]] = threading.Event()
                self._live_until(message.get("lease_until"))
                self._work.put(message)
            elif message["do"] in ("load", "unload"):
                self._work.put(message)

    def work(self) -> None:
        """Does what comes, in order, for ever."""
        self._pipe.send({"event": "ready"})
        while True:
            messages = self._gatherer.next()
            if messages[0]["do"] != "run":
                self._control(messages[0])
            elif len(messages) == 1:
                self._run(messages[0])
            else:
                self._together(messages)

    def _live_until(self, until: float | None) -> None:
        """The kernel ends this process at that time (monotonic), whatever the engine or a stopped agent does; None:
        never. Call it with the lock.

        It is how exclusive work ends before its lease does.
        """
        if until is None and not self._limited:
            return
        self._limited = until is not None
        seconds = 0.0 if until is None else max(1e-3, until - time.monotonic())
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def _control(self, message: frames.Message) -> None:
        """Loads or unloads a model between two tasks."""
        reply = self._judged(lambda: self._obey(message))
        self._pipe.send({**reply, "token": message["token"], "loaded": self._engines.loaded()})

    def _obey(self, message: frames.Message) -> frames.Message:
        engine, model = message["engine"], message["model"]
        if message["do"] == "unload":
            self._engines.unload(engine, model["name"])
        else:
            file = model_of(model)
            assert file is not None
            self._engines.load(engine, file, pin=message["pin"])
        return {"event": "done"}

    def _run(self, message: frames.Message) -> None:
        token = message["token"]
        reporter = PipeReporter(self._pipe, token, self._cancelled[token])
        self._pipe.send({"event": "started", "token": token})
        self._last(message, self._judged(lambda: self._attempt(message, reporter)))

    def _last(self, message: frames.Message, reply: frames.Message) -> None:
        """Says how a task ended, with outputs that are small."""
        token, blob, most_bytes = message["token"], b"", message.get("inline_bytes", 0)
        if reply["event"] == "done" and reply["outputs"] and most_bytes:
            blob = taken_out(reply["outputs"], Path(message["output_folder"]), most_bytes)
        with self._lock:
            self._cancelled.pop(token, None)
            self._live_until(None)
        last = {"token": token, "loaded": self._engines.loaded()}
        try:
            self._pipe.send({**reply, **last}, blob)
        except frames.BadFrameError as error:
            self._pipe.send({**failure("ENGINE_FAILED", f"the engine's result cannot be sent: {error}", False), **last})

    def _judged(self, work: Callable[[], frames.Message]) -> frames.Message:
        """What the work gives, or how it failed."""
        try:
            return work()
        except Cancelled:
            return {"event": "cancelled"}
        except EngineError as error:
            result = {} if error.result is None else result_of(error.result)
            return result | failure(error.reason, error.detail, error.retryable)
        except MemoryError:
            return failure("OUT_OF_MEMORY", "the engine ran out of memory", True)
        except Exception as error:
            traceback.print_exc()
            return failure("ENGINE_FAILED", f"{type(error).__name__}: {error}", True)

    def _attempt(self, message: frames.Message, reporter: PipeReporter) -> frames.Message:
        task = task_of(message)
        engine = self._engines.engine(message["engine"], None if task.model is None else task.model.name)
        begun = time.monotonic()
        engine.load(task.model, task.loras)
        loaded = time.monotonic()
        reporter.check()
        return _done(engine.run(task, reporter), begun, loaded)

    def _together(self, messages: list[frames.Message]) -> None:
        """Runs tasks in one go; each is told its own end, whatever becomes of the others."""
        reporters = {}
        for message in messages:
            token = message["token"]
            reporters[token] = PipeReporter(self._pipe, token, self._cancelled[token])
            self._pipe.send({"event": "started", "token": token})
        left = dict(enumerate(messages))

        def work() -> frames.Message:
            tasks = [task_of(message) for message in messages]
            model = tasks[0].model
            engine = self._engines.engine(messages[0]["engine"], None if model is None else model.name)
            assert isinstance(engine, BatchEngine)
            begun = time.monotonic()
            engine.load(model, tasks[0].loras)
            loaded = time.monotonic()
            for place, ended in engine.run_batch(tasks, list(reporters.values())):
                message = left.pop(place)
                self._last(message, self._judged(lambda ended=ended: _of(ended, begun, loaded)))  # type: ignore[misc]
            return failure("ENGINE_FAILED", "the engine ended its batch without a word of this task", True)

        reply = self._judged(work)
        for message in left.values():
            self._last(message, reply)


def _of(ended: Ended, begun: float, loaded: float) -> frames.Message:
    if isinstance(ended, EngineResult):
        return _done(ended, begun, loaded)
    raise ended


def _done(result: EngineResult, begun: float, loaded: float) -> frames.Message:
    seconds = {"load_seconds": loaded - begun, "run_seconds": time.monotonic() - loaded}
    return {"event": "done", **seconds, **result_of(result)}


def describe(settings: EngineSettings, wanted: list[str] | None) -> frames.Message:
    """What engines there are, as one frame's message."""
    found = registry.discover(settings, wanted)
    return {
        "statuses": [asdict(status) for status in found.statuses],
        "infos": {name: asdict(info) for name, info in found.infos.items()},
    }


def main() -> None:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--batch-wait", type=float, default=0.0)
    parser.add_argument("--describe", action="store_true")
    parser.add_argument("--engine", action="append")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # The frames move to descriptors of their own: what an engine's libraries print, and what its processes read, must
    # not get between them.
    private_in, private_out = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    pipe = Pipe(os.fdopen(private_out, "wb"))
    settings = EngineSettings(options.models, options.data, engine_options())
    go_first()
    if "memory_bytes" in settings.options:
        limit_memory(int(settings.options["memory_bytes"]))
    if options.describe:
        pipe.send(describe(settings, options.engine))
        return
    child = Child(settings, pipe, options.batch, options.batch_wait)
    threading.Thread(target=child.listen, args=(os.fdopen(private_in, "rb"),), daemon=True).start()
    try:
        child.work()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
