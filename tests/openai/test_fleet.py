"""Text through the whole fleet: its tokens on the events' stream, its usage in the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.fleet_process import FleetProcess
from tests.openai.micro import LANGUAGE, SPEECH
from tests.waiting import wait_until_now

# The server has a deadline of its own: it is made once, with the first test.
pytestmark = pytest.mark.timeout(60, func_only=True)


def test_tokens_are_streamed_and_counted(model_server: str, tmp_path: Path) -> None:
    environment = {
        "FLEET_AGENT_OPENAI_URL": model_server,
        "FLEET_ENGINES": "openai",
        "FLEET_AGENT_OPTIONS": f"openai_transcription_model={SPEECH}",
    }
    with (
        FleetProcess(tmp_path / "data", environment=environment) as fleet,
        httpx.Client(base_url=fleet.url, timeout=40, trust_env=False) as api,
    ):
        payload = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "seed": 3}
        said = ""
        last: dict[str, Any] = {}
        with api.stream("GET", "/api/events", headers={"Accept": "text/event-stream"}) as events:
            job_id = api.post("/api/queue/jobs", json={"job_type": "llm_inference", "payload": payload}).json()[
                "job_id"
            ]
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
        names = {
            model["name"]: model["job_types"] for model in api.get("/api/vision/models/available").json()["models"]
        }
        assert set(names) == {LANGUAGE, SPEECH}
        bad = api.post("/api/queue/jobs", json={"job_type": "llm_inference", "payload": {**payload, "model": "no"}})
        assert (bad.status_code, bad.json()["reason"]) == (404, "MODEL_NOT_FOUND")
        none = api.post("/api/fleet/generate", json={"prompt": "x"})
        assert (none.status_code, none.json()["reason"]) == (503, "NO_NODE")
