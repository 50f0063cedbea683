"""Docker engines for tests: each a dockerd in namespaces of its own, which take all that it started along when it ends.

Nothing is made in the machine's own network: the daemons of one `Switch` see each other, and nobody else does.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import docker
import requests

from fleet_agent.docker_client import connected_client
from tests.parts import found, need

IMAGE = "fleet-test:latest"
"""Made of one static busybox: `sh -c`, `sleep`, `httpd`, `cat`, `env` and the like; it says `hello` and sleeps."""
START_SECONDS = 120.0
STOP_SECONDS = 60.0
_COMMAND = "/bin/busybox echo hello; exec /bin/busybox sleep 100000"
_numbers = itertools.count(1)


class Switch:
    """A network that daemons are plugged into: a namespace with a bridge, addresses 10.231.0.0/24."""

    def __init__(self) -> None:
        self.name = f"fleet-{os.getpid()}-{next(_numbers)}"
        self._hosts = 0

    def __enter__(self) -> Switch:
        _run("ip", "netns", "add", self.name)
        for command in ("link set lo up", "link add fleet type bridge", "addr add 10.231.0.1/24 dev fleet"):
            _run("ip", "-n", self.name, *command.split())
        _run("ip", "-n", self.name, "link", "set", "fleet", "up")
        return self

    def __exit__(self, *_: object) -> None:
        _run("ip", "netns", "delete", self.name, check=False)

    @contextmanager
    def plugged(self) -> Iterator[tuple[str, str]]:
        """A namespace with a cable to the switch; its name and its address."""
        self._hosts += 1
        name, cable, address = f"{self.name}-{self._hosts}", f"c{self._hosts}", f"10.231.0.{10 + self._hosts}"
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "-n", self.name, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "-n", self.name, "link", "set", cable, "master", "fleet", "up")
            for command in (
                "link set lo up",
                f"addr add {address}/24 dev eth0",
                "link set eth0 up",
                "route add default via 10.231.0.1",
            ):
                _run("ip", "-n", name, *command.split())
            yield name, address
        finally:
            _run("ip", "netns", "delete", name, check=False)


class DockerDaemon:
    """One running dockerd; see `docker_daemon`."""

    def __init__(self, folder: Path, hostname: str, namespace: str, address: str) -> None:
        self.folder = folder
        self.hostname = hostname
        self.namespace = namespace
        self.address = address
        """Where the containers' published ports are, for who is in a namespace of the same switch: see `inside`."""
        self.socket = folder / "docker.sock"
        self.url = f"unix://{self.socket}"
        self.log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """Starts it, and waits until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Without name servers a look-up of an image's registry fails at once, in place of after 20 seconds.
        resolv = self.folder / "resolv.conf"
        resolv.write_text("")
        dockerd = [
            found("dockerd") or "dockerd",
            f"--data-root={self.folder / 'data'}",
            f"--exec-root={self.folder / 'exec'}",
            f"--host={self.url}",
            f"--pidfile={self.folder / 'pid'}",
            "--storage-driver=vfs",
            f"--cgroup-parent=/{self.namespace}",
            *options,
        ]
        steps = [
            f"hostname {shlex.quote(self.hostname)}",
            f"mount --bind {shlex.quote(str(resolv))} /etc/resolv.conf",
            f"exec {shlex.join(dockerd)}",
        ]
        # A daemon that is the first of a process namespace takes containerd, shims and containers along when it ends.
        command = [
            # Nothing is left of it either when the tests themselves are killed.
            *("setpriv", "--pdeathsig", "KILL"),
            *("nsenter", f"--net=/run/netns/{self.namespace}"),
            *("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL"),
            *("bash", "-c", " && ".join(steps)),
        ]
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": path, **(environment or {})},
            )
        self._wait()

    def client(self) -> docker.DockerClient:
        """A client of it; close it."""
        return connected_client(self.url, timeout_seconds=100)

    def inside(self, *command: str, check: bool = True, seconds: float = 100) -> subprocess.CompletedProcess[bytes]:
        """Runs a command of this machine in the daemon's network."""
        return subprocess.run(self.entering(*command), check=check, capture_output=True, timeout=seconds)

    def entering(self, *command: str) -> list[str]:
        """The command line that runs a command in the daemon's network."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]

    def kill(self) -> None:
        """The machine is gone: dockerd, its containers and all that they run end at once. It can be started again."""
        process, self._process = self._process, None
        if process is None:
            return
        for child in self._children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        process.wait(STOP_SECONDS)
        # The next one, the first process of its namespace too, would take itself for this one.
        for left in (self.folder / "pid", self.socket, *(self.folder / "exec").glob("**/*.pid")):
            left.unlink(missing_ok=True)
        self._clear_groups()

    def _clear_groups(self) -> None:
        """The kernel keeps control groups of processes that are no more."""
        for group in sorted(Path("/sys/fs/cgroup").glob(f"**/{self.namespace}/**/"), reverse=True):
            with contextlib.suppress(OSError):
                group.rmdir()
        for group in Path("/sys/fs/cgroup").glob(f"**/{self.namespace}"):
            with contextlib.suppress(OSError):
                group.rmdir()

    @staticmethod
    def _children(pid: int) -> list[int]:
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            return []

    def _wait(self) -> None:
        assert self._process is not None
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            if self.socket.exists():
                away = (docker.errors.DockerException, requests.exceptions.RequestException)
                with contextlib.suppress(*away), contextlib.closing(self.client()) as client:
                    client.ping()
                    return
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"dockerd does not answer:\n{self.log.read_text(errors='replace')[-3000:]}")


@contextmanager
def docker_daemon(
    folder: Path,
    *,
    hostname: str = "engine",
    switch: Switch | None = None,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[DockerDaemon]:
    """A dockerd that holds IMAGE, on a switch of its own unless one is given. Skips where the machine has no dockerd.

    The path of `folder` has to be short: a socket lies in it.
    """
    need("dockerd", "busybox", "ip", "iptables", "nsenter", "unshare", root=True)
    with contextlib.ExitStack() as stack:
        place = switch or stack.enter_context(Switch())
        namespace, address = stack.enter_context(place.plugged())
        daemon = DockerDaemon(folder, hostname, namespace, address)
        stack.callback(daemon.kill)
        daemon.start(options, environment)
        with contextlib.closing(daemon.client()) as client:
            add_image(client)
        yield daemon


def add_image(client: docker.DockerClient, name: str = IMAGE, command: str = _COMMAND) -> None:
    """Puts an image into an engine that runs this line of shell."""
    busybox = found("busybox")
    assert busybox is not None
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        archive.add(busybox, "bin/busybox")
        for applet in (
            "sh",
            "sleep",
            "echo",
            "cat",
            "env",
            "httpd",
            "ls",
            "stty",
            "id",
            "true",
            "false",
            "yes",
            "head",
            "ps",
            "tail",
        ):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
        folder = tarfile.TarInfo("tmp")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o1777
        archive.addfile(folder)
    repository, _, tag = name.rpartition(":")
    changes = [f'CMD ["/bin/sh", "-c", "{command}"]', "ENV PATH=/bin"]
    client.api.import_image_from_data(layer.getvalue(), repository=repository, tag=tag, changes=changes)


def _run(*command: str, check: bool = True) -> None:
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if check and done.returncode:
        raise AssertionError(f"{shlex.join(command)}: {done.stderr.strip()}")
