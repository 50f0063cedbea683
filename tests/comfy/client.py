"""A client's socket, as the stock examples hold it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import websockets.exceptions
from websockets.sync.client import connect

Json = Any
Frame = Any
"""A dict of a text frame, or bytes."""


class Listener:
    """Hears all frames on a thread of its own."""

    def __init__(
        self, url: str, client_id: str = "", *, metadata: bool = False, headers: Mapping[str, str] | None = None
    ) -> None:
        query = f"?clientId={client_id}" if client_id else ""
        self._connecting = connect(
            url + query,
            additional_headers=dict(headers or {}),
            max_size=None,
            open_timeout=60,
            close_timeout=2,
            proxy=None,
            compression=None,
        )
        self._socket = self._connecting.__enter__()
        self.frames: list[Frame] = []
        self._changed = threading.Condition()
        self.closed = False
        self.code: int | None = None
        if metadata:
            flags = {"supports_preview_metadata": True}
            self._socket.send(json.dumps({"type": "feature_flags", "data": flags}))
        self._thread = threading.Thread(target=self._hear, daemon=True, name="comfy client")
        self._thread.start()

    def _hear(self) -> None:
        try:
            for message in self._socket:
                frame = json.loads(message) if isinstance(message, str) else bytes(message)
                with self._changed:
                    self.frames.append(frame)
                    self._changed.notify_all()
        except websockets.exceptions.ConnectionClosed:
            pass
        with self._changed:
            self.closed, self.code = True, self._socket.close_code
            self._changed.notify_all()

    def wait(self, count: int = 1, *, kind: str, prompt_id: str | None = None, seconds: float = 100) -> list[Json]:
        """The data of the text frames of a kind, once there are so many; a null node of `executing` is kind `end`."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.of(kind, prompt_id)) >= count or self.closed, seconds)
            found = self.of(kind, prompt_id)
        assert len(found) >= count, (kind, prompt_id, self.closed, [kind_of(frame) for frame in self.frames][-40:])
        return found

    def of(self, kind: str, prompt_id: str | None = None) -> list[Json]:
        """The data of the frames of a kind so far."""
        return [
            frame["data"]
            for frame in list(self.frames)
            if kind_of(frame) == kind and prompt_id in (None, frame["data"].get("prompt_id"))
        ]

    def kinds(self) -> list[str]:
        """What came, in order."""
        return [kind_of(frame) for frame in list(self.frames)]

    def wait_closed(self, seconds: float = 100) -> int | None:
        """The code with which the server closed it."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.closed, seconds), "it is still open"
        return self.code

    def close(self) -> None:
        self._connecting.__exit__(None, None, None)
        self._thread.join(50)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def kind_of(frame: Frame) -> str:
    """The type of a text frame, `end` for the null node, `binary 1` and the like for the others."""
    if isinstance(frame, bytes):
        return f"binary {int.from_bytes(frame[:4], 'big')}"
    if frame["type"] == "executing" and frame["data"]["node"] is None:
        return "end"
    return str(frame["type"])
