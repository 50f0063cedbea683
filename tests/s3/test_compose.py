"""deploy/compose.yaml: four services on the documented ports, no secrets of its own, settings that the server knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from pydantic import ValidationError

from fleet_server.settings import Settings

FOLDER = Path(__file__).parents[2] / "deploy"
FILLED = {
    "FLEET_PUBLIC_HOST": "fleet.lan",
    "FLEET_API_KEY": "a-key-of-our-own",
    "FLEET_S3_ACCESS_KEY": "fleet",
    "FLEET_S3_SECRET_KEY": "a-secret-of-our-own",
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return loaded


def filled(text: str) -> str:
    return re.sub(r"\$\{(\w+)[^}]*\}", lambda found: FILLED[found[1]], text)


def test_services_ports_and_volumes(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"server", "valkey", "minio", "registry"}
    ports = {port.split(":")[0] for service in services.values() for port in service.get("ports", [])}
    assert ports == {"8765", "50051", "50052", "8188", "9010", "9011", "5000"}
    used = {volume.split(":")[0] for service in services.values() for volume in service["volumes"]}
    assert used == set(compose["volumes"])
    assert re.fullmatch(r"minio/minio:RELEASE\.[\w-]+@sha256:[0-9a-f]{64}", services["minio"]["image"])
    assert (FOLDER.parent / services["server"]["build"]["dockerfile"]).is_file()
    for name, service in services.items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert (service["restart"], service["logging"]["options"]["max-file"]) == ("unless-stopped", "3"), name
    for name, word in (("valkey", "service_healthy"), ("minio", "service_healthy")):
        assert services["server"]["depends_on"][name] == {"condition": word}


def test_the_image_is_of_what_runs_alone(compose: dict[str, Any]) -> None:
    """The sources and what builds from them stay in the first stage."""
    server = compose["services"]["server"]
    text = (FOLDER.parent / server["build"]["dockerfile"]).read_text()
    build, final = re.split(r"(?m)^FROM .+$", text)[1:]
    assert "COPY . ." in build and "--require-hashes" in build
    assert re.findall(r"(?m)^COPY .+$", final) == ["COPY --from=build /opt/fleet /opt/fleet"]
    user, number = re.findall(r"(?m)^USER (\w+)$", final), re.findall(r"useradd --uid (\d+) .*fleet", final)
    assert user == ["fleet"] and number == ["10001"]
    opened = set(re.findall(r"\d+", re.findall(r"(?m)^EXPOSE (.+)$", final)[0]))
    assert opened == {port.split(":")[1] for port in server["ports"]}
    assert {volume.split(":")[1] for volume in server["volumes"]} == {"/data"} <= set(re.findall(r"/data", final))
    assert server["read_only"] is True and server["cap_drop"] == ["ALL"]


def test_the_server_takes_what_it_is_given(compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {name: filled(value) for name, value in compose["services"]["server"]["environment"].items()}
    known = {f"FLEET_{name.upper()}" for name in Settings.model_fields}
    assert set(environment) <= known
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings(s3_port="off", agent=False)  # type: ignore[arg-type]
    assert (settings.mode, settings.s3_endpoint, settings.embedded_s3) == ("production", "http://minio:9000", False)
    for name, value in (("FLEET_S3_SECRET_KEY", "minioadmin123"), ("FLEET_API_KEY", "fleet-commander-2024")):
        with monkeypatch.context() as published:
            published.setenv(name, value)
            with pytest.raises(ValidationError, match=name):
                Settings(s3_port="off")  # type: ignore[arg-type]


def test_the_store_is_durable_and_secrets_come_from_outside(compose: dict[str, Any]) -> None:
    words = compose["services"]["valkey"]["command"]
    given = dict(zip(words[1::2], words[2::2], strict=True))
    assert (given["--appendonly"], given["--appendfsync"], given["--maxmemory-policy"]) == (
        "yes",
        "always",
        "noeviction",
    )
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|USER", name):
                assert value.startswith("${"), name
    example = (FOLDER / "example.env").read_text()
    wanted = set(re.findall(r"\$\{(\w+)", (FOLDER / "compose.yaml").read_text()))
    assert wanted == {line.partition("=")[0] for line in example.splitlines() if line and line[0] != "#"}


def test_compose_itself_takes_it() -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("docker compose is not here: the structure is checked by the tests above")
    command = ["docker", "compose", "-f", str(FOLDER / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, env={**os.environ, **FILLED}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
