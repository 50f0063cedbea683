"""Small outputs on their way out of a slot: taken out of their files, or left for the agent to judge."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import node_pb2

from fleet_agent.attempt import Attempt, completion
from fleet_agent.engines.base import EngineOutput, EngineResult
from fleet_agent.slot_tasks import result_of, taken_out


def outputs_in(folder: Path, *contents: bytes) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    outputs = []
    for number, content in enumerate(contents):
        path = folder / f"{number}.png"
        path.write_bytes(content)
        outputs.append(EngineOutput(path, "image/png"))
    found: list[dict[str, Any]] = result_of(EngineResult(tuple(outputs)))["outputs"]
    return found


def test_small_outputs_are_in_the_end_itself(tmp_path: Path) -> None:
    outputs = outputs_in(tmp_path, b"12345", b"", b"67890")
    blob = taken_out(outputs, tmp_path, 10)
    assert list(tmp_path.iterdir()) == []

    attempt: Any = Attempt(node_pb2.Assign(job_id="j", token="t"), None, "probe", {}, None)  # type: ignore[arg-type]
    done = {**result_of(EngineResult()), "event": "done", "load_seconds": 0.0, "run_seconds": 0.5}
    complete = completion(attempt, {**done, "outputs": outputs}, blob)
    assert [output.data for output in complete.outputs] == [b"12345", b"", b"67890"]
    assert all(output.HasField("data") for output in complete.outputs)
    assert [output.receipt.size_bytes for output in complete.outputs] == [5, 0, 5]
    hashes = [hashlib.sha256(data).hexdigest() for data in (b"12345", b"", b"67890")]
    assert [output.receipt.sha256 for output in complete.outputs] == hashes


def test_larger_ones_stay_in_their_files_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = outputs_in(tmp_path, b"12345", b"678901")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path.name} is read"))
        assert taken_out(outputs, tmp_path, 10) == b""
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"12345", b"678901"]
    assert not any("inline" in output for output in outputs)


@pytest.mark.parametrize("kind", ["elsewhere", "link", "folder", "missing", "below"])
def test_what_is_no_plain_file_of_the_folder_is_left_for_the_agent_to_judge(tmp_path: Path, kind: str) -> None:
    folder, secret = tmp_path / "out", tmp_path / "secret"
    secret.write_bytes(b"secret")
    outputs = outputs_in(folder, b"12345", b"67890")
    second = folder / "1.png"
    match kind:
        case "elsewhere":
            outputs[1]["path"] = str(secret)
        case "below":
            (folder / "below").mkdir()
            outputs[1]["path"] = str(second.rename(folder / "below" / "1.png"))
        case "link":
            second.unlink()
            second.symlink_to(secret)
        case "folder":
            second.unlink()
            second.mkdir()
        case _:
            second.unlink()
    assert taken_out(outputs, folder, 100_000) == b""
    assert secret.read_bytes() == b"secret"
    assert (folder / "0.png").read_bytes() == b"12345"
    assert not any("inline" in output for output in outputs)
