"""The engine: text from a language model, token by token, and text from speech."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from fleet_agent.engines.base import (
    EngineError,
    EngineInfo,
    EngineResult,
    EngineSettings,
    LoadedModel,
    LoraUse,
    ModelFile,
    Reporter,
    Segment,
    Task,
)
from fleet_agent.engines.exchange import Exchange
from fleet_agent.engines.openai.server import OpenAIServer, refused
from fleet_agent.engines.openai.sse import events

NAME = "openai"
_ROUTES = {"llm_inference": "/chat/completions", "transcription": "/audio/transcriptions"}
_MOST_BYTES = 64 << 20
_TELL_SECONDS = 0.05
"""Tokens that come faster are told together."""
_ENDINGS = {
    "audio/mpeg": "mp3",
    "audio/mp4": "m4a",
    "audio/ogg": "ogg",
    "audio/flac": "flac",
    "audio/webm": "webm",
    "video/mp4": "mp4",
}


class OpenAIEngine:
    """Option `openai_url` says where the server is, `openai_api_key` what it wants; `openai_job_types`
    (llm_inference+transcription) what it is for, where asking it does not tell; `openai_llm_model` and
    `openai_transcription_model` which of its models runs what names none; it may be silent for
    `openai_silence_seconds` (600)."""

    def __init__(self, settings: EngineSettings) -> None:
        options = settings.options
        url = options.get("openai_url", "")
        if not url.startswith(("http://", "https://")):
            raise EngineError("ENGINE_FAILED", "set FLEET_AGENT_OPENAI_URL, such as http://127.0.0.1:8000/v1")
        silence = float(options.get("openai_silence_seconds", 600))
        self._server = OpenAIServer(url, options.get("openai_api_key"), silence)
        self._job_types = tuple(options.get("openai_job_types", "").replace("+", " ").split())
        named = {word: options.get(f"openai_{word.partition('_')[0]}_model", "") for word in _ROUTES}
        self._own = {word: name for word, name in named.items() if name}
        self._completes: bool | None = None
        self._used: LoadedModel | None = None

    def info(self) -> EngineInfo:
        models = dict.fromkeys([*self._server.models(), *self._own.values()])
        types = self._job_types or tuple(word for word, path in _ROUTES.items() if self._server.has(path))
        if not types:
            raise EngineError("ENGINE_FAILED", f"{self._server.url} has neither chat completions nor transcriptions")
        detail = f"at {self._server.url}"
        return EngineInfo(NAME, "", types, detail=detail, builtin_models=tuple(models), refresh_seconds=30)

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        """The server loads what it serves."""
        return LoadedModel("" if model is None else model.name, 0, 0.0)

    def unload(self, model: str) -> None:
        self._used = None

    def loaded(self) -> list[LoadedModel]:
        return [] if self._used is None else [self._used]

    def estimate(self, task: Task) -> int:
        return 0

    def run(self, task: Task, report: Reporter) -> EngineResult:
        model = self._model(task)
        if task.job_type == "transcription":
            result = self._transcribed(task, model, report)
        else:
            result = self._written(task, model, report)
        self._used = LoadedModel(model, 0, 0.0)
        return result

    def _model(self, task: Task) -> str:
        """The model's name: the server wants one even where the task has none."""
        if task.model is not None:
            return task.model.name
        if task.job_type in self._own:
            return self._own[task.job_type]
        models = self._server.models()
        hears = [name for name in models if "whisper" in name.lower()]
        wanted = (
            hears or models if task.job_type == "transcription" else [m for m in models if m not in hears] or models
        )
        if not wanted:
            raise EngineError("MODEL_NOT_FOUND", f"{self._server.url} serves no model", retryable=True)
        return wanted[0]

    # llm_inference

    def _written(self, task: Task, model: str, report: Reporter) -> EngineResult:
        fields: Mapping[str, Any] = task.fields
        path, body = self._request(fields, model)
        writing = _Writing(report, int(fields["max_tokens"]))
        report.progress(0, writing.most)
        exchange = Exchange(self._server.ask(path, body), report)
        with exchange as head:
            if head.status != 200:
                raise refused(head.status, exchange.body(_MOST_BYTES), self._known())
            if "event-stream" not in head.headers.get("content-type", ""):
                # A server that does not stream.
                writing.heard(_parsed(exchange.body(_MOST_BYTES)), whole=True)
            else:
                for event in events(exchange.chunks()):
                    writing.heard(event)
        return writing.result()

    def _request(self, fields: Mapping[str, Any], model: str) -> tuple[str, dict[str, Any]]:
        """Path and body. A plain prompt is continued where the server can do that, else it is what the user says."""
        body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        body |= {name: fields[name] for name in ("max_tokens", "temperature", "top_p", "stop") if name in fields}
        if "seed" in fields:
            body["seed"] = int(fields["seed"])
        if fields.get("messages"):
            messages = [{"role": one["role"], "content": one.get("content", "")} for one in fields["messages"]]
            return _ROUTES["llm_inference"], body | {"messages": messages}
        if self._completes is None:
            self._completes = self._server.has("/completions")
        if self._completes:
            return "/completions", body | {"prompt": fields["prompt"]}
        return _ROUTES["llm_inference"], body | {"messages": [{"role": "user", "content": fields["prompt"]}]}

    def _known(self) -> list[str]:
        try:
            return self._server.models()
        except EngineError:
            return []

    # transcription

    def _transcribed(self, task: Task, model: str, report: Reporter) -> EngineResult:
        fields: Mapping[str, Any] = task.fields
        report.progress(0, 1)
        form = {"model": model, "temperature": str(fields.get("temperature", 0.0))}
        form |= {name: fields[name] for name in ("language", "prompt") if fields.get(name)}
        # With times where the server can give them; some know the plain form alone.
        status, body = self._heard(task, {**form, "response_format": "verbose_json"}, report)
        if status in (400, 415, 422):
            status, body = self._heard(task, {**form, "response_format": "json"}, report)
        if status != 200:
            raise refused(status, body, self._known())
        said = _parsed(body)
        segments = tuple(
            Segment(float(one["start"]), float(one["end"]), str(one["text"]).strip())
            for one in said.get("segments") or ()
        )
        report.progress(1, 1)
        return EngineResult(text=str(said.get("text", "")), segments=segments)

    def _heard(self, task: Task, form: Mapping[str, str], report: Reporter) -> tuple[int, bytes]:
        reference = str(task.fields["audio"])
        files = task.inputs.get(reference)
        if not files:
            raise EngineError("INPUT_NOT_FOUND", f"audio: {reference} was not brought to the node")
        file = files[0]
        with file.path.open("rb") as data:
            # Some servers go by the ending of the name.
            name = f"audio.{_ENDINGS.get(file.content_type, 'wav')}"
            ask = self._server.ask_with_file(_ROUTES["transcription"], (name, data, file.content_type), form)
            exchange = Exchange(ask, report)
            with exchange as head:
                return head.status, exchange.body(_MOST_BYTES)


class _Writing:
    """A text as it comes."""

    def __init__(self, report: Reporter, most: int) -> None:
        self.most = most
        self._report = report
        self._parts: list[str] = []
        self._untold: list[str] = []
        self._told_at = 0.0
        self._finish: str | None = None
        self._usage: dict[str, int] | None = None

    def heard(self, event: Mapping[str, Any], *, whole: bool = False) -> None:
        """An event of the stream, or a whole answer. Raises EngineError where it says that it failed."""
        if event.get("error"):
            raise refused(500, json.dumps(event).encode())
        for choice in event.get("choices") or ():
            said = choice.get("message" if whole else "delta") or {}
            text = said.get("content") if "text" not in choice else choice["text"]
            if text:
                self._parts.append(text)
                self._untold.append(text)
            self._finish = choice.get("finish_reason") or self._finish
        usage = event.get("usage")
        if isinstance(usage, dict):
            names = ("prompt_tokens", "completion_tokens", "total_tokens")
            self._usage = {name: int(usage.get(name) or 0) for name in names}
        if time.monotonic() - self._told_at >= _TELL_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        if self._untold:
            text, self._untold = "".join(self._untold), []
            self._report.text(text)
            self._report.progress(min(len(self._parts), self.most), self.most)

    def result(self) -> EngineResult:
        """The whole. Raises EngineError where the stream ended without having come to an end."""
        if self._finish is None:
            raise EngineError("ENGINE_FAILED", "the model server's answer was cut short", retryable=True)
        self._tell()
        self._report.progress(self.most, self.most)
        finish = "length" if self._finish == "length" else "stop"
        return EngineResult(text="".join(self._parts), finish_reason=finish, usage=self._usage)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        words = f"the model server answers with what is no JSON object: {body[:80]!r}"
        raise EngineError("ENGINE_FAILED", words, retryable=True)
    return value
