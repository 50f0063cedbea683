"""The contenders of the queue benchmark: how each is installed, started, and seen to be done.

Each Python peer has an environment of its own, since arq needs an older redis-py than the others. It is made on first
use in a cache folder outside the project (FLEET_BENCH_CACHE, else ~/.cache/fleet-bench) from the pins by its program.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench._queue_store import BenchStore

ROOT = Path(__file__).resolve().parent.parent
_PYTHON = Path(__file__).resolve().parent / "peers" / "queue_python"
_NODE = Path(__file__).resolve().parent / "peers" / "queue_bullmq"

Left = Callable[[BenchStore], int]
"""How many jobs the queue has not yet seen acknowledged."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A queue: its version, its promise, its two programs (with their environment), and how many jobs are left."""

    name: str
    promise: str
    python: bool
    prepare: Callable[[], Sequence[Sequence[str]]]
    left: Left


def _taskiq_left(store: BenchStore) -> int:
    store.asked += 1
    info = store.client.xinfo_groups("taskiq")
    group = info[0]
    return int(group["pending"]) + int(group["lag"] or 0)


def _python(name: str, *worker: str) -> Callable[[], Sequence[Sequence[str]]]:
    def prepare() -> Sequence[Sequence[str]]:
        folder = environment(name)
        program = str(_PYTHON / f"{name}_app.py")
        words = [word.format(bin=folder / "bin", program=program, app=f"{name}_app") for word in worker]
        return words, [str(folder / "bin" / "python"), program, "produce"]

    return prepare


def _bullmq() -> Sequence[Sequence[str]]:
    folder = node_modules()
    return ["node", str(folder / "app.mjs"), "work"], ["node", str(folder / "app.mjs"), "produce"]


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "taskiq",
            "at least once: acknowledged after the task, taken over when idle for 600 s",
            True,
            _python("taskiq", "{bin}/taskiq", "worker", "{app}:broker", "--workers", "1", "--log-level", "WARNING"),
            _taskiq_left,
        ),
        Peer(
            "dramatiq",
            "at least once: acknowledged after the message, 20 retries",
            True,
            _python("dramatiq", "{bin}/dramatiq", "{app}", "--processes", "1", "--threads", "8"),
            lambda store: store.count("HLEN", "dramatiq:default.msgs"),
        ),
        Peer(
            "saq",
            "at least once while its sweeper runs: 1 try, stuck jobs swept after their timeout",
            True,
            _python("saq", "{bin}/python", "{program}", "work"),
            lambda store: store.count("ZCARD", "saq:default:incomplete"),
        ),
        Peer(
            "arq",
            "at least once: 5 tries, run again when the in-progress key lapses",
            True,
            _python("arq", "{bin}/python", "{program}", "work"),
            lambda store: store.count("ZCARD", "arq:queue"),
        ),
        Peer(
            "celery",
            "AT MOST once on a crash: acknowledged before the task (default)",
            True,
            _python(
                "celery", "{bin}/celery", "-A", "{app}", "worker", "-c", "2", "--loglevel", "WARNING", "-O", "fair"
            ),
            lambda store: store.count("LLEN", "celery") + store.count("HLEN", "unacked"),
        ),
        Peer(
            "bullmq",
            "at least once: a stalled job's lock lapses after 30 s",
            False,
            _bullmq,
            lambda store: store.count("LLEN", "bull:bench:wait") + store.count("LLEN", "bull:bench:active"),
        ),
    )
}


def cache() -> Path:
    """Where environments are kept."""
    return Path(os.environ.get("FLEET_BENCH_CACHE", "~/.cache/fleet-bench")).expanduser()


def environment(name: str) -> Path:
    """The virtual environment of a Python peer with its pinned versions; made where it is not there yet."""
    pins = _PYTHON / f"{name}.txt"
    folder = cache() / f"{name}-{_digest(pins)}-{sys.version_info.major}.{sys.version_info.minor}"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        sys.stderr.write(f"installing {name} (once)\n")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--requirement", str(pins)]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        (folder / "ready").touch()
    return folder


def node_modules() -> Path:
    """A folder with BullMQ by its lock file and our program."""
    folder = cache() / f"bullmq-{_digest(_NODE / 'package-lock.json')}"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(_NODE / name, folder)
        sys.stderr.write("installing bullmq (once)\n")
        # Not `ci`: the lock leaves out the platforms' optional native parts, for which it would stop.
        install = ["npm", "install", "--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"]
        subprocess.run(install, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (folder / "ready").touch()
    shutil.copy(_NODE / "app.mjs", folder)
    return folder


def version(name: str) -> str:
    """Name and pinned version, with the client library's."""
    if name == "bullmq":
        node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
        return f"bullmq 6.7.0 (ioredis 5.11.1, Node {node})"
    pins = dict(line.split("==") for line in (_PYTHON / f"{name}.txt").read_text().split())
    broker = f", taskiq-redis {pins['taskiq-redis']}" if name == "taskiq" else ""
    return f"{name} {pins[name]} (redis-py {pins['redis']}{broker})"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]
