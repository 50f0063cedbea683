"""What an OpenAI-compatible server is asked, and what its refusals mean."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from fleet_agent.engines.base import EngineError, Reason
from fleet_agent.engines.exchange import Ask

_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory", re.IGNORECASE)
_AGAIN = frozenset({401, 403, 408, 409, 425, 429})
"""Not the task's fault: another node's server may take it."""
_NO_ROUTE = frozenset({404, 405, 501})


class OpenAIServer:
    """One server; `url` ends before `/chat/completions`, with or without `/v1`."""

    def __init__(self, url: str, key: str | None, silence_seconds: float) -> None:
        url = url.rstrip("/")
        self.url = url if re.search(r"/v\d+\Z", url) else f"{url}/v1"
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._silence = silence_seconds

    def models(self) -> list[str]:
        """Names of the models that it says it serves. Raises EngineError where it does not answer."""
        reply = self._called("GET", "/models", None)
        try:
            body = reply.json() if reply.status_code == 200 else {}
        except ValueError:
            body = {}
        listed = body.get("data", []) if isinstance(body, dict) else []
        return [one["id"] for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)]

    def has(self, path: str) -> bool:
        """Whether it has that route: a request that it can only refuse tells."""
        return self._called("POST", path, {}).status_code not in _NO_ROUTE

    def ask(self, path: str, body: Mapping[str, Any]) -> Ask:
        """A request with JSON."""
        request = httpx.Request("POST", self.url + path, json=dict(body), headers=self._headers)
        return Ask.made("the model server", request, self._silence)

    def ask_with_file(self, path: str, file: Any, form: Mapping[str, str]) -> Ask:
        """A request with a file (name, stream, content type) and a form."""
        request = httpx.Request("POST", self.url + path, files={"file": file}, data=dict(form), headers=self._headers)
        return Ask.made("the model server", request, self._silence)

    def _called(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        try:
            # All authorities are read where it speaks TLS alone.
            secure = self.url.lower().startswith("https:")
            with httpx.Client(headers=self._headers, timeout=15, trust_env=False, verify=secure) as http:
                return http.request(method, self.url + path, json=body)
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise EngineError("ENGINE_FAILED", f"{self.url} does not answer: {why}", retryable=True) from error


def refused(status: int, body: bytes, models: Sequence[str] = ()) -> EngineError:
    """What a status other than 200 means."""
    words = _words(body) or f"status {status}"
    detail = f"the model server answers {status}: {words}"[:1500]
    if _OUT_OF_MEMORY.search(words):
        return EngineError(Reason.OUT_OF_MEMORY, detail, retryable=True)
    if status == 404 and "model" in words.lower():
        known = f"; it has {', '.join(models)}" if models else ""
        return EngineError(Reason.MODEL_NOT_FOUND, f"model: {detail}{known}", retryable=True)
    if 400 <= status < 500 and status not in _AGAIN:
        return EngineError(Reason.INVALID_FIELD, detail)
    return EngineError(Reason.ENGINE_FAILED, detail, retryable=True)


def _words(body: bytes) -> str:
    """The server's own words: {"error": {"message"}}, {"detail"}, or text."""
    try:
        value = json.loads(body)
    except ValueError:
        return " ".join(body[:1000].decode(errors="replace").split())
    for name in ("error", "detail", "message"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    return value if isinstance(value, str) else json.dumps(value)
