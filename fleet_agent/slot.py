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
from typing import Any, BinaryIO

from fleet_agent import frames
from fleet_agent.engine_options import engine_options
from fleet_agent.engine_pool import EnginePool
from fleet_agent.engines import registry
from fleet_agent.engines.base import (
    Cancelled,
    EngineError,
    EngineResult,
    EngineSettings,
    InputFile,
    LoraUse,
    ModelFile,
    Task,
)

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
    """One slot: the main thread works, a second one reads."""

    def __init__(self, settings: EngineSettings, pipe: Pipe) -> None:
        self._pipe = pipe
        self._engines = EnginePool(lambda name: registry.create(name, settings))
        self._work: queue.SimpleQueue[frames.Message] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._cancelled: dict[str, threading.Event] = {}

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
                    _live_until(message["until"])
            elif message["do"] == "run":
                self._cancelled[message["token"]] = threading.Event()
                _live_until(message.get("lease_until"))
                self._work.put(message)
            elif message["do"] in ("load", "unload"):
                self._work.put(message)

    def work(self) -> None:
        """Does what comes, in order, for ever."""
        self._pipe.send({"event": "ready"})
        while True:
            message = self._work.get()
            if message["do"] == "run":
                self._run(message)
            else:
                self._control(message)

    def _control(self, message: frames.Message) -> None:
        """Loads or unloads a model between two tasks."""
        reply = self._judged(lambda: self._obey(message))
        self._pipe.send({**reply, "token": message["token"], "loaded": self._engines.loaded()})

    def _obey(self, message: frames.Message) -> frames.Message:
        engine, model = message["engine"], message["model"]
        if message["do"] == "unload":
            self._engines.unload(engine, model["name"])
        else:
            file = _model(model)
            assert file is not None
            self._engines.load(engine, file, pin=message["pin"])
        return {"event": "done"}

    def _run(self, message: frames.Message) -> None:
        token = message["token"]
        reporter = PipeReporter(self._pipe, token, self._cancelled[token])
        self._pipe.send({"event": "started", "token": token})
        reply = self._judged(lambda: self._attempt(message, reporter))
        with self._lock:
            self._cancelled.pop(token, None)
            _live_until(None)
        last = {"token": token, "loaded": self._engines.loaded()}
        try:
            self._pipe.send({**reply, **last})
        except frames.BadFrameError as error:
            self._pipe.send(
                {**_failure("ENGINE_FAILED", f"the engine's result cannot be sent: {error}", False), **last}
            )

    def _judged(self, work: Callable[[], frames.Message]) -> frames.Message:
        """What the work gives, or how it failed."""
        try:
            return work()
        except Cancelled:
            return {"event": "cancelled"}
        except EngineError as error:
            result = {} if error.result is None else _result(error.result)
            return result | _failure(error.reason, error.detail, error.retryable)
        except MemoryError:
            return _failure("OUT_OF_MEMORY", "the engine ran out of memory", True)
        except Exception as error:
            traceback.print_exc()
            return _failure("ENGINE_FAILED", f"{type(error).__name__}: {error}", True)

    def _attempt(self, message: frames.Message, reporter: PipeReporter) -> frames.Message:
        model = _model(message["model"])
        engine = self._engines.engine(message["engine"], None if model is None else model.name)
        loras = tuple(LoraUse(_required(_model(use["file"])), use["weight"]) for use in message["loras"])
        begun = time.monotonic()
        engine.load(model, loras)
        loaded = time.monotonic()
        reporter.check()
        task = Task(
            job_id=message["job_id"],
            job_type=message["job_type"],
            model=model,
            loras=loras,
            fields=message["fields"],
            seed=int(message["seed"]),
            output_folder=Path(message["output_folder"]),
            previews=message["previews"],
            inputs={
                reference: tuple(InputFile(Path(file["path"]), file["content_type"]) for file in files)
                for reference, files in message.get("inputs", {}).items()
            },
        )
        result = engine.run(task, reporter)
        return {
            "event": "done",
            "load_seconds": loaded - begun,
            "run_seconds": time.monotonic() - loaded,
            **_result(result),
        }


def _live_until(until: float | None) -> None:
    """The kernel ends this process at that time (monotonic), whatever the engine or a stopped agent does; None: never.

    It is how exclusive work ends before its lease does.
    """
    seconds = 0.0 if until is None else max(1e-3, until - time.monotonic())
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _failure(reason: str, detail: str, retryable: bool) -> frames.Message:
    # A lone surrogate, as in a path that is no UTF-8, has no place in JSON.
    detail = detail[:2000].encode(errors="replace").decode()
    return {"event": "failed", "reason": str(reason), "detail": detail, "retryable": retryable}


def _model(fields: dict[str, Any] | None) -> ModelFile | None:
    if fields is None:
        return None
    path = fields["path"]
    return ModelFile(
        **{
            **fields,
            "path": None if path is None else Path(path),
            "trigger_words": tuple(fields["trigger_words"]),
        }
    )


def _required(model: ModelFile | None) -> ModelFile:
    if model is None:
        raise EngineError("LORA_NOT_FOUND", "a LoRA without a file")
    return model


def _result(result: EngineResult) -> frames.Message:
    outputs = [{**asdict(output), "path": str(output.path)} for output in result.outputs]
    return {
        "outputs": outputs,
        "text": result.text,
        "usage": None if result.usage is None else dict(result.usage),
        "exit_code": result.exit_code,
        "finish_reason": result.finish_reason,
        "segments": [asdict(segment) for segment in result.segments],
        "record_json": result.record_json,
    }


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
    if options.describe:
        pipe.send(describe(settings, options.engine))
        return
    child = Child(settings, pipe)
    threading.Thread(target=child.listen, args=(os.fdopen(private_in, "rb"),), daemon=True).start()
    try:
        child.work()
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
