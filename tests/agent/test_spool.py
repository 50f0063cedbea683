"""The spool: whole or not there, whatever ends the process, and whatever the disk does."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
from fleet.v1 import node_pb2

from fleet_agent import spool as module
from fleet_agent.spool import BadOutputError, BadTokenError, Spool, SpoolEntry

TOKEN = "0123456789abcdef"


def complete_of(token: str = TOKEN, outputs: int = 0) -> node_pb2.JobComplete:
    complete = node_pb2.JobComplete(job_id="job-1", token=token, run_seconds=1.5)
    for _ in range(outputs):
        complete.outputs.add(content_type="image/png")
    return complete


def fill(spool: Spool, token: str = TOKEN, data: tuple[bytes, ...] = (b"picture",)) -> SpoolEntry:
    folder = spool.work_folder(token)
    outputs = []
    for number, content in enumerate(data):
        path = folder / f"picture-{number}.png"
        path.write_bytes(content)
        outputs.append((path, "image/png"))
    return spool.add(complete_of(token, len(outputs)), outputs)


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_an_entry_is_read_back_as_it_was_added(tmp_path: Path) -> None:
    added = fill(Spool(tmp_path), data=(b"one", b"two" * 1_000_000))
    (entry,) = Spool(tmp_path).entries()
    assert entry == added
    assert (entry.token, entry.complete) == (TOKEN, complete_of(outputs=2))
    assert [file.size_bytes for file in entry.files] == [3, 3_000_000]
    for file in entry.files:
        data = (entry.folder / file.name).read_bytes()
        assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert everything(tmp_path / "scratch") == []
    assert not list((tmp_path / "scratch").iterdir())


def test_an_end_without_files_is_an_entry(tmp_path: Path) -> None:
    Spool(tmp_path).add(complete_of(), [])
    (entry,) = Spool(tmp_path).entries()
    assert entry.files == ()


def test_entries_come_oldest_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number, token in enumerate(("b", "a", "c")):
        entry = fill(spool, token)
        os.utime(entry.folder / f"{entry.token}.end", ns=(number, number))
    assert [entry.token for entry in spool.entries()] == ["b", "a", "c"]


def test_each_step_may_be_repeated(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    fill(spool)
    fill(spool, data=(b"another", b"two"))
    (entry,) = spool.entries()
    assert len(entry.files) == 2
    for _ in range(2):
        spool.remove(TOKEN)
        spool.discard(TOKEN)
        assert spool.entries() == []
    assert everything(tmp_path) == []


def test_scratch_is_emptied_at_the_start(tmp_path: Path) -> None:
    (Spool(tmp_path).work_folder(TOKEN) / "half.png").write_bytes(b"half")
    Spool(tmp_path)
    assert everything(tmp_path) == []


@pytest.mark.parametrize("token", ["", "..", "../../etc", "a/b", "a\0b", "x" * 129, "a.b"])
def test_a_token_that_names_no_folder_is_refused(tmp_path: Path, token: str) -> None:
    spool = Spool(tmp_path)
    fill(spool)
    for step in (spool.work_folder, spool.discard, spool.remove):
        with pytest.raises(BadTokenError, match="token"):
            step(token)
    with pytest.raises(BadTokenError):
        spool.add(complete_of(token), [])
    assert len(spool.entries()) == 1


def test_only_plain_files_of_the_work_folder_are_taken(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    precious = tmp_path / "precious.png"
    precious.write_bytes(b"precious")
    folder = spool.work_folder(TOKEN)
    (folder / "link.png").symlink_to(precious)
    (folder / "folder.png").mkdir()
    (folder / "aside").symlink_to(tmp_path)
    for path in ("link.png", "folder.png", "absent.png", "../../../precious.png", "aside/precious.png"):
        with pytest.raises(BadOutputError, match="the engine named"):
            spool.add(complete_of(outputs=1), [(folder / path, "image/png")])
    assert precious.read_bytes() == b"precious"
    assert spool.entries() == []


def test_outputs_in_a_folder_below_and_with_odd_names(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    folder = spool.work_folder(TOKEN)
    (folder / "below").mkdir()
    names = ["below/a.png", "noext", "x. odd", ".png"]
    for name in names:
        (folder / name).write_bytes(name.encode())
    entry = spool.add(complete_of(outputs=4), [(folder / name, "image/png") for name in names])
    assert [(entry.folder / file.name).read_bytes().decode() for file in entry.files] == names
    assert spool.entries() == [entry]


def damage_to_words(end: Path) -> None:
    """Whole by its hash, and no JobComplete."""
    words = b"\xff\xff\xff"
    head = orjson.loads(end.read_bytes().partition(b"\n")[0])
    head["sha256"] = hashlib.sha256(words).hexdigest()
    end.write_bytes(orjson.dumps(head) + b"\n" + words)


def damage_to_a_folder(end: Path) -> None:
    end.unlink()
    end.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda end: end.write_bytes(b""),
    "first line cut short": lambda end: os.truncate(end, 20),
    "end cut short": lambda end: os.truncate(end, end.stat().st_size - 1),
    "no second line": lambda end: end.write_bytes(end.read_bytes().replace(b"\n", b" ")),
    "first line of another kind": lambda end: end.write_bytes(b"[]" + end.read_bytes()),
    "another language": damage_to_words,
    "output gone": lambda end: end.with_name(f"{TOKEN}.0.png").unlink(),
    "output cut short": lambda end: os.truncate(end.with_name(f"{TOKEN}.0.png"), 3),
    "another's name": lambda end: end.rename(end.with_name("another.end")),
    "a folder": damage_to_a_folder,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_removed_and_the_others_stay(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    spool = Spool(tmp_path)
    damage(fill(spool).folder / f"{TOKEN}.end")
    fill(spool, "whole")
    assert [entry.token for entry in spool.entries()] == ["whole"]
    assert [entry.token for entry in Spool(tmp_path).entries()] == ["whole"]
    assert everything(tmp_path / "entries") == ["whole.0.png", "whole.end"]
    assert not list((tmp_path / "scratch").iterdir())


def test_an_entry_that_cannot_be_read_just_now_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    fill(spool)

    def failing(end: Path) -> SpoolEntry:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", failing)
        assert spool.entries() == []
    assert [entry.token for entry in spool.entries()] == [TOKEN]


# Each call that changes the disk, in a child that is killed at its n-th: a trace of every crash point of `add`. The
# first child is left alone and counts them.
KILLED_ADD = """
import os, signal, sys
from pathlib import Path
from fleet.v1 import node_pb2
from fleet_agent import spool as module

def add(folder, point):
    spool = module.Spool(folder)
    work = spool.work_folder("t1")
    (work / "a.png").write_bytes(b"picture")
    complete = node_pb2.JobComplete(job_id="job-1", token="t1")
    complete.outputs.add(content_type="image/png")
    count = 0

    def counted(event, arguments):
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree") or event == "fsync":
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    fsync = os.fsync
    def counted_fsync(fd):
        counted("fsync", ())
        fsync(fd)
        counted("fsync", ())
    os.fsync = counted_fsync
    sys.addaudithook(counted)
    spool.add(complete, [(work / "a.png", "image/png")])
    return count

def in_child(point):
    child = os.fork()
    if not child:
        os._exit(add(Path(sys.argv[1]) / str(point), point))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

points = in_child(-1)
print(*[in_child(point) for point in range(points)])
"""


def test_killed_at_each_step_of_add_an_entry_is_whole_or_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_ADD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = [int(word) for word in done.stdout.split()]
    assert len(ends) >= 12
    assert set(ends) == {-signal.SIGKILL}
    seen = set()
    for point in range(len(ends)):
        folder = tmp_path / str(point)
        spool = Spool(folder)
        entries = spool.entries()
        seen.add(len(entries))
        for entry in entries:
            assert entry.complete.job_id == "job-1"
            assert (entry.folder / entry.files[0].name).read_bytes() == b"picture"
        assert not list((folder / "scratch").iterdir())
        assert everything(folder / "entries") == (["t1.0.png", "t1.end"] if entries else [])
    assert seen == {0, 1}


def test_every_byte_is_on_the_disk_before_the_entry_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    folder = spool.work_folder(TOKEN)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"picture")
    entry = spool.stage(complete_of(outputs=2), [(folder / name, "image/png") for name in ("a.png", "b.png")])
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(fd: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{fd}').readlink().name.replace(TOKEN, 'TOKEN')}")
        fsync(fd)

    def noted_rename(path: Path, target: Path) -> Path:
        done.append(f"name {target.name.replace(TOKEN, 'TOKEN')}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    spool.commit(entry)
    outputs = ["sync TOKEN.0.png", "sync TOKEN.1.png"]
    assert done == [*outputs, "sync TOKEN.end", "name TOKEN.end", "sync entries"]


def test_staged_files_may_be_read_at_once_and_stay_where_they_are(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    folder = spool.work_folder(TOKEN)
    (folder / "a.png").write_bytes(b"picture")
    entry = spool.stage(complete_of(outputs=1), [(folder / "a.png", "image/png")])
    staged = entry.folder / entry.files[0].name
    assert staged.read_bytes() == b"picture"
    assert spool.entries() == []
    spool.commit(entry)
    assert staged.read_bytes() == b"picture"
    assert spool.entries() == [entry]


def test_what_was_staged_and_not_kept_is_gone_at_the_next_start(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    kept = fill(spool, "kept")
    folder = spool.work_folder(TOKEN)
    (folder / "a.png").write_bytes(b"picture")
    spool.stage(complete_of(outputs=1), [(folder / "a.png", "image/png")])
    assert Spool(tmp_path).entries() == [kept]
    assert everything(tmp_path) == ["entries/kept.0.png", "entries/kept.end"]


def test_an_end_that_has_its_outputs_with_it_has_no_files(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    complete = complete_of(outputs=1)
    complete.outputs[0].data = b"12345"
    entry = spool.add(complete, [])
    assert (entry.files, entry.complete) == ((), complete)
    assert everything(tmp_path) == [f"entries/{TOKEN}.end"]
    assert Spool(tmp_path).entries() == [entry]


@pytest.mark.parametrize("failing", range(3))
def test_a_failing_sync_leaves_no_entry_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    spool = Spool(tmp_path)
    folder = spool.work_folder(TOKEN)
    (folder / "a.png").write_bytes(b"picture")
    fsync, count = os.fsync, iter(range(100))

    def broken(fd: int) -> None:
        if next(count) == failing:
            raise OSError(errno.EIO, "input/output error")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="input/output"):
            spool.add(complete_of(outputs=1), [(folder / "a.png", "image/png")])
    assert next(count) == failing + 1
    assert everything(tmp_path) == []
    spool.add(complete_of(), [])
    assert [entry.files for entry in spool.entries()] == [()]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process grows beyond 4 kB: EFBIG stands for every disk that takes no more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_takes_no_more_leaves_no_entry_behind(tmp_path: Path, small_files: None) -> None:
    spool = Spool(tmp_path)
    complete = complete_of()
    complete.text = "x" * 10_000
    with pytest.raises(OSError, match="too large"):
        spool.add(complete, [])
    assert everything(tmp_path) == []
    spool.add(complete_of(), [])
    assert len(spool.entries()) == 1


async def test_an_empty_work_folder_is_another_attempts_next(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first = spool.work_folder("a")
    await spool.keep(complete_of("a"))
    again = spool.work_folder("b")
    assert again.is_dir() and not any(again.iterdir())
    (again / "half.png").write_bytes(b"half")
    assert spool.work_folder("c") not in {first, again}
    await spool.keep(complete_of("b"))
    assert not again.exists()
    kept = spool.work_folder("d")
    (kept / "picture.png").write_bytes(b"picture")
    entry = spool.add(complete_of("d", 1), [(kept / "picture.png", "image/png")])
    assert (entry.folder / entry.files[0].name).read_bytes() == b"picture"
    await spool.aclose()
    Spool(tmp_path)
    assert not any((tmp_path / "desks").iterdir())
