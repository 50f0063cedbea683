"""One running contender of the queue benchmark: its processes, orders to its producer, what work cost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench._queue_peers import ROOT, Left, Peer
from bench._queue_store import BenchStore, bench_store

_MARK = struct.Struct("<QQ")
_DONE_SECONDS = 240.0
CALLERS = 64
BATCH = 100
BATCH_CALLERS = 4


@dataclass(frozen=True, slots=True)
class Window:
    """What so many jobs took, from the first submit to the last acknowledgement; CPU in microseconds a job."""

    jobs: int
    seconds: float
    submit_seconds: float
    cpu: Mapping[str, float]
    reads: float
    commands: float

    @property
    def rate(self) -> float:
        """Jobs a second."""
        return self.jobs / self.seconds


@dataclass(frozen=True, slots=True)
class Reading:
    """CPU seconds by process, reads and commands of the store, so far."""

    cpu: Mapping[str, float]
    reads: int
    commands: int


class Contender:
    """Orders to a producer that runs, and readings of all processes."""

    def __init__(
        self,
        name: str,
        folder: Path,
        store: BenchStore,
        left: Left,
        processes: Mapping[str, psutil.Process],
        producer: subprocess.Popen[str],
    ) -> None:
        self.name = name
        self.store = store
        self._folder = folder
        self._marks = folder / "marks"
        self._left = left
        self._processes = processes
        self._producer = producer
        self._first = 0

    def single(self, count: int) -> Window:
        """One job a call, 64 callers."""
        return self._window(count, {"kind": "single", "size": 1, "callers": CALLERS})

    def batches(self, count: int, *, wait: bool = True) -> Window:
        """Batches of 100, 4 callers."""
        return self._window(count, {"kind": "batch", "size": BATCH, "callers": BATCH_CALLERS}, wait=wait)

    def one_by_one(self, count: int) -> Window:
        """Each job when the one before is acknowledged: the queue's depth is 1."""
        before, start = self.reading(), time.monotonic_ns()
        for _ in range(count):
            self._order({"kind": "single", "size": 1, "callers": 1}, 1)
            self.await_left()
        return self.cost(count, before, start)

    def spaced(self, count: int, gap: float) -> list[float]:
        """Milliseconds from each submit's begin to its job's body, for jobs `gap` seconds apart."""
        first = self._first
        answer = self._order({"kind": "spaced", "size": 1, "callers": 1, "gap": gap}, count)
        self.await_left()
        begun = self.marks()
        return [(begun[first + at] - start) / 1e6 for at, start in enumerate(answer["starts"])]

    def marks(self) -> dict[int, int]:
        """When each job's body began, by its number; the first time where it ran twice."""
        found: dict[int, int] = {}
        for number, at in _MARK.iter_unpack(self._marks.read_bytes()):
            found.setdefault(number, at)
        return found

    def await_marks(self, count: int) -> None:
        """Waits until so many bodies have begun in all."""
        deadline = time.monotonic() + _DONE_SECONDS
        while self._marks.stat().st_size < _MARK.size * count:
            self._check(deadline)
            time.sleep(0.001)

    def await_left(self) -> None:
        """Waits until every job submitted so far has run and is acknowledged."""
        deadline = time.monotonic() + _DONE_SECONDS
        self.await_marks(self._first)
        while self._left(self.store) > 0:
            self._check(deadline)
            time.sleep(0.001)

    @property
    def submitted(self) -> int:
        """Jobs so far."""
        return self._first

    @contextlib.contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """One of its processes stands still."""
        self._processes[name].suspend()
        try:
            yield
        finally:
            self._processes[name].resume()

    def reading(self) -> Reading:
        """CPU seconds by process; reads and commands of the store."""
        cpu = {name: _tree_seconds(process) for name, process in self._processes.items()}
        store = self.store.reading()
        return Reading({**cpu, "store": store.cpu_seconds}, store.reads, store.commands)

    def cost(
        self,
        jobs: int,
        before: Reading,
        start: int,
        *,
        submitted: int | None = None,
        end: int | None = None,
    ) -> Window:
        """What these jobs took since `before`; times in nanoseconds of the monotonic clock, `end` now if left out."""
        end = end or time.monotonic_ns()
        after = self.reading()
        return Window(
            jobs,
            (end - start) / 1e9,
            ((submitted or end) - start) / 1e9,
            {name: 1e6 * (seconds - before.cpu[name]) / jobs for name, seconds in after.cpu.items()},
            (after.reads - before.reads) / jobs,
            (after.commands - before.commands) / jobs,
        )

    def _window(self, count: int, order: dict[str, Any], *, wait: bool = True) -> Window:
        before = self.reading()
        answer = self._order(order, count)
        if wait:
            self.await_left()
        return self.cost(count, before, answer["start"], submitted=answer["end"])

    def _order(self, order: dict[str, Any], count: int) -> dict[str, Any]:
        assert self._producer.stdin is not None
        self._producer.stdin.write(
            json.dumps({**order, "gap": order.get("gap", 0), "first": self._first, "count": count})
        )
        self._producer.stdin.write("\n")
        self._producer.stdin.flush()
        self._first += count
        return answer_of(self._producer, self._folder)

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            done = self._marks.stat().st_size // _MARK.size
            raise SystemExit(
                f"{self.name}: {done} of {self._first} jobs after {_DONE_SECONDS:g} s\n{_logs(self._folder)}"
            )
        for name, process in self._processes.items():
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                raise SystemExit(f"{self.name}: its {name} has ended\n{_logs(self._folder)}")


@contextlib.contextmanager
def peer(one: Peer, folder: Path, fsync: str) -> Iterator[Contender]:
    """A peer with its worker and its producer, warm."""
    worker, producer = one.prepare()
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(bench_store(folder / "store", fsync))
        variables = peer_variables(store.url, folder)
        work = stack.enter_context(running(worker, folder, "worker", variables, cwd=ROOT / "bench/peers/queue_python"))
        make = stack.enter_context(running(producer, folder, "producer", variables))
        answer_of(make, folder)
        processes = {"worker": psutil.Process(work.pid), "producer": psutil.Process(make.pid)}
        yield Contender(one.name, folder, store, one.left, processes, make)


def peer_variables(url: str, folder: Path) -> dict[str, str]:
    """What every program of a run is told."""
    (folder / "marks").touch()
    return {"BENCH_STORE_URL": url, "BENCH_MARKS": str(folder / "marks")}


@contextlib.contextmanager
def running(
    command: Sequence[str], folder: Path, name: str, variables: Mapping[str, str], *, cwd: Path = ROOT
) -> Iterator[subprocess.Popen[str]]:
    """A process with its own log, in a group of its own; ended with the block."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FLEET_")}
    with (
        (folder / f"{name}.log").open("w") as log,
        subprocess.Popen(
            command,
            cwd=cwd,
            env={**kept, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def answer_of(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """The next line of a producer."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a producer has ended: {process.args!r}\n{_logs(folder)}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _tree_seconds(process: psutil.Process) -> float:
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = each.cpu_times()
            total += times.user + times.system
    return total


def _logs(folder: Path) -> str:
    return "".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))
