"""Text and speech by `transformers serve`: streamed, counted, cancelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleet_agent.engines.base import Cancelled, EngineError, EngineSettings, InputFile, ModelFile, Task
from fleet_agent.engines.openai.engine import OpenAIEngine
from tests.agent.engines.helpers import Recorder
from tests.openai.micro import LANGUAGE, SPEECH, tone

# The server has a deadline of its own: it is made once, with the first test.
pytestmark = pytest.mark.timeout(300, func_only=True)

WRITE: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "temperature": 1.0}


def _engine(url: str, folder: Path, **options: str) -> OpenAIEngine:
    return OpenAIEngine(EngineSettings(folder, folder, {"openai_url": url, **options}))


def _task(folder: Path, job_type: str = "llm_inference", model: str | None = LANGUAGE, **fields: Any) -> Task:
    inputs = fields.pop("inputs", {})
    file = None if model is None else ModelFile(model, None, "checkpoint")
    return Task("job-1", job_type, file, (), fields, 0, folder, inputs=inputs)


def test_it_finds_out_what_the_server_is_for(model_server: str, tmp_path: Path) -> None:
    info = _engine(model_server, tmp_path, openai_transcription_model=SPEECH).info()
    assert info.job_types == ("llm_inference", "transcription")
    assert info.builtin_models == (LANGUAGE, SPEECH)


def test_a_chat_is_answered_token_by_token(model_server: str, tmp_path: Path) -> None:
    recorder = Recorder()
    result = _engine(model_server, tmp_path).run(_task(tmp_path, **WRITE), recorder)
    assert result.text and result.text == "".join(recorder.texts)
    assert result.finish_reason == "length"
    assert result.usage is not None
    assert result.usage["completion_tokens"] == 12
    assert result.usage["total_tokens"] == 12 + result.usage["prompt_tokens"] > 12
    assert recorder.steps[0] == (0, 12)
    assert recorder.steps[-1] == (12, 12)
    assert [step for step, _ in recorder.steps] == sorted(step for step, _ in recorder.steps)


def test_a_prompt_is_continued_and_a_seed_repeats_it(model_server: str, tmp_path: Path) -> None:
    engine = _engine(model_server, tmp_path)
    fields: dict[str, Any] = {"prompt": "once upon a time", "max_tokens": 8, "seed": "7", "temperature": 1.0}
    first, again = (engine.run(_task(tmp_path, model=None, **fields), Recorder()) for _ in range(2))
    assert first.text == again.text
    assert first.usage is not None
    # One token a byte, and no chat around it.
    assert first.usage["prompt_tokens"] == len("once upon a time")
    assert [model.name for model in engine.loaded()] == [LANGUAGE]


def test_speech_becomes_text(model_server: str, tmp_path: Path) -> None:
    (tmp_path / "talk").write_bytes(tone())
    inputs = {"input:1": (InputFile(tmp_path / "talk", "audio/wav"),)}
    engine = _engine(model_server, tmp_path, openai_transcription_model=SPEECH)
    fields = {"audio": "input:1", "language": "en", "prompt": "hello", "temperature": 0.0}
    result = engine.run(_task(tmp_path, "transcription", None, inputs=inputs, **fields), Recorder())
    assert result.text
    with pytest.raises(EngineError, match="audio: input:2") as raised:
        engine.run(_task(tmp_path, "transcription", None, inputs=inputs, **{**fields, "audio": "input:2"}), Recorder())
    assert raised.value.reason == "INPUT_NOT_FOUND"


@pytest.mark.parametrize("after", [0, 2], ids=["before the first token", "mid-run"])
def test_cancelled_it_stops_the_server_too(model_server: str, tmp_path: Path, after: int) -> None:
    recorder = Recorder()
    recorder.cancel_when = lambda done: done >= after and (after == 0 or bool(recorder.texts))
    with pytest.raises(Cancelled):
        _engine(model_server, tmp_path).run(_task(tmp_path, **{**WRITE, "max_tokens": 4000}), recorder)
    # It is free for another at once: the long text is not being written any more.
    assert _engine(model_server, tmp_path).run(_task(tmp_path, **WRITE), Recorder()).text


def test_an_unknown_model(model_server: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as raised:
        _engine(model_server, tmp_path).run(_task(tmp_path, model="fleet/no-such", **WRITE), Recorder())
    assert raised.value.retryable


def test_without_a_server(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="FLEET_AGENT_OPENAI_URL"):
        OpenAIEngine(EngineSettings(tmp_path, tmp_path))
    with pytest.raises(EngineError, match="does not answer") as raised:
        _engine("http://127.0.0.1:9", tmp_path).info()
    assert raised.value.retryable
