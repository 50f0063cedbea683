"""Debian's sshd in namespaces of its own, as a host that Fleet Commander reaches by SSH alone."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
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
    """`address` reaches it from here, `gateway` is this machine as it sees us; `identity` is a key that it lets in.

    Whoever logs in finds at /var/run/docker.sock what `docker` leads to, a link that tests make.
    """

    address: str
    gateway: str
    namespace: str
    host_key: str
    identity: Path
    folder: Path
    authorized: Path
    docker: Path
    pid: int

    def let_in(self, public_key: str) -> None:
        """One more key that may log in."""
        with self.authorized.open("a") as stream:
            stream.write(public_key.strip() + "\n")

    def cut(self) -> None:
        """Ends everybody's connections, then what they ran: nobody is told how that ended."""
        others = [process for process in _inside(self.namespace) if process.pid != self.pid]
        connections = [process for process in others if _name(process).startswith("sshd")]
        for ended in (connections, others):
            _kill(ended)


@contextmanager
def ssh_host(number: int) -> Iterator[SshHost]:
    """A host of its own; `number` (1-200) tells those of one test session apart. What runs in it ends with it."""
    need("sshd", "ssh-keygen", "ip", "nsenter", "unshare", root=True)
    name = f"fleet{os.getpid() % 10_000}-{number}"
    # Other runs of the tests on this machine have networks of their own.
    net = f"10.{100 + os.getpid() % 100}.{number}"
    near, far = f"{net}.1", f"{net}.2"
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
        sshd = found("sshd")
        assert sshd is not None
        steps = [
            "mount -t tmpfs none /run",
            "mkdir -m 755 /run/sshd",
            f"ln -s {folder / 'docker'} /run/docker.sock",
            # What this machine's user has in there is slow at best.
            'if [ -e "$HOME/.bashrc" ]; then mount --bind /dev/null "$HOME/.bashrc"; fi',
            f"exec {shlex.join([sshd, '-D', '-e', '-f', str(folder / 'sshd_config')])}",
        ]
        inside = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--mount", "sh", "-c", " && ".join(steps)]
        with (folder / "log").open("wb") as log:
            daemon = subprocess.Popen(inside, stderr=log)
        try:
            wait_until_now(lambda: b"Server listening" in (folder / "log").read_bytes())
            public = " ".join(host_key.with_suffix(".pub").read_text().split()[:2])
            yield SshHost(far, near, name, public, identity, folder, authorized, folder / "docker", daemon.pid)
        finally:
            daemon.terminate()
            daemon.wait(50)
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
            f"SetEnv PATH={Path(sys.base_prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "Subsystem sftp internal-sftp",
            "",
        ]
    )


def _key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


def _end_all(namespace: str) -> None:
    """Ends what still runs in the namespace: agents that were started to stay."""
    _kill(_inside(namespace))


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=50)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def _inside(namespace: str) -> list[psutil.Process]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    found = []
    for word in listed.stdout.split():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(word)))
    return found


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
