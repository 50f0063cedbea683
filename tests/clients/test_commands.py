"""Commands against a real server that answers as the test wants: words, streams of output, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fleet_client.cli.app import build
from typer.main import get_command
from typer.testing import CliRunner, Result

from tests.clients.serving import Answer, complete, event, job, reply, serving, stream

RECEIPT = {"job_id": "j1", "status": "queued", "queue_position": 1, "target_model": "m", "resolved_model": "m",
           "wait_reason": None}  # fmt: skip
PAGE = {"jobs": [job("queued", wait_reason="NO_NODE", node_id=None)], "next_page_token": "more"}
OUTPUT = {"filename": "a.png", "width": 64, "height": 64, "seed": 7, "size_bytes": 3, "job_id": "j1"}


whole = cache(build)


@pytest.fixture(autouse=True, scope="module")
def put_together_once() -> Iterator[None]:
    """The runner makes a command of an application at each call, which takes ten times as long as the call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typer.testing._get_command", cache(get_command))
        yield


def run(answers: Sequence[Any], *words: str, **options: Any) -> Result:
    with serving(*answers) as server:
        result = CliRunner().invoke(whole(), [*words, "--url", server.url], **options)
        result.asked = server.asked  # type: ignore[attr-defined]
        result.bodies = server.bodies  # type: ignore[attr-defined]
    return result


def all_commands(*, groups: bool = True) -> list[list[str]]:
    """Every command there is, as the words to call it; without `groups`, those that do more than hold others."""
    found: list[list[str]] = []

    def walk(command: Any, words: list[str]) -> None:
        if groups or not hasattr(command, "commands") or command.invoke_without_command:
            found.append(words)
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, [*words, name])

    walk(get_command(whole()), [])
    return found


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_command_has_help(words: list[str]) -> None:
    for flag in ("--help", "-h"):
        result = CliRunner().invoke(whole(), [*words, flag])
        if flag == "--help" or words[:1] not in (["up"], ["server"], ["agent"], ["sketch-model"]):
            assert result.exit_code == 0
            assert "Usage" in result.output
    assert words[-1:] in ([], ["jobs"], ["nodes"]) or "Broken" not in result.output


@pytest.mark.parametrize("words", all_commands(groups=False), ids=" ".join)
def test_every_command_that_prints_data_has_json(words: list[str]) -> None:
    assert "--json" in CliRunner().invoke(whole(), [*words, "--help"], terminal_width=200).output


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (reply({"detail": "width: no", "code": "INVALID_ARGUMENT", "violations": []}, 400), 2, "width: no"),
        (reply({"detail": "no such job", "code": "NOT_FOUND"}, 404), 4, "no such job"),
        (reply({"detail": "no key"}, 401), 1, "Give the key with --api-key or FLEET_API_KEY."),
        (reply({"detail": "full"}, 503, retry_after="5"), 1, "Try again in 5 s."),
        (reply({"detail": "broken", "request_id": "r-9"}, 500), 1, "In the server's log it is request r-9."),
        (reply("not an error of ours", 502), 1, "HTTP status 502"),
    ],
)
def test_refusals_say_what_to_do_next(answer: Any, code: int, said: str) -> None:
    result = run([answer], "jobs", "show", "j1")
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_no_server() -> None:
    result = CliRunner().invoke(whole(), ["status", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 3
    assert "http://127.0.0.1:9 cannot be reached" in result.stderr
    assert "`fleet up`" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["status", "--url", "ftp://gpu"],
        ["jobs", "list", "--limit", "0"],
        ["jobs", "show"],
        ["generate", "x", "-o", "/nowhere/x.png"],
        ["generate", "x", "-o", "-", "--json"],
        ["generate", "x", "--lora", "ink:much"],
        ["generate", "x", "--width", "wide"],
        ["jobs", "submit", "/nowhere.json"],
        ["wrong"],
    ],
    ids=" ".join,
)
def test_bad_arguments(words: list[str]) -> None:
    result = CliRunner().invoke(whole(), words, env={"FLEET_URL": "http://127.0.0.1:9"})
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.strip()


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    result = run([reply(RECEIPT)], "generate", "x", "-o", str(tmp_path / "missing" / "x.png"))
    assert result.exit_code == 2
    assert f"there is no folder {tmp_path / 'missing'}" in result.stderr
    assert result.asked == []  # type: ignore[attr-defined]


def test_a_list_is_one_line_each_however_long_the_names() -> None:
    name = "n" * 300
    result = run([reply({"jobs": [job(node_id=name)], "next_page_token": ""})], "jobs", "list")
    header, row = result.stdout.splitlines()
    assert header.split() == ["JOB", "TYPE", "STATUS", "PRIORITY", "DONE", "NODE", "AGE"]
    assert name in row and "50 %" in row
    assert not row.endswith(" ")


def test_hints_are_not_data() -> None:
    result = run([reply(PAGE)], "jobs", "list")
    assert result.exit_code == 0
    assert "queued (NO_NODE)" in result.stdout
    assert result.stderr == "there are more: --limit 100\n"
    nothing = run([reply({"jobs": [], "next_page_token": ""})], "jobs", "list")
    assert (nothing.stdout, nothing.stderr) == ("", "no jobs\n")


def test_json_is_the_reply() -> None:
    result = run([reply(PAGE)], "jobs", "list", "--json", "--status", "queued", "--status", "running", "--node", "a")
    assert json.loads(result.stdout) == PAGE
    assert result.stderr == ""
    assert result.asked[0].url.query == "status=queued&status=running&node_id=a&limit=20"  # type: ignore[attr-defined]


def test_names_of_others_do_not_steer_the_terminal() -> None:
    shown = job("failed", error={"reason": "ENGINE_FAILED", "detail": "\x1b]0;owned\x07[bold]x[/]", "code": "INTERNAL"})
    shown["payload"] = {"prompt": "two\nlines \x1b[2J [red]"}
    result = run([reply(shown)], "jobs", "show", "j1")
    assert "\x1b" not in result.output
    assert "]0;owned[bold]x[/]" in result.stdout
    assert "prompt: two" in result.stdout and "[2J [red]" in result.stdout


@pytest.mark.parametrize(
    ("content", "path", "body"),
    [
        ({"job_type": "custom", "payload": {}}, "/api/queue/jobs", {"job_type": "custom", "payload": {}}),
        ([{"job_type": "custom"}], "/api/queue/jobs/batch", {"jobs": [{"job_type": "custom"}]}),
        ({"jobs": [{"job_type": "custom"}]}, "/api/queue/jobs/batch", {"jobs": [{"job_type": "custom"}]}),
    ],
)
def test_submit_takes_a_job_or_a_list(content: Any, path: str, body: Any, tmp_path: Path) -> None:
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(content))
    batch = path.endswith("batch")
    result = run([reply({"jobs": [RECEIPT]} if batch else RECEIPT)], "jobs", "submit", str(file))
    assert (result.exit_code, result.stdout) == (0, "j1  queued, place 1\n")
    assert result.asked[0].url.path == path  # type: ignore[attr-defined]
    assert result.bodies == [body]  # type: ignore[attr-defined]
    keyed = run([reply({"jobs": [RECEIPT]} if batch else RECEIPT)], "jobs", "submit", str(file), "--request-id", "r1")
    assert keyed.bodies == [{**body, "request_id": "r1"}]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is no JSON"), ("7", "it is no object"), ("[{}, 7]", "jobs[1] is no")]
)
def test_submit_refuses_what_holds_no_jobs(text: str, said: str) -> None:
    result = CliRunner().invoke(whole(), ["jobs", "submit", "-"], input=text, env={"FLEET_URL": "http://127.0.0.1:9"})
    assert result.exit_code == 2
    assert said in result.stderr


def generated(*events: dict[str, Any]) -> list[Answer | Any]:
    """What the server answers to `fleet generate`: receipt, events, file."""
    data = reply({})
    data.body = b"PNG"
    data.headers["content-length"] = "3"
    return [reply(RECEIPT), stream(*events), data]


DONE = complete(result={"outputs": [OUTPUT]}, job_id="j1")


def test_generate_tells_the_file_on_standard_output_and_all_else_elsewhere(tmp_path: Path) -> None:
    answers = generated(event("job_update", job(job_id="j1")), event("job_update", job(job_id="j1")), DONE)
    result = run(
        answers, "generate", "a sunset", "-o", str(tmp_path / "x.png"), "--seed", str(1 << 60), "--lora", "i:2"
    )
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'x.png'}  64x64, seed 7\n"
    assert result.stderr.splitlines() == ["job j1: running on agx0", "job j1: succeeded"]
    assert (tmp_path / "x.png").read_bytes() == b"PNG"
    body = result.bodies[0]  # type: ignore[attr-defined]
    assert body["payload"] == {
        "prompt": "a sunset",
        "seed": str(1 << 60),
        "loras": [{"name": "i", "weight": 2.0}],
    }
    assert body["priority"] == "high"
    assert re.fullmatch(r"[0-9a-f-]{36}", body["request_id"])


def test_generate_into_a_folder_and_to_standard_output(tmp_path: Path) -> None:
    run(generated(DONE), "generate", "x", "-o", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    piped = run(generated(DONE), "generate", "x", "-o", "-")
    assert piped.stdout_bytes == b"PNG"
    assert "seed 7" in piped.stderr


def test_generate_replaces_a_file_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    old = tmp_path / "x.png"
    old.write_bytes(b"old and longer")
    old.chmod(0o640)
    run(generated(DONE), "generate", "x", "-o", str(old))
    assert old.read_bytes() == b"PNG"
    assert old.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [old]


def test_generate_prints_json(tmp_path: Path) -> None:
    result = run(generated(DONE), "generate", "x", "-o", str(tmp_path), "--json")
    assert json.loads(result.stdout) == {**OUTPUT, "path": str(tmp_path / "a.png")}


def test_generate_tells_why_it_failed_and_where_to_look() -> None:
    error = {"detail": "the engine ran out of memory", "reason": "OUT_OF_MEMORY", "code": "INTERNAL"}
    result = run(generated(complete("failed", error=error, job_id="j1")), "generate", "x")
    assert result.exit_code == 1
    assert "error: OUT_OF_MEMORY: the engine ran out of memory" in result.stderr
    assert "`fleet jobs show j1`" in result.stderr


def test_generate_past_its_time_is_cancelled() -> None:
    late = {"detail": "late", "code": "DEADLINE_EXCEEDED", "reason": "TIMEOUT"}
    answers = [reply(RECEIPT), stream(event("job_update", job()), error=late), reply(job("cancelled"))]
    result = run(answers, "generate", "x", "--timeout", "30")
    assert result.exit_code == 1
    assert "job j1 is cancelled" in result.stderr
    assert "no picture within 30 s" in result.stderr
    assert [request.method for request in result.asked] == ["POST", "GET", "DELETE"]  # type: ignore[attr-defined]


def test_watch_has_the_exit_code_of_the_job() -> None:
    update = event("job_update", job(), "1-0")
    good = run([stream(update, complete(result={"outputs": [OUTPUT]}))], "jobs", "watch", "j1")
    assert (good.exit_code, good.stdout) == (0, "j1  succeeded  a.png\n")
    bad = run([stream(update, complete("cancelled"))], "jobs", "watch", "j1", "--json")
    assert bad.exit_code == 1
    assert [json.loads(line)["type"] for line in bad.stdout.splitlines()] == ["job_update", "job_complete"]


def test_events_for_people_and_for_machines() -> None:
    happened = [
        event("job_update", job(), "1-0"),
        event("job_progress", {"job_id": "j", "progress": 50, "step": 10, "steps": 20, "node_id": "agx0"}),
        event("node_update", {"node_id": "agx0", "status": "online", "cordoned": True}, "2-0"),
        event("gap", {"since": "1-0", "oldest_id": "5-0"}),
        event("something_new", {"status": "fine"}, "3-0"),
        complete("failed", error={"detail": "out of memory"}),
    ]
    # The stream never ends of itself: a refusal ends it.
    answers = [stream(*happened), reply({"detail": "withdrawn"}, 403)]
    words = run(answers, "events", "--type", "job_update", "--job", "j")
    assert "type=job_update&job_id=j" in words.asked[0].url.query  # type: ignore[attr-defined]
    assert [line[10:].split()[0] for line in words.stdout.splitlines()] == [one["type"] for one in happened]
    assert "50 %, step 10 of 20 on agx0" in words.stdout
    assert "online (cordoned)" in words.stdout
    assert "failed (out of memory)" in words.stdout
    machine = run(answers, "events", "--json")
    assert [json.loads(line) for line in machine.stdout.splitlines()] == happened


def test_download(tmp_path: Path) -> None:
    answers = [generated()[2], reply(OUTPUT)]
    result = run(answers, "download", "a.png", "-o", str(tmp_path / "b.png"))
    assert result.stdout == f"{tmp_path / 'b.png'}  3 B\n"
    assert (tmp_path / "b.png").read_bytes() == b"PNG"


def test_a_broken_installation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    entry = metadata.EntryPoint("odd", "nowhere.at_all:command", "fleet.commands")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])
    result = CliRunner().invoke(build(), ["odd"])
    assert result.exit_code == 1
    assert "nowhere.at_all:command cannot be loaded" in result.stderr


def test_a_command_of_ours_imports_nothing_of_the_packages_around_it() -> None:
    """Each `fleet jobs` would wait for what only `fleet simulate` needs."""
    script = (
        "import sys; sys.argv = ['fleet', *sys.argv[1:]]\n"
        "from fleet_client.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'fleet_agent', 'fleet_server', 'grpc'}))"
    )

    def imported(*words: str) -> str:
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[-1]

    assert imported("jobs", "--help") == "[]"
    assert imported("agent", "--help") == "['fleet_agent']"
    assert "grpc" not in imported("simulate", "--help")
