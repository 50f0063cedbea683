"""Swarm services on a real swarm of two machines, through `fleet up`, as callers see them."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from docker.models.containers import Container
from fleet_client import ApiError, AsyncFleetCommander, FleetCommander
from websockets.sync.client import connect

from tests import documented
from tests.docker_daemon import IMAGE, add_image
from tests.e2e.commands import fleet_command
from tests.e2e.fleet_process import clean_environment
from tests.parts import need
from tests.swarm.conftest import SwarmFleet
from tests.swarm.registry import PASSWORD, USERNAME

TALK = "echo hello; echo sorry >&2; exec sleep 100000"


def refusal(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["reason"]


def test_there_is_no_swarm_before_one_is_made(swarm_fleet: SwarmFleet) -> None:
    before = swarm_fleet.before
    assert refusal(before) == (503, "NOT_SWARM_MANAGER")
    assert int(before.headers["Retry-After"]) > 0
    assert "docker swarm init" in before.json()["detail"]


def test_documented_lines(swarm: SwarmFleet, tmp_path: Path) -> None:
    url = swarm.fleet.url
    swarm.service("zebra", replicas=1)
    service_id = swarm.service("sdxl-worker", replicas=2, labels={"tier": "gpu"})
    listed = documented.reply(documented.SWARM_SERVICES, url, tmp_path)
    assert set(listed) == {"services", "next_page_token"}
    assert [one["name"] for one in listed["services"]] == ["sdxl-worker", "zebra"]

    service = documented.reply(documented.SWARM_SERVICE, url, tmp_path, service_id=service_id)
    assert {
        name: service[name] for name in ("service_id", "name", "image", "mode", "replicas", "running_replicas")
    } == {
        "service_id": service_id,
        "name": "sdxl-worker",
        "image": IMAGE,
        "mode": "replicated",
        "replicas": 2,
        "running_replicas": 2,
    }
    assert service["labels"] == {"tier": "gpu"}
    assert (service["ports"], service["update"], service["autoscale"]) == ([], None, None)
    # The scheduler spreads them; each is on the fleet's node of that machine.
    assert sorted((task["node_id"], task["hostname"], task["status"]) for task in service["tasks"]) == [
        ("agx0", "agx0", "running"),
        ("agx1", "agx1", "running"),
    ]
    assert sorted(task["slot"] for task in service["tasks"]) == [1, 2]

    before = swarm.tasks("sdxl-worker")
    scaled = documented.reply(documented.SWARM_SCALE, url, tmp_path, service_id=service_id)
    assert (scaled["service_id"], scaled["replicas"]) == (service_id, 4)
    assert scaled["version"] > service["version"]
    swarm.until(lambda: swarm.running("sdxl-worker") == 4)
    # Whoever ran runs on, in the same container.
    assert before.items() <= swarm.tasks("sdxl-worker").items()


def test_scaling_down_stops_only_what_is_too_much(swarm: SwarmFleet) -> None:
    swarm.service("w", replicas=4)
    before = swarm.tasks("w")
    assert swarm.api.post("/api/swarm/services/w/scale", params={"replicas": 2}).status_code == 200
    swarm.until(lambda: len(swarm.tasks("w")) == 2)
    assert swarm.tasks("w").items() <= before.items()
    assert swarm.api.post("/api/swarm/services/w/scale?replicas=0").json()["replicas"] == 0
    swarm.until(lambda: not swarm.tasks("w") and swarm.running("w") == 0)


def test_many_at_once_all_succeed(swarm: SwarmFleet) -> None:
    swarm.service("busy")

    def scale(replicas: int) -> int:
        return swarm.api.post("/api/swarm/services/busy/scale", params={"replicas": replicas}).status_code

    # Each reads a version that another one may have outdated by the time it writes.
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(scale, [2, 3, 2, 3, 2, 3, 2, 3])) == {200}
    assert swarm.get("busy")["replicas"] in (2, 3)


def test_a_repeated_request_acts_once(swarm: SwarmFleet) -> None:
    swarm.service("again")
    path = "/api/swarm/services/again"
    asked = {"replicas": "2", "request_id": "scale-1"}
    first = swarm.api.post(f"{path}/scale", params=asked).json()
    assert swarm.api.post(f"{path}/scale", params={"replicas": 3}).json()["replicas"] == 3
    assert swarm.api.post(f"{path}/scale", params=asked).json() == first
    assert swarm.get("again")["replicas"] == 3
    other = swarm.api.post(f"{path}/scale", params={"replicas": 1}, headers={"Idempotency-Key": "scale-1"})
    assert refusal(other) == (409, "IDEMPOTENCY_KEY_REUSED")
    # A rollback that is repeated does not go back and forth.
    for _ in range(3):
        assert swarm.api.post(f"{path}/rollback", params={"request_id": "back-1"}).json()["replicas"] == 2
    assert swarm.get("again")["replicas"] == 2


def test_bad_requests(swarm: SwarmFleet) -> None:
    service_id = swarm.service("everywhere", replicas=None)
    service = swarm.get("everywhere")
    assert (service["mode"], service["replicas"], service["running_replicas"]) == ("global", None, 2)
    path = "/api/swarm/services/everywhere"
    assert refusal(swarm.api.post(f"{path}/scale?replicas=2")) == (409, "SERVICE_NOT_REPLICATED")
    assert refusal(swarm.api.post(f"{path}/autoscale", json={"max_replicas": 2})) == (409, "SERVICE_NOT_REPLICATED")
    for query in ("", "?replicas=-1", "?replicas=1001", "?replicas=two", "?replicas=2&dryrun=true"):
        assert swarm.api.post(f"{path}/scale{query}").status_code == 400, query
    for method, call in (
        ("GET", ""),
        ("POST", "/scale?replicas=2"),
        ("POST", "/rollback"),
        ("GET", "/logs"),
        ("GET", "/logs/stream"),
    ):
        # The beginning of an id is no id: it might be another service than was meant.
        for name in ("no-such", service_id[:4]):
            reply = swarm.api.request(method, f"/api/swarm/services/{name}{call}")
            assert refusal(reply) == (404, "SERVICE_NOT_FOUND"), (method, call, name)
    reply = swarm.api.post("/api/swarm/services/no-such/update", json={"image": IMAGE})
    assert refusal(reply) == (404, "SERVICE_NOT_FOUND")
    reply = swarm.api.post(f"{path}/autoscale", json={"min_replicas": 3, "max_replicas": 2})
    assert refusal(reply) == (400, "INVALID_FIELD")


def test_update_and_rollback(swarm: SwarmFleet) -> None:
    engine = swarm.engine
    for tag in ("1", "2"):
        name = f"{swarm.registry}/sdxl:{tag}"
        add_image(engine, name, f"exec sleep {tag}00000")
        engine.images.push(name)
    swarm.service("sdxl", replicas=2, image=f"{swarm.registry}/sdxl:1")
    path = "/api/swarm/services/sdxl"
    assert refusal(swarm.api.post(f"{path}/rollback")) == (409, "NO_PREVIOUS_SPEC")

    reply = swarm.api.post(f"{path}/update", json={"image": f"{swarm.registry}/sdxl:2"})
    assert (reply.status_code, reply.json()["image"]) == (200, f"{swarm.registry}/sdxl:2")
    done = swarm.updated("sdxl", "completed")
    assert {task["image"] for task in done["tasks"] if task["desired_status"] == "running"} == {
        f"{swarm.registry}/sdxl:2"
    }
    # The tag is pinned to what the registry had: the worker took it from there.
    [service] = engine.services.list(filters={"name": "sdxl"})
    assert "@sha256:" in service.attrs["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"]

    assert swarm.api.post(f"{path}/rollback").json()["image"] == f"{swarm.registry}/sdxl:1"
    swarm.updated("sdxl", "rollback_completed")
    missing = swarm.api.post(f"{path}/update", json={"image": f"{swarm.registry}/sdxl:3"})
    assert refusal(missing) == (404, "IMAGE_NOT_FOUND")
    away = swarm.api.post(f"{path}/update", json={"image": f"{swarm.manager.address}:5999/sdxl:1"})
    assert refusal(away) == (503, "REGISTRY_UNAVAILABLE")
    for image in ("UPPER:1", "../../containers", "a b", "x?force=1"):
        assert refusal(swarm.api.post(f"{path}/update", json={"image": image})) == (400, "INVALID_FIELD"), image
    assert swarm.get("sdxl")["image"] == f"{swarm.registry}/sdxl:1"
    # An image that this machine has and no registry is taken as it is.
    assert swarm.api.post(f"{path}/update", json={"image": IMAGE}).json()["image"] == IMAGE


def test_an_image_behind_a_login(swarm: SwarmFleet) -> None:
    image = f"{swarm.locked_registry}/secret:1"
    add_image(swarm.engine, image)
    login = {"username": USERNAME, "password": PASSWORD}
    swarm.engine.images.push(image, auth_config=login)
    swarm.engine.images.remove(image)
    swarm.service("private", replicas=2)
    path = "/api/swarm/services/private/update"
    for auth in (None, {"username": USERNAME, "password": "wrong"}):
        reply = swarm.api.post(path, json={"image": image, "registry_auth": auth})
        assert refusal(reply) == (404, "IMAGE_NOT_FOUND")
        assert "wrong" not in reply.text
    assert swarm.api.post(path, json={"image": image, "registry_auth": login}).status_code == 200
    # Both machines log in with what was given.
    done = swarm.updated("private", "completed")
    running = [task for task in done["tasks"] if task["status"] == "running"]
    assert sorted((task["node_id"], task["image"]) for task in running) == [("agx0", image), ("agx1", image)]


def test_logs_of_all_tasks(swarm: SwarmFleet) -> None:
    service_id = swarm.service("talk", replicas=2, command=TALK)
    path = "/api/swarm/services/talk/logs"
    swarm.until(lambda: len(swarm.api.get(path).json()["lines"]) == 4)
    reply = swarm.api.get(path).json()
    assert reply["service_id"] == "talk"
    lines = reply["lines"]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    tasks = set(swarm.tasks("talk"))
    assert {(line["task_id"], line["stream"], line["text"]) for line in lines} == {
        (task, stream, text) for task in tasks for stream, text in (("stdout", "hello"), ("stderr", "sorry"))
    }
    # The last of all tasks together.
    last = swarm.api.get(f"/api/swarm/services/{service_id}/logs", params={"tail": 3}).json()["lines"]
    assert last == lines[1:]
    assert swarm.api.get(path, params={"tail": 0}).json()["lines"] == []
    since = swarm.api.get(path, params={"since": lines[2]["time"]}).json()["lines"]
    assert since == lines[2:]
    until = swarm.api.get(path, params={"until": lines[2]["time"], "tail": 1}).json()["lines"]
    assert until == [lines[1]]


def test_following_a_log_to_the_end_of_its_service(swarm: SwarmFleet) -> None:
    swarm.service("ticker", command="for i in 1 2 3 4 5 6 7 8 9; do echo tick $i; sleep 0.3; done; exec sleep 100000")
    seen: list[str] = []
    path = "/api/swarm/services/ticker/logs/stream"
    with swarm.api.stream("GET", path, params={"tail": 1}) as reply:
        assert reply.status_code == 200
        for text in reply.iter_lines():
            seen.append(json.loads(text)["line"]["text"])
            if seen[-1] == "tick 9":
                swarm.clear()
    # From the last line there was, each once and in order; the stream ended by itself.
    first = int(seen[0].removeprefix("tick "))
    assert seen == [f"tick {number}" for number in range(first, 10)]


@contextmanager
def listening(swarm: SwarmFleet, query: str) -> Iterator[list[dict[str, Any]]]:
    """Events of /ws as they come."""
    seen: list[dict[str, Any]] = []
    with connect(f"{swarm.fleet.url.replace('http', 'ws')}/ws?{query}", open_timeout=60) as socket:

        def read() -> None:
            seen.extend(map(json.loads, socket))

        reader = threading.Thread(target=read)
        reader.start()
        yield seen
    reader.join()


def test_changes_are_told(swarm: SwarmFleet) -> None:
    with listening(swarm, "type=service_update&service_id=told") as seen:
        swarm.service("other")
        service_id = swarm.service("told")
        assert swarm.api.post("/api/swarm/services/told/scale?replicas=2").status_code == 200
        swarm.until(lambda: seen and seen[-1]["data"]["running_replicas"] == 2)
        assert {event["type"] for event in seen} == {"service_update"}
        assert {event["data"]["service_id"] for event in seen} == {service_id}
        # As the calls show it, with the fleet's names of machines.
        swarm.until(lambda: seen[-1]["data"] == {**swarm.get("told"), "tasks": seen[-1]["data"]["tasks"]})
        last = seen[-1]
        assert {task["node_id"] for task in last["data"]["tasks"]} == {"agx0", "agx1"}
        swarm.clear()
        swarm.until(lambda: seen[-1]["data"]["update"] is not None)
        gone = seen[-1]["data"]
        assert (gone["name"], gone["update"]["status"], gone["tasks"]) == ("told", "removed", [])
    versions = [event["data"]["version"] for event in seen]
    assert versions == sorted(versions)
    assert len({json.dumps(event["data"]) for event in seen}) == len(seen)


def test_a_service_follows_the_jobs_that_wait(swarm: SwarmFleet) -> None:
    swarm.service("grows")
    api = swarm.api
    assert api.post("/api/queue/pause", json={"target_cluster": "swarm-test"}).status_code == 200
    rule = {"target_cluster": "swarm-test", "min_replicas": 1, "max_replicas": 3, "jobs_per_replica": 2}
    service = api.post("/api/swarm/services/grows/autoscale", json=rule).json()
    whole = {"enabled": True, "job_type": None, "target_model": None, **rule}
    assert service["autoscale"] == whole
    job = {"job_type": "image_gen", "target_cluster": "swarm-test", "payload": {"prompt": "a lake"}}
    jobs = [api.post("/api/queue/jobs", json=job).json()["job_id"] for _ in range(4)]
    swarm.until(lambda: swarm.running("grows") == 2)
    assert swarm.get("grows")["autoscale"] == whole
    running = swarm.tasks("grows")
    jobs += [api.post("/api/queue/jobs", json=job).json()["job_id"] for _ in range(20)]
    swarm.until(lambda: swarm.running("grows") == 3)
    assert running.items() <= swarm.tasks("grows").items()
    for job_id in jobs:
        assert api.delete(f"/api/queue/jobs/{job_id}").status_code == 200
    swarm.until(lambda: swarm.get("grows")["replicas"] == 1)
    # Off: it stays as it is, whatever waits.
    assert api.post("/api/swarm/services/grows/autoscale", json={**rule, "enabled": False}).json()["autoscale"] == {
        **whole,
        "enabled": False,
    }
    api.post("/api/queue/resume", json={"target_cluster": "swarm-test"})


def test_images_of_the_registry(swarm: SwarmFleet) -> None:
    for name in ("alpha:1", "alpha:latest", "team/beta:2"):
        add_image(swarm.engine, f"{swarm.registry}/{name}")
        swarm.engine.images.push(f"{swarm.registry}/{name}")
    images = swarm.api.get("/api/fleet/images").json()
    found = {image["name"]: image["tags"] for image in images["images"]}
    assert (found["alpha"], found["team/beta"]) == (["1", "latest"], ["2"])
    assert images["next_page_token"] == ""


def fleet_says(swarm: SwarmFleet, *words: str) -> str:
    """What the command prints; it must succeed."""
    result = fleet_command(*words, url=swarm.fleet.url)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_of_a_person(swarm: SwarmFleet) -> None:
    swarm.service("by-hand", command=TALK)
    table = fleet_says(swarm, "services", "list").splitlines()
    assert table[1].split()[:5] == ["by-hand", "replicated", "1", "of", "1"]
    shown = fleet_says(swarm, "services", "show", "by-hand")
    assert "1 of 1" in shown and "running" in shown and "agx" in shown
    assert json.loads(fleet_says(swarm, "services", "show", "by-hand", "--json")) == swarm.get("by-hand")
    assert fleet_says(swarm, "services", "scale", "by-hand", "2").startswith("by-hand  replicated, ")
    swarm.until(lambda: fleet_says(swarm, "services", "logs", "by-hand").count("hello") == 2)
    assert json.loads(fleet_says(swarm, "services", "rollback", "by-hand", "--json"))["replicas"] == 1
    assert IMAGE in fleet_says(swarm, "services", "update", "by-hand", IMAGE)
    rule = fleet_says(swarm, "services", "autoscale", "by-hand", "--max", "2", "--cluster", "no-such", "--off")
    assert rule == "by-hand  off (0 to 2, one for 1 waiting jobs (no-such))\n"
    assert json.loads(fleet_says(swarm, "images", "--json"))["next_page_token"] == ""
    assert fleet_command("services", "scale", "no-such", "2", url=swarm.fleet.url).exit_code == 4
    assert fleet_command("services", "scale", "by-hand", "1001", url=swarm.fleet.url).exit_code == 2


def worker_containers(engine: docker.DockerClient) -> list[Container]:
    return engine.containers.list(all=True, filters={"name": "fleet_worker.1"}, ignore_removed=True)


async def test_the_sdk_follows_a_log(swarm: SwarmFleet) -> None:
    swarm.service("talks", command=TALK)
    with FleetCommander(swarm.fleet.url) as blocking:
        with closing(blocking.follow_service_logs("talks")) as lines:
            first = [next(lines)["text"] for _ in range(2)]
        assert sorted(first) == ["hello", "sorry"]
        # A stream tells them as they come, a list by their times.
        listed = [line["text"] for line in blocking.service_logs("talks")]
        assert sorted(listed) == sorted(first)
    async with AsyncFleetCommander(swarm.fleet.url) as fleet:
        async with aclosing(fleet.follow_service_logs("talks", tail=1)) as following:
            async for line in following:
                assert line["text"] == listed[-1]
                break
        with pytest.raises(ApiError) as caught:
            await anext(fleet.follow_service_logs("no-such"))
        assert (caught.value.status, caught.value.reason) == (404, "SERVICE_NOT_FOUND")


def test_the_stack_file_makes_workers(swarm: SwarmFleet) -> None:
    need("docker")
    stack = Path(__file__).parents[2] / "deploy" / "stack.yaml"
    settings = {"DOCKER_HOST": swarm.manager.url, "FLEET_IMAGE": IMAGE, "FLEET_SERVER": "gpu.lan:50051"}
    engine = swarm.engine
    secret = engine.secrets.create(name="fleet_api_key", data=b"the-key")
    config = engine.configs.create(name="fleet_ca", data=b"the-authority")
    node = next(one for one in engine.nodes.list() if one.attrs["Description"]["Hostname"] == "agx1")
    node.update({**node.attrs["Spec"], "Labels": {"gpu": "true"}})

    def docker_cli(*words: str) -> None:
        command = ["docker", *words]
        done = subprocess.run(command, check=False, capture_output=True, env=clean_environment(settings), timeout=150)
        assert done.returncode == 0, done.stderr

    try:
        docker_cli("stack", "deploy", "-c", str(stack), "fleet")
        service = swarm.get("fleet_worker")
        assert (service["replicas"], service["image"]) == (1, IMAGE)
        # The image of this test has no `fleet`; what its task was given can be looked at all the same.
        with closing(swarm.worker.client()) as there:
            [made] = swarm.until(lambda: worker_containers(there)[:1])
            given = dict(one.split("=", 1) for one in made.attrs["Config"]["Env"])
            mounts = {mount["Destination"]: mount.get("Name") for mount in made.attrs["Mounts"]}
        assert given["FLEET_AGENT_NODE_ID"] == made.attrs["Config"]["Hostname"] == "fleet_worker-1"
        assert given["FLEET_AGENT_SERVER"] == "gpu.lan:50051"
        assert "FLEET_API_KEY" not in given
        assert mounts["/data"] == "fleet-fleet_worker-1"
    finally:
        docker_cli("stack", "rm", "fleet")
        swarm.until(lambda: not engine.services.list(filters={"name": "fleet_worker"}))
        secret.remove()
        config.remove()
