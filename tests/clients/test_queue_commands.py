"""The queue's commands against a real server that answers as the test wants: what they ask, what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response

from tests.clients.serving import complete, job, reply, stream
from tests.clients.test_commands import OUTPUT, RECEIPT, run

PAUSE = {"target_cluster": "vision", "job_type": None, "priority": None, "create_time": "2026-11-22T10:00:00Z"}
DEAD = {"jobs": [job("failed", error={"reason": "OUT_OF_MEMORY", "detail": "no memory left", "code": "INTERNAL"},
                     end_time="2026-11-22T10:00:00Z")], "next_page_token": "more"}  # fmt: skip
REDRIVEN = {"redriven": 2, "remaining": 3, "failures": []}
NODE: dict[str, Any] = {"node_id": "agx1", "feasible": False, "reason": "VRAM_TOO_SMALL", "detail": "needs 9 GB",
                        "rank": None, "load_seconds": None, "eta_seconds": None}  # fmt: skip
EXPLAINED = {"job_id": "j1", "queue_position": 1, "eta_seconds": 9.4, "node_id": "agx0",
             "summary": "agx0 has the model loaded",
             "nodes": [NODE, {**NODE, "node_id": "agx0", "feasible": True, "reason": None, "detail": "loaded",
                              "rank": 1, "eta_seconds": 9.4}]}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "path", "body"),
    [
        (["pause"], "/api/queue/pause", {}),
        (["pause", "--cluster", "vision"], "/api/queue/pause", {"target_cluster": "vision"}),
        (["resume", "--job-type", "image_gen", "--priority", "low"], "/api/queue/resume",
         {"job_type": "image_gen", "priority": "low"}),
    ],
)  # fmt: skip
def test_pause_and_resume_name_what_they_hold(words: list[str], path: str, body: dict[str, str]) -> None:
    result = run([reply({"pauses": [PAUSE]})], "jobs", *words)
    assert result.exit_code == 0
    assert (result.asked[0].url.path, result.bodies) == (path, [body])  # type: ignore[attr-defined]
    assert "vision" in result.stdout and "any" in result.stdout
    printed = run([reply({"pauses": [PAUSE]})], "jobs", *words, "--json")
    assert json.loads(printed.stdout) == {"pauses": [PAUSE]}


def test_nothing_paused_is_said_and_an_unknown_pause_has_its_exit_code() -> None:
    assert "nothing is paused" in run([reply({"pauses": []})], "jobs", "resume").stderr
    refusal = reply({"detail": "there is no pause with just these fields", "code": "NOT_FOUND"}, 404)
    assert run([refusal], "jobs", "resume", "--cluster", "x").exit_code == 4


def test_dead_lists_with_filters_and_says_that_there_are_more() -> None:
    words = ["dead", "--reason", "OUT_OF_MEMORY", "--model", "m", "--cluster", "c", "--job-type", "image_gen"]
    result = run([reply(DEAD)], "jobs", *words)
    assert dict(result.asked[0].query_params) == {  # type: ignore[attr-defined]
        "reason": "OUT_OF_MEMORY", "target_model": "m", "target_cluster": "c", "job_type": "image_gen", "limit": "20",
    }  # fmt: skip
    assert "OUT_OF_MEMORY" in result.stdout and "no memory left" in result.stdout
    assert "--limit 100" in result.stderr
    assert json.loads(run([reply(DEAD)], "jobs", "dead", "--json").stdout) == DEAD


def test_redrive_takes_ids_or_filters() -> None:
    result = run([reply(REDRIVEN)], "jobs", "redrive", "a", "b", "--request-id", "r")
    assert result.bodies == [{"job_ids": ["a", "b"], "request_id": "r"}]  # type: ignore[attr-defined]
    assert result.stdout == "2 run again, 3 are left\n"
    result = run([reply(REDRIVEN)], "jobs", "redrive", "--reason", "TIMEOUT", "--limit", "5", "--json")
    assert result.bodies == [{"reason": "TIMEOUT", "limit": 5}]  # type: ignore[attr-defined]
    assert json.loads(result.stdout) == REDRIVEN


def test_redrive_of_nothing_asks_nobody_and_failures_are_told() -> None:
    result = run([reply(REDRIVEN)], "jobs", "redrive")
    assert (result.exit_code, result.asked) == (2, [])  # type: ignore[attr-defined]
    failed = {**REDRIVEN, "failures": [{"job_id": "a", "reason": "JOB_NOT_FAILED", "detail": "it runs"}]}
    result = run([reply(failed)], "jobs", "redrive", "a")
    assert result.exit_code == 1 and "a: JOB_NOT_FAILED: it runs" in result.stderr


def test_explain_tells_the_best_node_first() -> None:
    result = run([reply(EXPLAINED)], "jobs", "explain", "j1")
    assert result.asked[0].url.path == "/api/queue/jobs/j1/explain"  # type: ignore[attr-defined]
    lines = result.stdout.splitlines()
    assert lines[0] == "agx0 has the model loaded"
    assert lines[2].startswith("agx0") and "9.4 s" in lines[2]
    assert lines[3].startswith("agx1") and "VRAM_TOO_SMALL" in lines[3]
    assert json.loads(run([reply(EXPLAINED)], "jobs", "explain", "j1", "--json").stdout) == EXPLAINED


def group_end(count: int) -> dict[str, Any]:
    outputs = [{**OUTPUT, "filename": f"{number}.png", "seed": 7 + number} for number in range(count)]
    return complete(result={"outputs": outputs, "text": None}, child_job_ids=["c"] * count)


def test_generate_several_saves_them_all(tmp_path: Path) -> None:
    answers = [reply(RECEIPT), stream(group_end(3)), *(Response(b"png%d" % number) for number in range(3))]
    result = run(answers, "generate", "a sea", "-n", "3", "--after", "p1", "-o", str(tmp_path), "--no-preview")
    assert result.exit_code == 0, result.output
    body = result.bodies[0]  # type: ignore[attr-defined]
    assert (body["payload"]["n"], body["after"]) == (3, ["p1"])
    assert [(tmp_path / f"{number}.png").read_bytes() for number in range(3)] == [b"png0", b"png1", b"png2"]
    assert len(result.stdout.splitlines()) == 3
    result = run(answers, "generate", "a sea", "-n", "3", "-o", str(tmp_path), "--json")
    assert [one["seed"] for one in json.loads(result.stdout)] == [7, 8, 9]


def test_generate_from_a_jobs_picture_waits_for_that_job(tmp_path: Path) -> None:
    answers = [reply(RECEIPT), stream(group_end(1)), Response(b"png")]
    result = run(
        answers, "generate", "more", "--init-image", "job:p1", "--strength", "0.2", "-o", str(tmp_path), "--json"
    )
    body = result.bodies[0]  # type: ignore[attr-defined]
    assert body["after"] == ["p1"] and "n" not in body["payload"]
    assert (body["payload"]["init_image"], body["payload"]["strength"]) == ("job:p1", 0.2)
    assert json.loads(result.stdout)["filename"] == "0.png"


@pytest.mark.parametrize("output", ["-", "one.png"])
def test_several_pictures_need_a_folder(tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run([reply(RECEIPT)], "generate", "a sea", "-n", "2", "-o", output)
    assert (result.exit_code, result.asked) == (2, [])  # type: ignore[attr-defined]
    assert "folder" in result.stderr


def test_show_names_owner_group_and_parents() -> None:
    shown = job("queued", owner="ann", after=["p1", "p2"], group_job_id="g1", wait_reason="DEPENDENCY", node_id=None)
    words = run([reply(shown)], "jobs", "show", "j1").stdout
    assert "ann" in words and "p1" in words and "p2" in words and "g1" in words
    group = run([reply(job(child_job_ids=["a", "b"]))], "jobs", "show", "j1").stdout
    assert "2 jobs" in group


def test_list_takes_owner_and_group() -> None:
    result = run(
        [reply({"jobs": [], "next_page_token": ""})], "jobs", "list", "--owner", "ann", "--group", "g1", "--json"
    )
    asked = dict(result.asked[0].query_params)  # type: ignore[attr-defined]
    assert (asked["owner"], asked["group_job_id"]) == ("ann", "g1")
