"""Clients that we did not write, on the gRPC port: `buf curl` by reflection, and a generated Node.js client."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from tests.e2e.fleet_process import FleetProcess, clean_environment

ROOT = Path(__file__).resolve().parents[2]
BUF = Path(sys.executable).parent / "buf"
GENERATED = [
    *sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto" / "fleet").rglob("*.proto")),
    "google/api/annotations.proto",
    "google/api/http.proto",
    "google/api/httpbody.proto",
    "buf/validate/validate.proto",
]


def buf_curl(fleet: FleetProcess, method: str, message: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            BUF,
            "curl",
            "--reflect",
            "--protocol",
            "grpc",
            "--http2-prior-knowledge",
            "--data",
            json.dumps(message),
            f"http://127.0.0.1:{fleet.grpc_port}/{method}",
        ],
        check=False,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=150,
    )


def test_buf_curl_by_reflection(fleet: FleetProcess) -> None:
    done = buf_curl(fleet, "fleet.v1.Fleet/GetHealth", {})
    assert json.loads(done.stdout) == {"status": "ok", "version": "1.0.0"}, done.stderr
    job = {"jobType": "JOB_TYPE_IMAGE_GEN", "payload": {"prompt": "sea", "width": 64, "height": 64, "steps": 2}}
    job_id = json.loads(buf_curl(fleet, "fleet.v1.Queue/CreateJob", job).stdout)["receipt"]["jobId"]
    watched = buf_curl(fleet, "fleet.v1.Queue/WatchJob", {"jobId": job_id})
    assert "jobComplete" in watched.stdout, watched.stderr
    refused = buf_curl(fleet, "fleet.v1.Queue/GetJob", {"jobId": "none"})
    assert refused.returncode != 0
    error = json.loads(refused.stderr)
    assert error["code"] == "not_found"
    info = error_details_pb2.ErrorInfo.FromString(base64.b64decode(error["details"][0]["value"] + "=="))
    assert (info.reason, info.domain) == ("JOB_NOT_FOUND", "fleet.v1")


def test_generated_node_client(fleet: FleetProcess, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        assert "CI" not in os.environ, "npm is missing: CI installs it"
        pytest.skip("npm is not installed")
    source = Path(__file__).parent / "node_client"
    for name in ("package.json", "client.js"):
        shutil.copy(source / name, tmp_path / name)
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--prefer-offline"]
    installed = subprocess.run(install, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    if installed.returncode != 0 and "CI" not in os.environ:
        pytest.skip(f"npm could not install the packages: {installed.stderr[-300:]}")
    assert installed.returncode == 0, installed.stderr
    (tmp_path / "gen").mkdir()
    generate = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--descriptor_set_in={ROOT / 'clients/python/fleet/v1/descriptors.binpb'}",
        f"--plugin=protoc-gen-es={tmp_path / 'node_modules/.bin/protoc-gen-es'}",
        f"--es_out={tmp_path / 'gen'}",
        "--es_opt=target=js,import_extension=js",
        *GENERATED,
    ]
    subprocess.run(generate, check=True, timeout=150)
    done = subprocess.run(
        ["node", "client.js", f"http://127.0.0.1:{fleet.grpc_port}"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    events = found.pop("events")
    assert events[0] in ("jobUpdate", "jobComplete")
    assert events[-1] == "jobComplete"
    assert found == {
        "health": "ok",
        "png": "PNG",
        "contentType": "image/png",
        "seedExact": True,
        "refused": "InvalidArgument",
        "message": "width: must be a multiple of 8, from 64 to 2048; got 65",
        "outputs": 1,
    }
