"""The engine `sdxl_trt` against a worker that was written from the API reference alone."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fleet_agent.engines.base import Cancelled, EngineError, EngineSettings, LoraUse, ModelFile, Task
from fleet_agent.engines.sdxl_trt import SdxlTrtEngine
from tests.agent.engines.helpers import Recorder
from tests.worker.plain_worker import Handler, PlainWorker

FIELDS: dict[str, Any] = {
    "prompt": "a beautiful sunset over mountains",
    "negative_prompt": "",
    "width": 64,
    "height": 32,
    "steps": 4,
    "guidance_scale": 7.5,
    "strength": 0.75,
}


@contextmanager
def _serving(worker: PlainWorker) -> Iterator[PlainWorker]:
    thread = threading.Thread(target=worker.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        worker.shutdown()
        worker.server_close()
        thread.join(50)


@pytest.fixture
def worker() -> Iterator[PlainWorker]:
    with _serving(PlainWorker()) as worker:
        yield worker


def _engine(folder: Path, *urls: str, **options: str) -> SdxlTrtEngine:
    return SdxlTrtEngine(EngineSettings(folder, folder / "data", {"sdxl_trt_urls": ",".join(urls), **options}))


def _task(folder: Path, name: str = "out", **fields: Any) -> Task:
    out = folder / name
    out.mkdir(exist_ok=True)
    return Task("job-1", "image_gen", None, (), {**FIELDS, **fields}, 2**53 + 7, out)


def test_a_picture(worker: PlainWorker, tmp_path: Path) -> None:
    engine = _engine(tmp_path, worker.url)
    info = engine.info()
    assert (info.job_types, info.builtin_models) == (("image_gen",), ("sdxl-trt",))
    [output] = engine.run(_task(tmp_path), Recorder()).outputs
    assert (output.content_type, output.width, output.height, output.seed) == ("image/png", 64, 32, 2**53 + 7)
    with Image.open(output.path) as image:
        assert image.getpixel((0, 0)) == ((2**53 + 7) % 256, 0, 0)
    [asked] = worker.requests
    # Exactly the documented fields: a worker may know no others.
    assert asked == {name: FIELDS[name] for name in FIELDS if name != "strength"} | {"seed": 2**53 + 7}
    assert [model.name for model in engine.loaded()] == ["sdxl-trt"]


def test_the_path_is_a_setting(worker: PlainWorker, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="answers 404") as raised:
        _engine(tmp_path, worker.url, sdxl_trt_path="/generate").run(_task(tmp_path), Recorder())
    assert raised.value.retryable


def test_a_warm_up_comes_once_and_first(worker: PlainWorker, tmp_path: Path) -> None:
    engine = _engine(tmp_path, worker.url, sdxl_trt_warm="yes")
    for _ in range(2):
        engine.run(_task(tmp_path), Recorder())
    assert [asked["prompt"] for asked in worker.requests] == ["warm-up", FIELDS["prompt"], FIELDS["prompt"]]


def test_workers_that_are_sick_are_left_out(worker: PlainWorker, tmp_path: Path) -> None:
    with _serving(PlainWorker()) as other:
        worker.healthy = False
        engine = _engine(tmp_path, worker.url, other.url)
        assert engine.info().detail == "1 of 2 workers are healthy"
        engine.run(_task(tmp_path), Recorder())
        assert (len(worker.requests), len(other.requests)) == (0, 1)
        other.healthy = False
        for call in (engine.info, lambda: engine.run(_task(tmp_path), Recorder())):
            with pytest.raises(EngineError, match="no worker is healthy") as raised:
                call()
            assert raised.value.retryable


class _Slow(Handler):
    """Holds every picture until it is let go, and notes a caller who leaves."""

    def do_POST(self) -> None:
        assert isinstance(self.server, SlowWorker)
        self.server.busy.release()
        if not self.server.go.wait(50):
            return
        super().do_POST()


class SlowWorker(PlainWorker):
    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = _Slow
        self.busy = threading.Semaphore(0)
        self.go = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller has hung up."""


def test_two_slots_use_two_workers_at_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        workers = [stack.enter_context(_serving(SlowWorker())) for _ in range(2)]
        engines = [_engine(tmp_path, *(worker.url for worker in workers)) for _ in range(3)]
        threads = [
            threading.Thread(target=engine.run, args=(_task(tmp_path, f"out-{n}"), Recorder()), daemon=True)
            for n, engine in enumerate(engines)
        ]
        for thread in threads:
            thread.start()
        for worker in workers:
            assert isinstance(worker, SlowWorker)
            assert worker.busy.acquire(timeout=60)
            # Two are at work, and the third waits for one of them.
            assert not worker.busy.acquire(blocking=False)
        for worker in workers:
            assert isinstance(worker, SlowWorker)
            worker.go.set()
        for thread in threads:
            thread.join(50)
        assert sorted(len(worker.requests) for worker in workers) == [1, 2]


def test_cancelled_before_and_while_a_worker_paints(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        _engine(tmp_path, "http://127.0.0.1:9").run(_task(tmp_path), Recorder(lambda done: True))
    with _serving(SlowWorker()) as worker:
        assert isinstance(worker, SlowWorker)
        recorder = Recorder()
        recorder.cancel_when = lambda done: worker.busy.acquire(blocking=False)
        engine = _engine(tmp_path, worker.url)
        with pytest.raises(Cancelled):
            engine.run(_task(tmp_path), recorder)
        assert not list((tmp_path / "out").iterdir())
        worker.go.set()
        # The worker is free for the next.
        assert engine.run(_task(tmp_path), Recorder()).outputs


def test_a_worker_that_takes_too_long(tmp_path: Path) -> None:
    with _serving(SlowWorker()) as worker:
        assert isinstance(worker, SlowWorker)
        with pytest.raises(EngineError, match=r"said nothing for 0\.2 s") as raised:
            _engine(tmp_path, worker.url, sdxl_trt_seconds="0.2").run(_task(tmp_path), Recorder())
        assert raised.value.retryable
        worker.go.set()


@pytest.mark.parametrize(
    ("status", "body", "reason", "retryable"),
    [
        (400, b'{"detail": "steps: too many"}', "INVALID_FIELD", False),
        (500, b'{"detail": "CUDA out of memory"}', "OUT_OF_MEMORY", True),
        (503, b"busy", "ENGINE_FAILED", True),
        (200, b"<html>", "ENGINE_FAILED", True),
    ],
)
def test_what_a_worker_answers_instead(tmp_path: Path, status: int, body: bytes, reason: str, retryable: bool) -> None:
    class Refusing(Handler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(status, body)

    worker = PlainWorker()
    worker.RequestHandlerClass = Refusing
    with _serving(worker):
        with pytest.raises(EngineError) as raised:
            _engine(tmp_path, worker.url).run(_task(tmp_path), Recorder())
        assert (raised.value.reason, raised.value.retryable) == (reason, retryable)


def test_what_workers_cannot_do_is_said_at_once(worker: PlainWorker, tmp_path: Path) -> None:
    engine = _engine(tmp_path, worker.url)
    with pytest.raises(EngineError, match="init_image"):
        engine.run(_task(tmp_path, init_image="input:1"), Recorder())
    with pytest.raises(EngineError, match="loras"):
        engine.load(None, (LoraUse(ModelFile("ink", None, "lora"), 1.0),))
    with pytest.raises(EngineError, match="FLEET_AGENT_SDXL_TRT_URLS"):
        _engine(tmp_path)
    assert not worker.requests
    assert isinstance(worker, http.server.ThreadingHTTPServer)
