"""Which folders of the node containers may see."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fleet_agent.commands.faults import CommandFault

FORBIDDEN = ("/etc", "/proc", "/sys", "/dev", "/root", "/boot", "/run", "/var/run", "/var/lib/docker")
"""Trees that no container may see, nor a folder that holds one of them: whoever has them has the machine."""
_TARGETS = ("/proc", "/sys", "/dev")


@dataclass(frozen=True, slots=True)
class BindMount:
    """A folder of the node, by its real path, and where the container sees it."""

    source: str
    target: str
    read_only: bool


class MountPolicy:
    """The allow-list. A source is judged by the path that it really has, after every symbolic link."""

    def __init__(self, roots: Iterable[Path], forbidden: Iterable[Path] = ()) -> None:
        self._roots = tuple(roots)
        self._trees = (*map(Path, FORBIDDEN), *forbidden)

    def judge(self, mounts: Sequence[str]) -> list[BindMount]:
        """The mounts of a request. Blocks. Raises CommandFault INVALID_FIELD and MOUNT_FORBIDDEN."""
        found = [self._one(f"mounts[{index}]", mount) for index, mount in enumerate(mounts)]
        targets = [mount.target for mount in found]
        for index, target in enumerate(targets):
            if target in targets[:index]:
                raise CommandFault("INVALID_FIELD", f"mounts[{index}]: {target} is mounted twice")
        return found

    def check(self, mounts: Sequence[BindMount]) -> None:
        """What was judged is still what it was: on no path has a folder become a link since. Blocks.

        Raises CommandFault MOUNT_FORBIDDEN.
        """
        for index, mount in enumerate(mounts):
            try:
                same = self._real(mount.source)[0] == mount.source
            except OSError:
                same = False
            if not same:
                raise self._refusal(f"mounts[{index}]")

    def _one(self, field: str, mount: str) -> BindMount:
        source, target, read_only = _parts(field, mount)
        # By its words first: of what lies outside the list nobody learns whether it exists.
        if not any(_within(Path(source), root) for root in self._roots):
            raise self._refusal(field)
        try:
            name, kind = self._real(source)
            real = Path(name)
        except (FileNotFoundError, NotADirectoryError):
            raise CommandFault("INVALID_FIELD", f"{field}: {source} does not exist on the node") from None
        except OSError:
            raise self._refusal(field) from None
        roots = [self._real_root(root) for root in self._roots]
        if not any(_within(real, root) for root in roots):
            raise self._refusal(field)
        if any(_within(real, tree) or _within(tree, real) for tree in self._closed()):
            raise self._refusal(field)
        if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
            raise self._refusal(field)
        return BindMount(str(real), target, read_only)

    def _closed(self) -> frozenset[Path]:
        """The forbidden trees, by their words and by what they stand for on the node."""
        return frozenset((*self._trees, *(Path(os.path.realpath(tree)) for tree in self._trees)))

    def _real(self, path: str) -> tuple[str, int]:
        """The path after every symbolic link, and its mode. Raises OSError."""
        real = os.path.realpath(path, strict=True)
        return real, Path(real).stat().st_mode

    def _real_root(self, root: Path) -> Path:
        """What a root stands for; itself where it is not there."""
        try:
            return Path(self._real(str(root))[0])
        except OSError:
            return root

    def _refusal(self, field: str) -> CommandFault:
        listed = ", ".join(map(str, self._roots)) or "none"
        return CommandFault(
            "MOUNT_FORBIDDEN",
            f"{field}: its folder is outside the node's mount roots ({listed}): use one of them, or add it to "
            "FLEET_AGENT_MOUNT_ROOTS on the node",
        )


def bad_root(root: Path) -> str | None:
    """Why this folder can be no mount root; None where it can."""
    if not root.is_absolute():
        return "must be an absolute path"
    # By its words, and by what they stand for: /run may be another name of /var/run.
    for path in (Path(os.path.normpath(root)), Path(os.path.realpath(root))):
        for tree in map(Path, FORBIDDEN):
            if _within(path, tree) or _within(tree, path):
                return f"is, holds or lies in {tree}, which no container may see"
    return None


def _parts(field: str, mount: str) -> tuple[str, str, bool]:
    words = mount.split(":")
    read_only = len(words) == 3 and words[2] == "ro"
    if len(words) != 2 and not read_only:
        raise CommandFault("INVALID_FIELD", f"{field}: must be /host:/container or /host:/container:ro")
    source, target = words[:2]
    if not all(path.startswith("/") and path.isprintable() for path in (source, target)):
        raise CommandFault("INVALID_FIELD", f"{field}: both paths must be absolute and printable")
    place = PurePosixPath(os.path.normpath(target))
    if ".." in target.split("/") or str(place) in ("/", "//") or any(place.is_relative_to(tree) for tree in _TARGETS):
        raise CommandFault("INVALID_FIELD", f"{field}: nothing can be mounted at {target} of a container")
    return os.path.normpath(source), str(place), read_only


def _within(path: Path, tree: Path) -> bool:
    return path.is_relative_to(tree)
