"""`python -m fleet_agent` as a process: signals, kills, and two of them on one folder."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from fleet_agent import cli
from fleet_agent.spool import Spool
from tests.agent.helpers import AgentProcess, Conversation, ScriptedServer, alive, assign_of, let_go, settings_of
from tests.waiting import wait_until


async def busy(server: ScriptedServer, agent: AgentProcess, prompt: str) -> tuple[Conversation, list[int]]:
    """The agent at work, and its children."""
    talk = await server.conversation()
    talk.say(assign=assign_of("t1", prompt))
    await talk.first("tick")
    children = agent.children()
    assert children
    return talk, children


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_gives_the_work_back_and_says_goodbye(
    server: ScriptedServer, tmp_path: Path, number: signal.Signals
) -> None:
    async with AgentProcess(settings_of(tmp_path, server.address)) as agent:
        talk, children = await busy(server, agent, "wait")
        # As Ctrl-C on a terminal: to the whole process group.
        os.killpg(agent.pid, number)
        assert await agent.wait() == 0, agent.errors.decode()
        assert talk.kinds("heartbeat", "tick") == ["accepted", "started", "released", "goodbye"]
        (released,) = talk.all("released")
        assert (released.job_id, released.token) == ("job-t1", "t1")
        assert talk.closed
        assert len(server.conversations) == 1
    assert not any(alive(pid) for pid in children)
    assert b"Traceback" not in agent.errors
    assert [path for path in (tmp_path / "spool").rglob("*") if path.is_file()] == []


async def test_a_stubborn_engine_is_given_back_too(server: ScriptedServer, tmp_path: Path) -> None:
    async with AgentProcess(settings_of(tmp_path, server.address)) as agent:
        talk, children = await busy(server, agent, "stubborn")
        agent.signal(signal.SIGTERM)
        assert await agent.wait() == 0
        assert talk.kinds("heartbeat", "tick")[-2:] == ["released", "goodbye"]
    assert not any(alive(pid) for pid in children)


async def test_a_result_that_came_before_its_release_was_heard_is_kept(server: ScriptedServer, tmp_path: Path) -> None:
    server.upload_gate.clear()
    async with AgentProcess(settings_of(tmp_path, server.address, cancel_grace_seconds=20)) as agent:
        talk, _ = await busy(server, agent, "late")
        agent.signal(signal.SIGTERM)
        assert await agent.wait() == 0
        assert not talk.all("released")
    assert [entry.token for entry in Spool(tmp_path / "spool").entries()] == ["t1"]


async def test_a_stop_without_a_server(tmp_path: Path) -> None:
    async with AgentProcess(settings_of(tmp_path)) as agent:
        await wait_until(lambda: (tmp_path / "spool").exists() and len(agent.children()) == 1)
        agent.signal(signal.SIGTERM)
        assert await agent.wait() == 0, agent.errors.decode()
    assert b"Traceback" not in agent.errors


async def test_a_stop_while_the_server_does_not_answer_the_goodbye(server: ScriptedServer, tmp_path: Path) -> None:
    server.deaf = True
    async with AgentProcess(settings_of(tmp_path, server.address, stop_grace_seconds=0.3)) as agent:
        await server.conversation()
        await wait_until(lambda: len(agent.children()) == 1)
        agent.signal(signal.SIGTERM)
        assert await agent.wait() == 0, agent.errors.decode()


async def test_killed_in_mid_run_nothing_stays_and_the_next_one_starts_clean(
    server: ScriptedServer, tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, server.address)
    async with AgentProcess(settings) as agent:
        # It cannot hear that its pipe is gone: the kernel must end it.
        talk, children = await busy(server, agent, "hold")
        agent.signal(signal.SIGKILL)
        await agent.wait()
        await wait_until(lambda: not any(alive(pid) for pid in children))
    async with AgentProcess(settings):
        again = await server.conversation(1)
        assert not again.hello.held
        assert not again.hello.spooled
        assert again.hello.instance_id != talk.hello.instance_id
        again.say(assign=assign_of("t2"))
        await again.about("complete", "t2")


async def test_killed_after_the_end_the_next_one_delivers_it(server: ScriptedServer, tmp_path: Path) -> None:
    server.upload_gate.clear()
    settings = settings_of(tmp_path, server.address)
    async with AgentProcess(settings) as agent:
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "paint 300000"))
        await talk.first("heartbeat", lambda beat: beat.slots_free == 1 and beat.held)
        agent.signal(signal.SIGKILL)
        await agent.wait()
    server.upload_gate.set()
    async with AgentProcess(settings):
        again = await server.conversation(1)
        assert [(held.job_id, held.token) for held in again.hello.spooled] == [("job-t1", "t1")]
        complete = await again.about("complete", "t1")
        assert complete.outputs[0].receipt.size_bytes > 300_000
        assert (complete.metadata.prompt, complete.run_seconds > 0) == ("paint 300000", True)


async def test_killed_while_the_server_was_away(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address)
    async with AgentProcess(settings) as agent:
        await busy(server, agent, "wait")
        await server.stop()
        let_go(settings, "t1")
        await wait_until((tmp_path / "spool" / "entries" / "t1.end").exists)
        agent.signal(signal.SIGKILL)
        await agent.wait()
    await server.start()
    async with AgentProcess(settings):
        again = await server.conversation(1)
        await again.about("complete", "t1")


async def test_two_agents_on_one_folder(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address)
    async with AgentProcess(settings) as agent:
        await server.conversation()
        async with AgentProcess(settings) as second:
            assert await second.wait() == 3
        assert f"{tmp_path} is in use by another agent (pid {agent.pid})" in second.errors.decode()
        assert len(server.conversations) == 1
        agent.signal(signal.SIGKILL)
        await agent.wait()
    async with AgentProcess(settings):
        await server.conversation(1)


async def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with AgentProcess(settings_of(tmp_path / "file" / "folder")) as agent:
        assert await agent.wait() == 3
    assert agent.errors.decode().strip().endswith("give a folder that the agent may write to with --data-dir")
    assert b"Traceback" not in agent.errors


async def test_bad_settings_are_named(tmp_path: Path) -> None:
    async with AgentProcess(settings_of(tmp_path), FLEET_AGENT_NODE_ID="heartbeats", FLEET_AGENT_SLOTS="0") as agent:
        assert await agent.wait() == 2
    text = agent.errors.decode()
    assert "node_id" in text
    assert "slots" in text
    assert "Traceback" not in text


async def test_an_agent_ends_with_the_process_that_is_named_its_parent(server: ScriptedServer, tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys, time\n"
        "agent = subprocess.Popen([sys.executable, '-m', 'fleet_agent'],"
        " env={**os.environ, 'FLEET_AGENT_PARENT': str(os.getpid())})\n"
        "print(agent.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = AgentProcess(settings_of(tmp_path, server.address)).environment
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, env={**os.environ, **environment}, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    await server.conversation()
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await wait_until(lambda: not alive(pid))


async def test_an_agent_whose_parent_has_gone_already_does_not_start(tmp_path: Path) -> None:
    async with AgentProcess(settings_of(tmp_path), FLEET_AGENT_PARENT=str(2**22 + 1)) as agent:
        assert await agent.wait() == 1
    assert not (tmp_path / "lock").exists()


def test_the_command_refuses_bad_flags_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as exit_:
        cli.agent(node_id="not a name", data_dir=tmp_path, labels="zone")
    assert exit_.value.exit_code == 2
    text = capsys.readouterr().err
    assert "node_id" in text
    assert "name=value" in text


def test_the_command_starts_an_agent_with_its_flags(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "fleet_client", "agent", "--data-dir", str(tmp_path / "file")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)
    assert (result.returncode, result.stdout) == (3, "")
    assert f"{tmp_path / 'file'}: " in result.stderr
