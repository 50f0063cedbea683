"""An output on its way from the agent to the server, held there until the test has done what it came for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis

from fleet_server.services.uploads import output_name
from fleet_server.store.keys import Keys
from tests.e2e.fleet_process import FleetProcess
from tests.waiting import wait_until_now

Json = dict[str, Any]
RETRY = {"FLEET_AGENT_INLINE_BYTES": "0", "FLEET_AGENT_UPLOAD_RETRY_SECONDS": "0.3"}
"""For the fleet's environment: outputs are files of their own, and soon sent again."""


@contextmanager
def held_upload(fleet: FleetProcess, submit: Callable[[], str], content_type: str) -> Iterator[str]:
    """The job of `submit`, whose engine is through with it, and whose first file the server cannot store in the block.

    The idle slot stands still until the attempt is known: where its file shall be is a folder, then.
    """
    slot, spool = fleet.slot(), fleet.folder / "agent" / "spool" / "entries"
    os.kill(slot, signal.SIGSTOP)
    try:
        job_id = submit()
        token = wait_until_now(lambda: _token(fleet, job_id), seconds=100)
        place = fleet.folder / "outputs" / output_name(token, 0, content_type)
        place.mkdir()
    finally:
        os.kill(slot, signal.SIGCONT)
    try:
        wait_until_now((spool / f"{token}.end").exists, seconds=100)
        yield job_id
    finally:
        place.rmdir()


def end_in_upload(
    fleet: FleetProcess, api: httpx.Client, submit: Callable[[], str], content_type: str, how: str
) -> Json:
    """Kills the slot, or cancels the job, while its file is on its way; the job as it ends then.

    A killed slot takes nothing along: the file is the agent's by then. In the end the agent lives and keeps nothing.
    """
    agents, slot = fleet.pids("fleet_agent"), fleet.slot()
    with held_upload(fleet, submit, content_type) as job_id:
        assert api.get(f"/api/queue/jobs/{job_id}").json()["status"] == "running"
        if how == "killed":
            os.kill(slot, signal.SIGKILL)
            wait_until_now(lambda: not psutil.pid_exists(slot), seconds=100)
        else:
            assert api.delete(f"/api/queue/jobs/{job_id}").json()["status"] == "cancelled"

    def look() -> Json | None:
        job: Json = api.get(f"/api/queue/jobs/{job_id}").json()
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    job = wait_until_now(look, seconds=100)
    if how == "killed":
        assert (job["status"], job["attempt"], job["attempts"]) == ("succeeded", 1, []), job
        [output] = job["result"]["outputs"]
        assert len(api.get(output["url"]).content) == output["size_bytes"]
    else:
        assert (job["status"], job["result"]["outputs"]) == ("cancelled", [])
    assert set(agents) <= set(fleet.pids("fleet_agent"))
    wait_until_now(lambda: not kept(fleet), seconds=100)
    return job


def kept(fleet: FleetProcess) -> list[Path]:
    """Files of tasks and of their results on the agent's disk; its journal is there always."""
    spool = fleet.folder / "agent" / "spool"
    assert (spool / "entries").is_dir()
    # Folders may go meanwhile: that is no error to this walk.
    found = [Path(root) / name for root, _, names in os.walk(spool) for name in names]
    return [path for path in found if path.name != "journal"]


def _token(fleet: FleetProcess, job_id: str) -> str | None:
    """The attempt that has the job, by the store's book."""
    [store] = fleet.pids("valkey-server")
    [address] = {one.laddr for one in psutil.Process(store).net_connections("unix") if one.laddr}
    with redis.Redis(unix_socket_path=str(address), protocol=2, decode_responses=True) as client:
        found: Any = client.hget(Keys("fleet").job(job_id), "tk")
        return found or None
