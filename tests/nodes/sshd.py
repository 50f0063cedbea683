"""Debian's sshd in a network namespace of its own, as a host that Fleet Commander reaches by SSH alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.parts import found, need
from tests.waiting import wait_until_now


@dataclass(frozen=True, slots=True)
class SshHost:
    """`address` reaches it from here, `gateway` is this machine as it sees us; `identity` is a key that it lets in."""

    address: str
    gateway: str
    namespace: str
    host_key: str
    identity: Path
    folder: Path
    authorized: Path
    pid: int

    def let_in(self, public_key: str) -> None:
        """One more key that may log in."""
        with self.authorized.open("a") as stream:
            stream.write(public_key.strip() + "\n")


@contextmanager
def ssh_host(number: int) -> Iterator[SshHost]:
    """A host of its own; `number` (1-200) tells those of one test session apart. What runs in it ends with it."""
    need("sshd", "ssh-keygen", "ip", root=True)
    name = f"fleet{os.getpid() % 10_000}-{number}"
    near, far = f"10.91.{number}.1", f"10.91.{number}.2"
    folder = Path(tempfile.mkdtemp(prefix="fleet-sshd-"))
    link = f"fs{os.getpid() % 100_000}{number}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("addr", "add", f"{near}/24", "dev", link)
        _ip("link", "set", link, "up")
        for words in (
            ("addr", "add", f"{far}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", name, *words)
        host_key, identity = _key(folder / "host"), _key(folder / "id")
        authorized = folder / "authorized"
        authorized.write_text(identity.with_suffix(".pub").read_text())
        (folder / "sshd_config").write_text(_config(host_key, authorized, folder))
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        sshd = found("sshd")
        assert sshd is not None
        with (folder / "log").open("wb") as log:
            daemon = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{name}", sshd, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log
            )
        try:
            wait_until_now(lambda: b"Server listening" in (folder / "log").read_bytes())
            public = " ".join(host_key.with_suffix(".pub").read_text().split()[:2])
            yield SshHost(far, near, name, public, identity, folder, authorized, daemon.pid)
        finally:
            daemon.terminate()
            daemon.wait(10)
    finally:
        _end_all(name)
        _ip("netns", "del", name)
        shutil.rmtree(folder, ignore_errors=True)


def _config(host_key: Path, authorized: Path, folder: Path) -> str:
    return "\n".join(
        [
            "Port 22",
            f"HostKey {host_key}",
            f"AuthorizedKeysFile {authorized}",
            f"PidFile {folder}/pid",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "UsePAM no",
            "StrictModes no",
            "Subsystem sftp internal-sftp",
            "",
        ]
    )


def _key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


def _end_all(namespace: str) -> None:
    """Ends what still runs in the namespace: agents that were started to stay."""
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    ended = []
    for word in listed.stdout.split():
        try:
            process = psutil.Process(int(word))
            process.kill()
            ended.append(process)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(ended, timeout=10)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
