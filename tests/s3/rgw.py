"""Ceph's RADOS gateway for tests: a throw-away cluster of one monitor, one OSD in memory and the gateway, on loopback.

No mgr: `ceph -s` then shows no pools, which harms nothing. All processes die with this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.parts import need
from tests.ports import free_port

SECONDS = 250.0
_CONFIGURATION = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}/0]
mon initial members = a
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/log/$name.log
log to stderr = false
err to stderr = false
ms bind ipv6 = false
ms bind before connect = false
keyring = {folder}/keyring
[mon]
mon data = {folder}/mon
mon data avail crit = 1
mon data avail warn = 1
[osd]
osd data = {folder}/osd
osd objectstore = memstore
osd memory target = 939524096
memstore device bytes = 1073741824
osd max object name len = 1024
osd class load list = *
osd class default list = *
[client.rgw.a]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw thread pool size = 16
rgw enable usage log = false
rgw dynamic resharding = false
rgw override bucket index max shards = 1
# With authentication off the gateway would still insist on its secure mode, and fail.
ms mon client mode = crc
"""


@contextmanager
def gateway(folder: Path, access_key: str, secret_key: str) -> Iterator[str]:
    """Its endpoint, for as long as the context lasts. Needs the packages that `need` names; takes 13 to 20 s."""
    need("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "setpriv")
    cluster = _Cluster(folder)
    try:
        cluster.start()
        cluster.add_user(access_key, secret_key)
        yield f"http://127.0.0.1:{cluster.port}"
    finally:
        cluster.stop()


class _Cluster:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.port, mon_port = free_port(), free_port()
        self._fsid = str(uuid.uuid4())
        self._address = f"[v2:127.0.0.1:{mon_port}/0]"
        for name in ("mon", "osd", "rgw", "log", "run"):
            (folder / name).mkdir()
        self._file = folder / "ceph.conf"
        self._file.write_text(_CONFIGURATION.format(fsid=self._fsid, folder=folder, mon_port=mon_port, port=self.port))
        self._until = time.monotonic() + SECONDS

    def start(self) -> None:
        """Monitor, OSD, gateway, each waited for."""
        keyring, monmap = str(self._folder / "keyring"), str(self._folder / "monmap")
        self._run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        caps = ["--cap", "mon", "allow *", "--cap", "osd", "allow *"]
        self._run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *caps)
        self._run("monmaptool", "--create", "--clobber", "--addv", "a", self._address, "--fsid", self._fsid, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self._daemon("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        self._wait(lambda: self._ceph("osd", "new", osd).returncode == 0)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._daemon("ceph-osd", "-i", "0")
        self._wait(lambda: b"1 up" in self._ceph("osd", "stat").stdout)
        self._daemon("radosgw", "-n", "client.rgw.a")
        self._wait(self._serves)

    def add_user(self, access_key: str, secret_key: str) -> None:
        """A user with these keys."""
        keys = ["--access-key", access_key, "--secret-key", secret_key]
        told = self._run(
            "radosgw-admin", "-n", "client.rgw.a", "user", "create", "--uid=fleet", "--display-name=f", *keys
        )
        assert json.loads(told.stdout)["user_id"] == "fleet"

    def stop(self) -> None:
        """Ends all of them at once: nothing of it is kept."""
        for daemon in self._daemons:
            daemon.kill()
        for daemon in self._daemons:
            daemon.wait()

    def _run(self, program: str, *words: str) -> subprocess.CompletedProcess[bytes]:
        command = [program, *words]
        if program not in ("ceph-authtool", "monmaptool"):
            command[1:1] = ["-c", str(self._file)]
        return subprocess.run(command, check=True, capture_output=True, timeout=100)

    def _ceph(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        command = ["ceph", "-c", str(self._file), "--connect-timeout", "5", *words]
        return subprocess.run(command, capture_output=True, timeout=100, check=False)

    def _daemon(self, program: str, *words: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", program, "-c", str(self._file), *words, "-f"]
        with (self._folder / "log" / f"{program}.out").open("wb") as out:
            environment = {**os.environ, "CEPH_CONF": str(self._file)}
            self._daemons.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))

    def _serves(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _wait(self, there: object) -> None:
        assert callable(there)
        while not there():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not dead, f"{dead} ended: {self._last_words()}"
            assert time.monotonic() < self._until, f"the gateway is not up in time: {self._last_words()}"
            time.sleep(0.1)

    def _last_words(self) -> str:
        logs = sorted((self._folder / "log").iterdir())
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-500:]}" for log in logs)
