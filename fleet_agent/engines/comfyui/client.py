"""The HTTP side of one ComfyUI. Every call has a deadline; what it does not say in time is an EngineError."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlencode

import httpx

from fleet_agent.engines.base import EngineError, Reporter
from fleet_agent.engines.exchange import Ask, Exchange

_MISSING_FILE, _MISSING_NODE = "value_not_in_list", ("missing_node_type", "invalid_prompt")


@dataclass(frozen=True, slots=True)
class Memory:
    """Of the device that ComfyUI uses first, in bytes."""

    total: int
    free: int


class ComfyClient:
    """Calls of one ComfyUI at `url`. Raises EngineError, retryable, where it does not answer."""

    def __init__(self, url: str, *, timeout_seconds: float = 30) -> None:
        self.url = url.rstrip("/")
        self._timeout = timeout_seconds
        # Not by a proxy: it is this node's own. All authorities are read where it speaks TLS alone.
        secure = self.url.lower().startswith("https:")
        self._http = httpx.Client(base_url=self.url, timeout=timeout_seconds, trust_env=False, verify=secure)

    def close(self) -> None:
        self._http.close()

    def system(self) -> dict[str, Any]:
        """GET /system_stats."""
        found: dict[str, Any] = self._json("GET", "/system_stats")
        return found

    def memory(self) -> Memory | None:
        """What the device has; None where ComfyUI does not say."""
        devices = self.system().get("devices") or [{}]
        total, free = devices[0].get("vram_total"), devices[0].get("vram_free")
        return Memory(int(total), int(free)) if total and free is not None else None

    def node_class(self, name: str) -> dict[str, Any] | None:
        """What /object_info says of a class; None where there is none of that name."""
        found: dict[str, Any] = self._json("GET", f"/object_info/{name}")
        return found.get(name)

    def values(self, name: str, field: str) -> list[str]:
        """The words that a combo input of a class takes; none where the class is not there."""
        config = self.node_class(name)
        if config is None:
            return []
        inputs = config["input"]
        spec: list[Any] = {**inputs.get("required", {}), **inputs.get("optional", {})}.get(field) or [[]]
        words = spec[0]
        if words == "COMBO" and len(spec) > 1:
            # The newer form of the same.
            words = spec[1].get("options", [])
        return [word for word in words if isinstance(word, str)] if isinstance(words, list) else []

    def submit(self, body: Mapping[str, Any]) -> str:
        """POST /prompt; the prompt's id. Raises EngineError with what is wrong with the graph."""
        reply = self._request("POST", "/prompt", json=body, refusals=(400,))
        if reply.status_code == 400:
            raise refused(_parsed(reply))
        return str(_parsed(reply)["prompt_id"])

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The entry of a prompt that has ended; None while it has not, or where it is not known."""
        found: dict[str, Any] = self._json("GET", f"/history/{prompt_id}")
        return found.get(prompt_id)

    def forget(self, prompt_id: str) -> None:
        """Removes the entry of a prompt."""
        self._request("POST", "/history", json={"delete": [prompt_id]})

    def queued(self, prompt_id: str) -> bool:
        """Whether the prompt waits or runs."""
        queue = self._json("GET", "/queue")
        return any(item[1] == prompt_id for item in queue["queue_running"] + queue["queue_pending"])

    def running(self, prompt_id: str) -> bool:
        """Whether the prompt runs."""
        return any(item[1] == prompt_id for item in self._json("GET", "/queue")["queue_running"])

    def cancel(self, prompt_id: str) -> None:
        """Takes the prompt out of the queue, or interrupts it if it runs. Never touches another: an old ComfyUI that
        knows no interrupt of one prompt interrupts what runs, so that is looked at first."""
        self._request("POST", "/queue", json={"delete": [prompt_id]})
        if self.running(prompt_id):
            self._request("POST", "/interrupt", json={"prompt_id": prompt_id})

    def upload(self, name: str, subfolder: str, kind: str, content_type: str, data: BinaryIO) -> str:
        """Puts a file into ComfyUI's folder; the name it has there, which is another where one of that name differs."""
        files = {"image": (name, data, content_type)}
        form = {"type": kind, "subfolder": subfolder}
        reply = self._request("POST", "/upload/image", files=files, data=form)
        said = _parsed(reply)
        return "/".join(part for part in (said.get("subfolder", ""), said["name"]) if part)

    @contextmanager
    def view(self, filename: str, subfolder: str, kind: str, report: Reporter) -> Iterator[tuple[str, Iterator[bytes]]]:
        """The content type and the bytes of a file. `Cancelled` passes."""
        query = urlencode({"filename": filename, "subfolder": subfolder, "type": kind})
        exchange = Exchange(Ask("ComfyUI", "GET", f"{self.url}/view?{query}", silence_seconds=self._timeout), report)
        with exchange as head:
            if head.status != 200:
                raise EngineError("ENGINE_FAILED", f"ComfyUI has no {kind} file {filename}", retryable=True)
            content_type = head.headers.get("content-type", "").partition(";")[0]
            yield content_type or "application/octet-stream", exchange.chunks()

    def free(self) -> None:
        """Has ComfyUI forget its models and its cached results, as soon as it is idle."""
        self._request("POST", "/free", json={"unload_models": True, "free_memory": True})

    def _json(self, method: str, path: str) -> Any:
        return _parsed(self._request(method, path))

    def _request(self, method: str, path: str, *, refusals: tuple[int, ...] = (), **more: Any) -> httpx.Response:
        try:
            reply = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise _away(self.url, error) from error
        if reply.status_code != 200 and reply.status_code not in refusals:
            words = f"ComfyUI at {self.url} answers {method} {path} with {reply.status_code}: {reply.text[:200]}"
            raise EngineError("ENGINE_FAILED", words.rstrip(": "), retryable=True)
        return reply


def refused(body: Mapping[str, Any]) -> EngineError:
    """What a 400 of POST /prompt means. Another node may have the file or the class; nothing else is mended by one."""
    error, nodes = body.get("error", {}), body.get("node_errors", {})
    lines, missing = [], False
    for node_id, node in nodes.items():
        for one in node.get("errors", ()):
            lines.append(f"node {node_id} ({node.get('class_type')}): {one.get('message')}: {one.get('details')}")
            missing = missing or one.get("type") == _MISSING_FILE
    detail = "; ".join([f"{error.get('message')} {error.get('details')}".strip(), *lines])[:1500]
    if missing:
        return EngineError("MODEL_NOT_FOUND", f"workflow: {detail}", retryable=True)
    return EngineError("INVALID_FIELD", f"workflow: {detail}", retryable=error.get("type") in _MISSING_NODE)


def _parsed(reply: httpx.Response) -> Any:
    try:
        return json.loads(reply.content)
    except ValueError as error:
        words = f"ComfyUI answers {reply.request.url} with what is no JSON: {reply.text[:80]!r}"
        raise EngineError("ENGINE_FAILED", words, retryable=True) from error


def _away(url: str, error: Exception) -> EngineError:
    why = str(error) or type(error).__name__
    return EngineError("ENGINE_FAILED", f"ComfyUI at {url} does not answer: {why}", retryable=True)
