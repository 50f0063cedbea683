"""The container engine on a real Docker engine: runs, folders, progress, rules, and how each run ends."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import docker
import pytest

from fleet_agent.engines.base import Cancelled, EngineError, EngineSettings, InputFile, Task
from fleet_agent.engines.container.engine import ContainerEngine
from fleet_agent.engines.container.progress import Lines, percent_of
from fleet_agent.engines.leftovers import Leftovers
from tests.agent.engines.helpers import Recorder
from tests.container_jobs.conftest import names_of
from tests.docker_daemon import IMAGE, DockerDaemon

JOB = "0198f2c4-7a1e-7c3b-9d52-3f0e8a6b1c2d"
NAME = f"fleet-job-{JOB}"


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Path:
    """Where a test's agent keeps its things; the engine sees the same paths."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "hello.txt").write_text("from the node\n")
    return tmp_path


@pytest.fixture
def engine(daemon: DockerDaemon, folder: Path, no_container_is_left: None) -> ContainerEngine:
    options = {"docker_host": daemon.url, "mount_roots": str(folder / "shared"), "node_id": "agx0"}
    return ContainerEngine(EngineSettings(folder / "models", folder / "data", options))


def _task(folder: Path, script: str, *, job_type: str = "training", **fields: Any) -> Task:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    inputs = fields.pop("files", {})
    whole = {"image": IMAGE, "command": f"/bin/busybox sh -c '{script}'", "gpus": False, **fields}
    return Task(JOB, job_type, None, (), whole, 0, out, inputs=inputs)


def test_it_says_what_it_is(engine: ContainerEngine) -> None:
    info = engine.info()
    assert info.job_types == ("training", "custom")
    assert info.version


def test_folders_environment_and_results(engine: ContainerEngine, folder: Path, dockerd: docker.DockerClient) -> None:
    (folder / "in").write_text("one ")
    (folder / "in2").write_text("two ")
    files = {
        "input:1": (InputFile(folder / "in", "text/plain", "a b.txt"),),
        "job:x": (InputFile(folder / "in2", "text/plain", "../a b.txt"), InputFile(folder / "in2", "text/plain")),
    }
    script = (
        "ls /inputs | sort >/outputs/names; cat /inputs/a* /models/hello.txt >/outputs/sub.txt; "
        "mkdir /outputs/deep; echo $WORD $FLEET_JOB_ID >/outputs/deep/env.json; ln -s /etc/passwd /outputs/link; "
        "touch /inputs/no 2>/dev/null || echo readonly >/outputs/ro; echo kept >/checkpoints/1; "
        "for n in 0 25 50 100; do echo FLEET_PROGRESS 0.$n; done; echo FLEET_PROGRESS 1; echo done"
    )
    task = _task(
        folder,
        script,
        env={"WORD": "word"},
        mounts=[f"{folder}/shared:/models:ro"],
        inputs=["input:1", "job:x"],
        files=files,
        memory_bytes="67108864",
        cpus=0.5,
    )
    recorder = Recorder()
    result = engine.run(task, recorder)
    assert result.exit_code == 0
    read = {str(one.path.relative_to(folder / "out" / "outputs")): one.path.read_text() for one in result.outputs}
    assert read == {
        "names": "_a b.txt\na b.txt\nin2\n",
        "sub.txt": "one from the node\n",
        "deep/env.json": f"word {JOB}\n",
        "ro": "readonly\n",
    }
    assert {one.path.name: one.content_type for one in result.outputs}["env.json"] == "application/json"
    assert recorder.steps[-1] == (100, 100)
    assert [step for step, _ in recorder.steps] == sorted(step for step, _ in recorder.steps)
    assert "done" in recorder.messages
    # It has succeeded: nothing goes on from its checkpoints.
    assert not (folder / "data" / "checkpoints" / JOB).exists()


def test_checkpoints_outlive_a_failure(engine: ContainerEngine, folder: Path) -> None:
    script = "if test -e /checkpoints/1; then cp /checkpoints/1 /outputs/; else echo half >/checkpoints/1; exit 3; fi"
    with pytest.raises(EngineError, match="exit code 3") as raised:
        engine.run(_task(folder, script), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("EXIT_NONZERO", True)
    assert raised.value.result is not None
    assert raised.value.result.exit_code == 3
    [output] = engine.run(_task(folder, script), Recorder()).outputs
    assert output.path.read_text() == "half\n"


def test_a_failure_shows_the_last_lines(engine: ContainerEngine, folder: Path) -> None:
    with pytest.raises(EngineError, match=r"(?s)exit code 1: .*no such loss"):
        engine.run(_task(folder, "for n in 1 2 3; do echo line $n; done; echo no such loss >&2; exit 1"), Recorder())


def test_a_custom_job_is_judged_at_the_node(engine: ContainerEngine, folder: Path) -> None:
    result = engine.run(
        _task(folder, "echo hi >/outputs/x", job_type="custom", engine="container", cpus=1.0), Recorder()
    )
    assert result.exit_code == 0
    for fields, words in (
        ({"no_such": 1}, "no_such"),
        ({"image": ""}, "image"),
        ({"stop_grace_seconds": 601.0}, "stop_grace_seconds"),
        ({"mounts": ["/etc:/outputs/etc"]}, "the job's own folder"),
    ):
        with pytest.raises(EngineError, match=words) as raised:
            engine.run(_task(folder, "true", job_type="custom", **fields), Recorder())
        assert (raised.value.reason, raised.value.retryable) == ("INVALID_FIELD", False)


def test_the_rules_of_deploy_hold(engine: ContainerEngine, folder: Path, dockerd: docker.DockerClient) -> None:
    for mount, reason in (("/etc:/x", "MOUNT_FORBIDDEN"), (f"{folder}/data:/x", "MOUNT_FORBIDDEN")):
        with pytest.raises(EngineError) as raised:
            engine.run(_task(folder, "true", mounts=[mount]), Recorder())
        assert raised.value.reason == reason
    recorder = Recorder()
    seen: list[dict[str, Any]] = []

    def look(_: int) -> bool:
        if not seen and "here" in recorder.messages:
            seen.append(dict(dockerd.api.inspect_container(NAME)))
        return bool(seen)

    recorder.cancel_when = look
    with pytest.raises(Cancelled):
        engine.run(_task(folder, "echo here; sleep 1000", stop_grace_seconds=0), recorder)
    [attrs] = seen
    host = attrs["HostConfig"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert not host["CapAdd"] and not host["Devices"] and not host["PidMode"]
    assert host["NetworkMode"] != "host" and host["IpcMode"] != "host" and not host["UTSMode"]
    assert (host["Privileged"], host["PidsLimit"], host["RestartPolicy"]["Name"]) == (False, 4096, "no")
    assert attrs["Config"]["Labels"]["fleet.job_id"] == JOB
    # No deploy: it is not for DELETE /api/fleet/deploy.
    assert "fleet.node_id" not in attrs["Config"]["Labels"]


@pytest.mark.parametrize(("image", "reason"), [("no-such-image:1", None), ("UPPER CASE", "INVALID_FIELD")])
def test_an_image_that_cannot_be_had(engine: ContainerEngine, folder: Path, image: str, reason: str | None) -> None:
    with pytest.raises(EngineError) as raised:
        engine.run(_task(folder, "true", image=image), Recorder())
    assert raised.value.reason in ([reason] if reason else ["IMAGE_NOT_FOUND", "REGISTRY_UNAVAILABLE"])


def test_gpus_that_are_not_there(engine: ContainerEngine, folder: Path) -> None:
    with pytest.raises(EngineError) as raised:
        engine.run(_task(folder, "true", gpus=True), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("GPU_UNAVAILABLE", True)


def test_cancelled_it_has_its_grace(engine: ContainerEngine, folder: Path) -> None:
    recorder = Recorder()
    recorder.cancel_when = lambda done: "ready" in recorder.messages
    script = 'trap "echo half >/checkpoints/1; exit 0" TERM; echo ready; while true; do sleep 0.1; done'
    with pytest.raises(Cancelled):
        engine.run(_task(folder, script.replace("'", '"'), stop_grace_seconds=100), recorder)
    assert (folder / "data" / "checkpoints" / JOB / "1").read_text() == "half\n"


def test_cancelled_before_the_container_and_while_it_is_made(engine: ContainerEngine, folder: Path) -> None:
    for most in (0, 1, 2, 3):
        recorder = Recorder()
        recorder.cancel_when = lambda done, most=most, recorder=recorder: recorder.checks > most  # type: ignore[misc]
        with pytest.raises(Cancelled):
            engine.run(_task(folder, "sleep 1000", stop_grace_seconds=0), recorder)


def test_bars_of_tqdm_are_progress_while_they_are_drawn(engine: ContainerEngine, folder: Path) -> None:
    recorder = Recorder()
    script = (
        r'sleep 0.5; printf "\r 10%%|#    | 1/10 [00:01<00:09]" >&2; '
        r'printf "\r 40%%|##   | 4/10" >&2; printf "\r" >&2; while test ! -e /checkpoints/go; do sleep 0.05; done'
    )
    go = folder / "data" / "checkpoints" / JOB / "go"
    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(engine.run(_task(folder, script), recorder)), daemon=True)
    thread.start()
    # The line is not ended, and the program not either.
    recorder.wait_for(lambda: (40, 100) in recorder.steps)
    go.touch()
    thread.join(50)
    assert ended


def test_out_of_memory(engine: ContainerEngine, folder: Path) -> None:
    script = "x=aaaaaaaa; while true; do x=$x$x; done"
    with pytest.raises(EngineError) as raised:
        engine.run(_task(folder, script, memory_bytes="8388608"), Recorder())
    assert raised.value.reason in ("OUT_OF_MEMORY", "EXIT_NONZERO")
    assert raised.value.retryable


def test_a_container_that_somebody_removes(engine: ContainerEngine, folder: Path, dockerd: docker.DockerClient) -> None:
    recorder = Recorder()
    removed: list[bool] = []

    def remove(_: int) -> bool:
        if not removed and "here" in recorder.messages:
            removed.append(True)
            dockerd.containers.get(NAME).remove(force=True)
        return False

    recorder.cancel_when = remove
    with pytest.raises(EngineError, match=r"removed by somebody|exit code 137"):
        engine.run(_task(folder, "echo here; sleep 1000"), recorder)


def test_what_was_left_running_is_removed_by_the_next(
    engine: ContainerEngine, folder: Path, dockerd: docker.DockerClient
) -> None:
    """By the look at the engine every so often as well; what is no job's, or a living process's, is left alone."""
    for name in ("fleet-job-left-behind", "fleet-job-alive", "somebodys"):
        dockerd.api.start(dockerd.api.create_container(IMAGE, "sleep 1000", name=name)["Id"])
    notes = folder / "data" / "container-jobs"
    notes.mkdir(parents=True)
    (notes / "0-fallen.json").write_text('{"name": "fleet-job-left-behind"}')
    (notes / "0-other.json").write_text('{"name": "somebodys"}')
    (notes / "0-torn.json").write_text('{"na')
    living = Leftovers(notes)
    living.note("fleet-job-alive")
    engine.info()
    assert set(names_of(dockerd)) == {"fleet-job-alive", "somebodys"}
    living.give_up()
    engine.info()
    assert names_of(dockerd) == ["somebodys"]
    assert not list(notes.iterdir())
    dockerd.api.remove_container("somebodys", force=True)


def test_without_a_docker_engine(tmp_path: Path) -> None:
    engine = ContainerEngine(EngineSettings(tmp_path, tmp_path, {"docker_host": f"unix://{tmp_path}/none.sock"}))
    for call in (engine.info, lambda: engine.run(_task(tmp_path, "true"), Recorder())):
        with pytest.raises(EngineError, match="does not answer") as raised:
            call()
        assert (raised.value.reason, raised.value.retryable) == ("DOCKER_UNAVAILABLE", True)


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("FLEET_PROGRESS 0.4", 40),
        ("FLEET_PROGRESS 1", 100),
        ("FLEET_PROGRESS=.29 epoch 2", 29),
        ("FLEET_PROGRESS 7", 100),
        (" 45%|####   | 45/100 [00:10<00:12]", 45),
        ("loss 45%", None),
        ("FLEET_PROGRESS soon", None),
        ("say FLEET_PROGRESS 0.4", None),
    ],
)
def test_what_tells_progress(line: str, percent: int | None) -> None:
    assert percent_of(line) == percent


def test_lines_wherever_they_are_cut() -> None:
    for size in (1, 2, 3, 50):
        lines, found = Lines(), []
        whole = "a\r\nb\rcé\n\n 5%|x".encode()
        for at in range(0, len(whole), size):
            found += lines.heard(whole[at : at + size])
        found += lines.rest()
        assert [line.replace("�", "") for line in found][:2] == ["a", "b"]
        assert found[-1] == "5%|x"
