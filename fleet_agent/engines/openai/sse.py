"""Server-sent events, as streams of tokens come."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

_DONE = "[DONE]"


def events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON object of each event, to the last or to `[DONE]`; what is no object is left out."""
    data: list[str] = []
    for line in _lines(chunks):
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            text, data = "\n".join(data), []
            if text == _DONE:
                return
            try:
                value = json.loads(text)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines without their ends, which are CR LF, LF or CR; the last is one even if it has no end."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        # A CR that a LF may follow waits for what comes.
        held = rest[-1:] if rest.endswith(b"\r") else b""
        whole = rest.removesuffix(held) if held else rest
        *lines, last = whole.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        rest = last + held
        for line in lines:
            yield line.decode(errors="replace")
    for line in rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        yield line.decode(errors="replace")
    yield ""
