"""One server for all tests of this folder, on a port of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.parts import need_packages
from tests.ports import free_port

_START_SECONDS = 400


@pytest.fixture(scope="package")
def model_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a `transformers serve` that serves our two models."""
    need_packages("torch", "transformers", "openai", "fastapi", "multipart", "soundfile", "soxr")
    folder = tmp_path_factory.mktemp("models")
    environment = {**os.environ, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "tests.openai.micro", str(folder)], env=environment, check=True, capture_output=True
    )
    port = free_port()
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    program = Path(sys.executable).with_name("transformers")
    log = folder / "log"
    with (
        log.open("wb") as said,
        subprocess.Popen([program, *words], env=environment, stdout=said, stderr=said) as process,
    ):
        try:
            _wait(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    with httpx.Client(trust_env=False, timeout=60) as http:
        while True:
            try:
                if http.get(f"{url}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.1)
