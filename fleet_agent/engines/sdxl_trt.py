"""`sdxl_trt`: SDXL-TRT workers on this node, each an HTTP server that takes the documented request and answers a PNG.

A worker has `POST /api/fleet/generate` (the path is a setting) and `GET /health`. One slot uses one worker at a time;
with several of both, each slot takes the worker that answers and is not busy.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, UnidentifiedImageError

from fleet_agent.engines.base import (
    EngineError,
    EngineInfo,
    EngineOutput,
    EngineResult,
    EngineSettings,
    LoadedModel,
    LoraUse,
    ModelFile,
    Reason,
    Reporter,
    Task,
)
from fleet_agent.engines.exchange import Ask, Exchange

NAME = "sdxl_trt"
_DOCUMENTED = ("prompt", "negative_prompt", "width", "height", "steps", "guidance_scale")
_MORE = ("scheduler",)
_MOST_BYTES = 256 << 20
_HEALTH_SECONDS = 5.0
_WAIT_SECONDS = 0.1
_WARM: Mapping[str, Any] = {"prompt": "warm-up", "width": 1024, "height": 1024, "steps": 1, "seed": 0}
_NOT_THE_TASKS_FAULT = frozenset({404, 405, 408, 409, 425, 429})


class SdxlTrtEngine:
    """Option `sdxl_trt_urls` names the workers, `sdxl_trt_path` where they take requests; `sdxl_trt_model` is the name
    of what they run (sdxl-trt); a worker may take `sdxl_trt_seconds` (600) for a picture; `sdxl_trt_warm` yes has each
    make one picture before the first job."""

    def __init__(self, settings: EngineSettings) -> None:
        options = settings.options
        self._urls = [url.rstrip("/") for url in options.get("sdxl_trt_urls", "").replace(",", " ").split()]
        if not self._urls or not all(url.startswith(("http://", "https://")) for url in self._urls):
            raise EngineError("ENGINE_FAILED", "set FLEET_AGENT_SDXL_TRT_URLS, such as http://127.0.0.1:8080")
        self._path = options.get("sdxl_trt_path", "/api/fleet/generate")
        self._model = options.get("sdxl_trt_model", "sdxl-trt")
        self._seconds = float(options.get("sdxl_trt_seconds", 600))
        self._warm = options.get("sdxl_trt_warm", "no") in ("yes", "true", "1")
        self._locks = settings.data_folder / "sdxl_trt"
        self._warmed: set[str] = set()
        self._used = False

    def info(self) -> EngineInfo:
        healthy = [url for url in self._urls if _healthy(url)]
        if not healthy:
            raise EngineError("ENGINE_FAILED", f"no worker is healthy: {', '.join(self._urls)}", retryable=True)
        detail = f"{len(healthy)} of {len(self._urls)} workers are healthy"
        return EngineInfo(
            NAME, "", ("image_gen",), self._model, detail, builtin_models=(self._model,), refresh_seconds=30
        )

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        """A worker has its one model loaded; it knows no LoRAs."""
        if loras:
            raise EngineError("INVALID_FIELD", "loras: SDXL-TRT workers take none")
        return LoadedModel(self._model, 0, 0.0)

    def unload(self, model: str) -> None:
        return None

    def loaded(self) -> list[LoadedModel]:
        return [LoadedModel(self._model, 0, 0.0)] if self._used else []

    def estimate(self, task: Task) -> int:
        return 0

    def run(self, task: Task, report: Reporter) -> EngineResult:
        fields: Mapping[str, Any] = task.fields
        if "init_image" in fields:
            raise EngineError("INVALID_FIELD", "init_image: SDXL-TRT workers paint from text alone")
        body = {name: fields[name] for name in _DOCUMENTED if name in fields} | {"seed": task.seed}
        # Ours beyond the documented request; a worker that does not know one refuses it.
        body |= {name: fields[name] for name in _MORE if name in fields}
        report.progress(0, 1)
        with self._worker(report) as url:
            if self._warm and url not in self._warmed:
                self._painted(url, dict(_WARM), report)
            self._warmed.add(url)
            data, headers = self._painted(url, body, report)
        self._used = True
        path = task.output_folder / "picture.png"
        path.write_bytes(data)
        width, height = _measured(data)
        report.progress(1, 1)
        seed = headers.get("x-seed", "")
        made = int(seed) if seed.isdecimal() and len(seed) <= 20 else task.seed
        return EngineResult((EngineOutput(path, "image/png", width, height, seed=made),))

    @contextlib.contextmanager
    def _worker(self, report: Reporter) -> Iterator[str]:
        """A healthy worker that no other slot uses, waited for as long as there is one. Raises EngineError."""
        self._locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            report.check()
            sick = 0
            for number, url in enumerate(self._urls):
                with contextlib.ExitStack() as held:
                    if not held.enter_context(_taken(self._locks / f"{number}.lock")):
                        continue
                    if not _healthy(url):
                        sick += 1
                        continue
                    yield url
                    return
            if sick == len(self._urls):
                raise EngineError("ENGINE_FAILED", f"no worker is healthy: {', '.join(self._urls)}", retryable=True)
            time.sleep(_WAIT_SECONDS)

    def _painted(self, url: str, body: dict[str, Any], report: Reporter) -> tuple[bytes, Mapping[str, str]]:
        """The PNG and the headers of a worker's answer. Raises EngineError; a cancelled one cuts the connection, which
        is how a worker hears that nobody waits."""
        request = httpx.Request("POST", url + self._path, json=body)
        exchange = Exchange(Ask.made("the SDXL-TRT worker", request, self._seconds), report)
        with exchange as head:
            data = exchange.body(_MOST_BYTES)
            if head.status != 200:
                raise _refused(head.status, data)
        if not data.startswith(b"\x89PNG\r\n\x1a\n"):
            kind = head.headers.get("content-type", "nothing")
            raise EngineError("ENGINE_FAILED", f"the SDXL-TRT worker answers with {kind}, not a PNG", retryable=True)
        return data, head.headers


@contextlib.contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Whether this process has the lock; it goes with the process, however that ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _healthy(url: str) -> bool:
    try:
        with httpx.Client(timeout=_HEALTH_SECONDS, trust_env=False, verify=url.startswith("https")) as http:
            return http.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def _refused(status: int, body: bytes) -> EngineError:
    """What an error of a worker means; its body is the documented {"detail": ...}."""
    try:
        value = json.loads(body)
        words, reason = str(value["detail"]), value.get("reason")
    except (ValueError, KeyError, TypeError, AttributeError):
        words, reason = " ".join(body[:500].decode(errors="replace").split()), None
    detail = f"the SDXL-TRT worker answers {status}: {words}"[:1500]
    if reason == "OUT_OF_MEMORY" or "out of memory" in words.lower():
        return EngineError(Reason.OUT_OF_MEMORY, detail, retryable=True)
    if 400 <= status < 500 and status not in _NOT_THE_TASKS_FAULT:
        return EngineError(Reason.INVALID_FIELD, detail)
    return EngineError(Reason.ENGINE_FAILED, detail, retryable=True)


def _measured(data: bytes) -> tuple[int | None, int | None]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return None, None
