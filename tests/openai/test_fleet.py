"""Text and speech through the whole fleet: tokens as events, usage in the result, sound by its reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.fleet_process import FleetProcess
from tests.openai.micro import LANGUAGE, SPEECH, tone
from tests.waiting import wait_until_now

# The server has a deadline of its own: it is made once, with the first test.
pytestmark = pytest.mark.timeout(300, func_only=True)


@pytest.fixture(scope="module")
def api(model_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    environment = {
        "FLEET_AGENT_OPENAI_URL": model_server,
        "FLEET_ENGINES": "openai",
        "FLEET_AGENT_OPTIONS": f"openai_transcription_model={SPEECH}",
    }
    with (
        FleetProcess(tmp_path_factory.mktemp("fleet") / "data", environment=environment) as fleet,
        httpx.Client(base_url=fleet.url, timeout=60, trust_env=False) as api,
    ):
        yield api


def test_tokens_are_streamed_and_counted(api: httpx.Client) -> None:
    payload = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "seed": 3}
    said = ""
    last: dict[str, Any] = {}
    with api.stream("GET", "/api/events", headers={"Accept": "text/event-stream"}) as events:
        job_id = api.post("/api/queue/jobs", json={"job_type": "llm_inference", "payload": payload}).json()["job_id"]
        for line in events.iter_lines():
            event: dict[str, Any] = json.loads(line[5:]) if line.startswith("data:") else {"type": ""}
            if event["type"] == "job_progress" and event["data"]["text"] is not None:
                assert event["data"]["text_offset"] == len(said)
                said += event["data"]["text"]
            if event["type"] == "job_complete":
                last = event["data"]
                break
    assert last["status"] == "succeeded", last
    result = last["result"]
    assert (result["finish_reason"], result["usage"]["completion_tokens"]) == ("length", 60)
    assert said == result["text"], "who listened from the start has heard all of it before the end"
    job = wait_until_now(lambda: api.get(f"/api/queue/jobs/{job_id}").json())
    assert job["result"]["text"] == result["text"]
    names = {model["name"]: model["job_types"] for model in api.get("/api/vision/models/available").json()["models"]}
    assert set(names) == {LANGUAGE, SPEECH}
    bad = api.post("/api/queue/jobs", json={"job_type": "llm_inference", "payload": {**payload, "model": "no"}})
    assert (bad.status_code, bad.json()["reason"]) == (404, "MODEL_NOT_FOUND")
    none = api.post("/api/fleet/generate", json={"prompt": "x"})
    assert (none.status_code, none.json()["reason"]) == (503, "NO_NODE")


def test_speech_that_was_uploaded_becomes_what_the_server_makes_of_it(api: httpx.Client, model_server: str) -> None:
    sent = api.post(
        "/api/inputs", params={"filename": "talk.wav"}, content=tone(), headers={"Content-Type": "audio/wav"}
    )
    reference = sent.json()["reference"]
    fields = {"language": "en", "prompt": "hello", "temperature": 0.0}
    direct = httpx.post(
        f"{model_server}/audio/transcriptions",
        files={"file": ("talk.wav", tone(), "audio/wav")},
        data={"model": SPEECH, **fields},
        timeout=60,
        trust_env=False,
    )
    payload = {"audio": reference, **fields}
    job_id = api.post("/api/queue/jobs", json={"job_type": "transcription", "payload": payload}).json()["job_id"]

    def ended() -> dict[str, Any] | None:
        job: dict[str, Any] = api.get(f"/api/queue/jobs/{job_id}").json()
        return job if job["status"] in ("succeeded", "failed") else None

    job = wait_until_now(ended, seconds=150)
    assert job["status"] == "succeeded", job
    assert job["result"]["text"] and job["result"]["text"] == direct.json()["text"]
    gone = api.post("/api/queue/jobs", json={"job_type": "transcription", "payload": {**payload, "audio": "input:no"}})
    assert (gone.status_code, gone.json()["reason"]) == (404, "INPUT_NOT_FOUND")
