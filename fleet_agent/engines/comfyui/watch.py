"""Follows one prompt on ComfyUI's WebSocket: its frames passed on, its progress told, its end found in any case."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import ClientConnection, connect

from fleet_agent.engines.base import EngineError, Reporter
from fleet_agent.engines.comfyui.client import ComfyClient

_TAKES_METADATA = json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
_STEP_SECONDS = 0.1
"""A cancellation is heard within this."""
_LOOK_SECONDS = 2.0
"""Where no frame comes, the history is looked at so often."""

_REST_SECONDS = 1.0
"""How long the last frame is waited for when the prompt is known to have ended."""
_PICTURES = {1: "image/jpeg", 2: "image/png"}
_MOST_PREVIEW_BYTES = 65_536
_MOST_FRAME_BYTES = 64 << 20


class Progress:
    """Steps done of all, over every node that counts: a graph with one sampler is told in that sampler's steps."""

    def __init__(self, graph: Mapping[str, Any]) -> None:
        steps = {
            node_id: node["inputs"]["steps"]
            for node_id, node in graph.items()
            if isinstance(node.get("inputs"), dict) and type(node["inputs"].get("steps")) is int
        }
        self._sampler = next(iter(steps)) if len(steps) == 1 else None
        self._nodes = max(1, len(graph))
        self._done = 0
        self.steps = steps[self._sampler] if self._sampler is not None else 100

    def heard(self, nodes: Mapping[str, Any]) -> int | None:
        """What a `progress_state` says of its nodes: the steps done, where that is more than before."""
        if self._sampler is not None:
            node = nodes.get(self._sampler)
            if node is None or node["max"] <= 1 < self.steps:
                return None
            done = round(self.steps * node["value"] / node["max"])
        else:
            parts = [1.0 if n["state"] == "finished" else n["value"] / n["max"] for n in nodes.values() if n["max"]]
            done = int(100 * sum(parts) / self._nodes)
        if done <= self._done:
            return None
        self._done = min(done, self.steps)
        return self._done


class Watch:
    """One prompt. `prompt_id` is ComfyUI's name for it, `job_id` ours: frames that are passed on carry ours.

    `plain` gives the files that were brought the names that the client knows.
    """

    def __init__(
        self,
        client: ComfyClient,
        client_id: str,
        report: Reporter,
        *,
        graph: Mapping[str, Any],
        job_id: str,
        pass_on: bool,
        plain: Callable[[str], str] = str,
        patience_seconds: float = 30,
    ) -> None:
        self._client = client
        self._client_id = client_id
        self._report = report
        self._progress = Progress(graph)
        self._job_id = job_id
        self._pass_on = pass_on
        self._plain = plain
        self._patience = patience_seconds
        self._prompt_id = ""

    def run(self, submit: Callable[[], str]) -> dict[str, Any]:
        """Submits once the socket is open, so that no frame is missed; the history's entry of the prompt that ended.

        Raises EngineError where ComfyUI has lost the prompt, or is away for longer than the patience. `Cancelled`
        passes: the prompt goes on.
        """
        lost_at: float | None = None
        while True:
            try:
                with self._socket() as socket:
                    lost_at = None
                    socket.send(_TAKES_METADATA)
                    if not self._prompt_id:
                        self._prompt_id = submit()
                        self._report.progress(0, self._progress.steps)
                    entry = self._followed(socket)
                    if entry is not None:
                        return entry
            except (OSError, TimeoutError, ConnectionClosed, InvalidHandshake) as error:
                now = time.monotonic()
                lost_at = now if lost_at is None else lost_at
                if now - lost_at > self._patience or not self._prompt_id:
                    words = f"ComfyUI at {self._client.url} does not answer: {error}"
                    raise EngineError("ENGINE_FAILED", words, retryable=True) from error
                self._pause()

    def _socket(self) -> AbstractContextManager[ClientConnection]:
        url = self._client.url.replace("http", "ws", 1)
        return connect(
            f"{url}/ws?clientId={self._client_id}",
            max_size=_MOST_FRAME_BYTES,
            open_timeout=10,
            close_timeout=1,
            proxy=None,
        )

    def _pause(self) -> None:
        """Before the next try; a cancellation is heard."""
        until = time.monotonic() + 5 * _STEP_SECONDS
        while time.monotonic() < until:
            self._report.check()
            time.sleep(_STEP_SECONDS)

    def _followed(self, socket: ClientConnection) -> dict[str, Any] | None:
        """The entry, when the end is heard or the history has it; None to connect again."""
        looked_at = 0.0
        while True:
            self._report.check()
            try:
                frame = socket.recv(timeout=_STEP_SECONDS)
            except TimeoutError:
                frame = None
            except ConnectionClosed:
                # It may have ended while nobody listened.
                return self._looked()
            if frame is not None:
                if not self._heard(frame):
                    continue
            elif time.monotonic() - looked_at < _LOOK_SECONDS:
                continue
            looked_at = time.monotonic()
            entry = self._looked()
            if entry is not None:
                if frame is None:
                    self._hear_rest(socket)
                return entry

    def _hear_rest(self, socket: ClientConnection) -> None:
        """The history had the end before it was heard: what ComfyUI has said until then may still be on its way."""
        until = time.monotonic() + _REST_SECONDS
        with contextlib.suppress(TimeoutError, ConnectionClosed):
            while (left := until - time.monotonic()) > 0:
                if self._heard(socket.recv(timeout=left)):
                    return

    def _looked(self) -> dict[str, Any] | None:
        """The entry; None while the prompt waits or runs. Raises EngineError where ComfyUI knows it no more."""
        try:
            entry = self._client.history(self._prompt_id)
            if entry is not None or self._client.queued(self._prompt_id):
                return entry
            # It may have moved from the queue to the history between the two looks.
            entry = self._client.history(self._prompt_id)
        except EngineError as error:
            raise OSError(str(error)) from error
        if entry is None:
            words = "ComfyUI has lost the prompt: it was restarted, or somebody removed it there"
            raise EngineError("ENGINE_FAILED", words, retryable=True)
        return entry

    def _heard(self, frame: str | bytes) -> bool:
        """Passes a frame of our prompt on; true where it is the last."""
        if isinstance(frame, bytes):
            self._picture(frame)
            return False
        try:
            message = json.loads(frame)
            kind, data = message["type"], message["data"]
        except (ValueError, KeyError, TypeError):
            return False
        if kind == "status" or kind == "feature_flags" or not isinstance(data, dict):
            return False
        prompt_id = data.get("prompt_id")
        if prompt_id is None and kind == "executing" and data.get("node") is not None:
            # After a reconnect: without its prompt's id.
            data["prompt_id"] = prompt_id = self._prompt_id
        if prompt_id != self._prompt_id:
            return False
        self._tell_progress(kind, data)
        if self._pass_on:
            self._report.frame(self._renamed(message))
        return kind == "executing" and data.get("node") is None

    def _tell_progress(self, kind: str, data: Mapping[str, Any]) -> None:
        nodes = data.get("nodes") if kind == "progress_state" else None
        if kind == "progress" and data.get("node") is not None:
            # All that an older ComfyUI says.
            nodes = {data["node"]: {"value": data["value"], "max": data["max"], "state": "running"}}
        done = None if nodes is None else self._progress.heard(nodes)
        if done is not None:
            self._report.progress(done, self._progress.steps)

    def _renamed(self, message: dict[str, Any]) -> str:
        """The frame as our clients know its prompt."""
        text = self._plain(json.dumps(message))
        return text if self._job_id == self._prompt_id else text.replace(self._prompt_id, self._job_id)

    def _picture(self, frame: bytes) -> None:
        if len(frame) < 8:
            return
        event, head = struct.unpack(">II", frame[:8])
        if event == 1:
            content_type, data = _PICTURES.get(head), frame[8:]
        elif event == 4:
            try:
                metadata = json.loads(frame[8 : 8 + head])
            except ValueError:
                return
            if metadata.get("prompt_id") != self._prompt_id:
                return
            content_type, data = metadata.get("image_type"), frame[8 + head :]
            if self._job_id != self._prompt_id:
                text = json.dumps(metadata).replace(self._prompt_id, self._job_id).encode()
                frame = struct.pack(">II", 4, len(text)) + text + data
        else:
            content_type, data = None, b""
        if content_type is not None and len(data) <= _MOST_PREVIEW_BYTES:
            self._report.preview(content_type, data)
        if self._pass_on:
            self._report.frame(frame)


def cancel_upstream(client: ComfyClient, prompt_id: str, *, seconds: float = 5) -> None:
    """Ends a prompt and waits until ComfyUI has let go of it, or that long. Never raises."""
    until = time.monotonic() + seconds
    try:
        client.cancel(prompt_id)
        while time.monotonic() < until and client.queued(prompt_id):
            time.sleep(_STEP_SECONDS / 2)
    except EngineError:
        return
