"""A disk that loses its power: what may be left of a program's files, from a trace of its system calls.

Only what was synced is sure to be there. A file's bytes are kept by a sync of that file, a name by a sync of its
folder; whatever was done since may have reached the disk or not, names without bytes and bytes in halves among it.
Renaming within a folder is one change, as every journal makes it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

CALLS = (
    "open,openat,creat,write,pwrite64,writev,pwritev,pwritev2,truncate,ftruncate,fallocate,sendfile,copy_file_range,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync"
)
"""What the trace has to hold."""
STRACE = ["strace", "-f", "-y", "-xx", "-s", "2000000", "-e", f"trace={CALLS}"]
_LINE = re.compile(
    r"^(\d+) +(?:(\w+)\((.*)\) += (\d+)|(\w+)\((.*) <unfinished \.\.\.>|<\.\.\. (\w+) resumed>(.*)\) += (\d+))"
)
_STRING = re.compile(r'^"((?:\\x[0-9a-f]{2})*)"$')
_PLACE = re.compile(r"^(?:\d+|AT_FDCWD)<(.*)>$")
_APART = 4
"""So many of the last changes are also kept, and lost, one by one."""

Image = frozenset[tuple[str, bytes | None]]
"""Paths below the root, and the bytes of files; None for folders."""


@dataclass(eq=False)
class File:
    """`writes` are what came since the last sync: when, where, what; a length where the bytes are None."""

    durable: bytes = b""
    writes: list[tuple[int, int, bytes | None]] = field(default_factory=list)

    def with_writes(self, writes: list[tuple[int, int, bytes | None]], *, zeros: bool = False) -> bytes:
        data = bytearray(self.durable)
        for _, at, new in writes:
            if new is None:
                data = data[:at].ljust(at, b"\0")
            else:
                data = data.ljust(at + len(new), b"\0")
                data[at : at + len(new)] = bytes(len(new)) if zeros else new
        return bytes(data)

    def synced(self, before: int) -> None:
        self.durable = self.with_writes([one for one in self.writes if one[0] < before])
        self.writes = [one for one in self.writes if one[0] >= before]


@dataclass(eq=False)
class Change:
    """Names of a folder that were given, and taken (None), at once."""

    number: int
    names: dict[str, File | Folder | None]


@dataclass(eq=False)
class Folder:
    durable: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def names(self, kept: Callable[[Change], bool]) -> dict[str, File | Folder]:
        names: dict[str, File | Folder | None] = dict(self.durable)
        for change in self.changes:
            if kept(change):
                names |= change.names
        return {name: node for name, node in names.items() if node is not None}

    def synced(self, before: int) -> None:
        self.durable = self.names(lambda change: change.number < before)
        self.changes = [change for change in self.changes if change.number >= before]


DATA: Mapping[str, Callable[[File], bytes]] = {
    "none": lambda file: file.durable,
    "all": lambda file: file.with_writes(file.writes),
    "zeros": lambda file: file.with_writes(file.writes, zeros=True),
    "first half": lambda file: file.with_writes(_halved(file.writes)),
    "last half": lambda file: file.with_writes(file.writes[len(file.writes) // 2 :]),
}
"""What may be there of a file's unsynced bytes."""


def _halved(writes: list[tuple[int, int, bytes | None]]) -> list[tuple[int, int, bytes | None]]:
    if len(writes) == 1 and (data := writes[0][2]):
        return [(writes[0][0], writes[0][1], data[: len(data) // 2])]
    return writes[: len(writes) // 2]


class Disk:
    """What is below `root`, an empty folder that is there. `play` the trace's calls."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._top = Folder()
        self._folders = [self._top]

    def images(self) -> Iterator[Image]:
        """What may be left if the power is cut now."""
        changes = [change for folder in self._folders for change in folder.changes]
        last = sorted(changes, key=lambda change: change.number)[-_APART:]
        for data in DATA.values():
            yield self._image(lambda _: False, data)
            yield self._image(lambda _: True, data)
        for one, name in itertools.product(last, ("none", "all")):
            yield self._image(lambda change, one=one: change is one, DATA[name])  # type: ignore[misc]
            yield self._image(lambda change, one=one: change is not one, DATA[name])  # type: ignore[misc]

    def _image(self, kept: Callable[[Change], bool], data: Callable[[File], bytes]) -> Image:
        found: set[tuple[str, bytes | None]] = set()

        def enter(path: str, folder: Folder) -> None:
            for name, node in folder.names(kept).items():
                found.add((path + name, None if isinstance(node, Folder) else data(node)))
                if isinstance(node, Folder):
                    enter(f"{path}{name}/", node)

        enter("", self._top)
        return frozenset(found)

    def play(self, call: Call) -> bool:
        """Does what a call did; False where it was nothing of this disk's."""
        handler = getattr(self, f"_{call.name.rstrip('2').removesuffix('at')}", None)
        if not any(path.startswith(self._root + "/") or path == self._root for path in call.paths()):
            return False
        if handler is None:
            raise ValueError(f"{call.name}: no call that this disk knows")
        handler(call)
        return True

    # Each call; its arguments are as strace tells them.

    def _open(self, call: Call) -> None:
        path = call.path(0)
        if path == self._root:
            return
        parent, name = self._parent(path)
        node = self._now(parent).get(name)
        if node is None and "O_CREAT" in call.text:
            self._name(call, parent, {name: File()})
        elif isinstance(node, File) and "O_TRUNC" in call.text:
            node.writes.append((call.end, 0, None))

    def _write(self, call: Call, at: int | None = None) -> None:
        file = self._file(call)
        place = len(DATA["all"](file)) if at is None else at
        file.writes.append((call.end, place, call.data(1)[: call.result]))

    def _pwrite64(self, call: Call) -> None:
        self._write(call, int(call.arguments[3]))

    def _ftruncate(self, call: Call) -> None:
        self._file(call).writes.append((call.end, int(call.arguments[1]), None))

    def _rename(self, call: Call) -> None:
        (old, name), (new, final) = self._parent(call.path(0)), self._parent(call.path(1))
        node = self._now(old)[name]
        if old is new:
            self._name(call, old, {name: None, final: node})
        else:
            self._name(call, new, {final: node})
            self._name(call, old, {name: None})

    def _mkdir(self, call: Call) -> None:
        parent, name = self._parent(call.path(0))
        self._folders.append(Folder())
        self._name(call, parent, {name: self._folders[-1]})

    def _unlink(self, call: Call) -> None:
        parent, name = self._parent(call.path(0))
        self._name(call, parent, {name: None})

    _rmdir = _unlink

    def _fsync(self, call: Call) -> None:
        node = self._node(call.path(0))
        if node is not None:
            node.synced(call.begin)

    _fdatasync = _fsync

    def is_folder(self, call: Call) -> bool:
        """Whether what a call is about is one."""
        return isinstance(self._node(call.path(0)), Folder)

    # Finding things, as they are for the running program.

    def _now(self, folder: Folder) -> dict[str, File | Folder]:
        return folder.names(lambda _: True)

    def _node(self, path: str) -> File | Folder | None:
        node: File | Folder | None = self._top
        for part in [part for part in path.removeprefix(self._root).split("/") if part]:
            node = self._now(node).get(part) if isinstance(node, Folder) else None
        return node

    def _file(self, call: Call) -> File:
        node = self._node(call.path(0))
        # What was removed while it is open is on no disk any more.
        return node if isinstance(node, File) else File()

    def _parent(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.rpartition("/")
        folder = self._node(above)
        assert isinstance(folder, Folder), path
        return folder, name

    def _name(self, call: Call, folder: Folder, names: dict[str, File | Folder | None]) -> None:
        folder.changes.append(Change(call.end, names))


@dataclass
class Call:
    """A system call of a trace: when it began and ended, in lines, and its arguments as they stand there."""

    begin: int
    end: int
    name: str
    text: str
    result: int

    def __post_init__(self) -> None:
        self.arguments = self.text.split(", ")

    def data(self, index: int) -> bytes:
        """An argument that is bytes."""
        match = _STRING.match(self.arguments[index])
        assert match is not None, f"{self.name}: the trace has not all of its bytes"
        return bytes.fromhex(match[1].replace("\\x", ""))

    def paths(self) -> list[str]:
        """The absolute paths that it is about: of names below folders, and of open files."""
        found, folder = [], ""
        for argument in self.arguments:
            if place := _PLACE.match(argument):
                folder = _plain(place[1])
                found.append(folder)
            elif _STRING.match(argument) and self.name not in ("write", "pwrite64"):
                name = self.data(self.arguments.index(argument)).decode(errors="replace")
                below = name if name.startswith("/") else f"{folder}/{name}"
                if found and found[-1] == folder:
                    found[-1] = below
                else:
                    found.append(below)
                folder = ""
        return found

    def path(self, index: int) -> str:
        """The first or second of them."""
        return self.paths()[index].rstrip("/")


def _plain(text: str) -> str:
    if "\\x" not in text:
        return text
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text)


def calls_of(trace: str) -> Iterator[Call]:
    """The calls of a trace that succeeded, in the order in which they ended."""
    begun: dict[tuple[str, str], tuple[int, str]] = {}
    for number, line in enumerate(trace.splitlines()):
        found = _LINE.match(line)
        if found is None:
            continue
        if found[2]:
            yield Call(number, number, found[2], found[3], int(found[4]))
        elif found[5]:
            begun[found[1], found[5]] = number, found[6]
        elif (found[1], found[7]) in begun:
            begin, text = begun.pop((found[1], found[7]))
            yield Call(begin, number, found[7], text + found[8], int(found[9]))


def word_of(call: Call) -> dict[str, str] | None:
    """What the program said on its standard output, a line of JSON; None for other calls."""
    if call.name == "write" and call.arguments[0].partition("<")[0] == "1":
        said: dict[str, str] = json.loads(call.data(1))
        return said
    return None
