"""`fleet worker` as a process, asked by a client that was written from the API reference alone."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from fleet_agent.engines.base import EngineSettings, Task
from fleet_agent.engines.sdxl_trt import SdxlTrtEngine
from tests.agent.engines.helpers import Recorder
from tests.agent.helpers import PLUGINS, children_of
from tests.worker.plain_client import generate, health

SMALL = {"width": 64, "height": 64, "steps": 2}


@contextmanager
def _worker(folder: Path, engine: str, *more: str) -> Iterator[tuple[str, int]]:
    """Its address and its pid."""
    code = "import sys; from fleet_client.cli import main; sys.argv[0] = 'fleet'; main()"
    words = ["worker", "--engines", engine, "--port", "0", "--data-dir", str(folder), "--json", *more]
    environment = {**os.environ, "PYTHONPATH": f"{PLUGINS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, env=environment) as process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            assert ready["pid"] == process.pid
            yield ready["url"], process.pid
            process.send_signal(signal.SIGTERM)
            assert process.wait(50) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with _worker(tmp_path_factory.mktemp("worker"), "sketch") as (url, _):
        yield url


def test_the_documented_request_and_reply(url: str) -> None:
    assert json.loads(health(url).body)["status"] == "ok"
    answer = generate(url, prompt="a beautiful sunset", negative_prompt="blurry", seed=7, guidance_scale=7.5, **SMALL)
    assert (answer.status, answer.content_type, answer.seed) == (200, "image/png", "7")
    assert answer.filename is not None
    assert answer.filename.endswith(".png")
    with Image.open(io.BytesIO(answer.body)) as image:
        assert image.size == (64, 64)
    again = generate(url, prompt="a beautiful sunset", negative_prompt="blurry", seed=7, guidance_scale=7.5, **SMALL)
    with Image.open(io.BytesIO(again.body)) as other, Image.open(io.BytesIO(answer.body)) as image:
        assert other.tobytes() == image.tobytes()


def test_defaults_and_a_seed_that_is_left_out(url: str) -> None:
    seeds = {generate(url, prompt="x", seed=None, **SMALL).seed for _ in range(2)}
    assert len(seeds) == 2
    assert all(seed is not None and int(seed) < 2**53 for seed in seeds)
    large = generate(url, prompt="x", seed=str(2**64 - 1), **SMALL)
    assert large.seed == str(2**64 - 1)


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({}, 400, "prompt"),
        ({"prompt": " "}, 400, "prompt"),
        ({"prompt": "x", "width": 1001}, 400, "width"),
        ({"prompt": "x", "steps": 0}, 400, "steps"),
        ({"prompt": "x", "stepz": 1}, 400, "stepz: is not known"),
        ({"prompt": "x", "steps": "many"}, 400, "steps"),
        ({"prompt": "x", "init_image": "input:1"}, 400, "init_image"),
        ({"prompt": "x", "model": "no-such"}, 404, "no-such"),
    ],
)
def test_bad_requests_name_the_field(url: str, fields: dict[str, object], status: int, words: str) -> None:
    answer = generate(url, **fields)
    assert answer.status == status
    assert words in answer.detail


def test_other_paths_methods_and_bodies(url: str) -> None:
    host = urlsplit(url).netloc
    for method, path, body, status in (
        ("GET", "/api/fleet/generate", b"", 405),
        ("GET", "/", b"", 404),
        ("POST", "/api/fleet/generate", b"{", 400),
        ("POST", "/api/fleet/generate", b'{"prompt": "x", "prompt": "y"}', 400),
        ("POST", "/api/fleet/generate", b" " * (2 << 20), 413),
    ):
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert (reply.status, "detail" in json.loads(reply.read())) == (status, True), path
        connection.close()


def test_our_engine_is_served_by_our_worker(url: str, tmp_path: Path) -> None:
    """The two halves of the interface meet."""
    engine = SdxlTrtEngine(EngineSettings(tmp_path, tmp_path, {"sdxl_trt_urls": url}))
    assert engine.info().detail == "1 of 1 workers are healthy"
    fields = {"prompt": "x", "negative_prompt": "", "guidance_scale": 7.5, **SMALL}
    [output] = engine.run(Task("job-1", "image_gen", None, (), fields, 2**64 - 1, tmp_path), Recorder()).outputs
    assert output.seed == 2**64 - 1


def test_a_caller_who_leaves_stops_the_engine_and_a_crash_is_told(tmp_path: Path) -> None:
    """The probe engine waits, falls, or paints, as the prompt says."""
    with _worker(tmp_path, "probe", "--timeout-seconds", "30") as (url, pid):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        body = json.dumps({"prompt": "wait"})
        connection.request("POST", "/api/fleet/generate", body, {"Content-Type": "application/json"})
        [child] = children_of(pid)
        connection.close()
        # The one slot is free again.
        assert generate(url, prompt="paint", **SMALL).status == 200
        assert children_of(pid) == [child]
        answer = generate(url, prompt="exit", **SMALL)
        assert (answer.status, "process" in answer.detail) == (500, True)
        with ThreadPoolExecutor(4) as callers:
            answers = list(callers.map(lambda _: generate(url, prompt="paint", **SMALL), range(4)))
        assert [answer.status for answer in answers] == [200] * 4


def test_it_does_not_listen_beyond_this_machine_by_itself(tmp_path: Path) -> None:
    code = "from fleet_client.cli import main; main()"
    words = ["worker", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, timeout=50, check=False)
    assert (done.returncode, b"--insecure-no-auth" in done.stderr) == (2, True)
