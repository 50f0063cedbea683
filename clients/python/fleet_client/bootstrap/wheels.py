"""The wheels that a node is given: our own, and all that it needs in just the versions that run here.

They are packed again from what is installed beside us, so that neither this machine nor the node asks an index. That
fits a node with the same Python and processor; for another one a folder of wheels is given by hand.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

OURS = "fleet-commander"
_NEVER = re.compile(r"extra\s*==")
_EPOCH = (1980, 1, 1, 0, 0, 0)


class WheelError(RuntimeError):
    """A wheel cannot be made; the text says which and what to do."""


@dataclass(frozen=True, slots=True)
class WheelSet:
    """Wheels in one folder. `digest` names the set: the same wheels, the same name."""

    files: tuple[Path, ...]
    digest: str

    @classmethod
    def of(cls, folder: Path) -> WheelSet:
        """The wheels of a folder. Raises WheelError where ours is not among them, or pip's."""
        files = tuple(sorted(folder.glob("*.whl")))
        names = {_plain(path.name.partition("-")[0]) for path in files}
        for needed in (OURS, "pip"):
            if needed not in names:
                raise WheelError(f"{folder}: there is no wheel of {needed} in it")
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return cls(files, digest.hexdigest()[:16])


def own_wheels(folder: Path) -> WheelSet:
    """Packs what is installed here into `folder`. Blocks for seconds. Raises WheelError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*_closure(OURS), "pip"):
        distribution = _found(name)
        source = _editable(distribution)
        if source is None:
            _pack(distribution, folder)
        else:
            _build(source, folder)
    return WheelSet.of(folder)


def _closure(root: str) -> list[str]:
    """The distribution and all that it needs here, extras apart."""
    seen: dict[str, None] = {}
    waiting = [root]
    while waiting:
        name = _plain(waiting.pop())
        if name in seen:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if name == root:
                raise WheelError(f"{root} is not installed as a package: give --wheels FOLDER") from None
            # Its marker is for another platform.
            continue
        seen[name] = None
        waiting += [_required(text) for text in distribution.requires or () if not _NEVER.search(text)]
    return list(seen)


def _required(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return found[0] if found else requirement


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _found(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise WheelError(f"{name} is not installed here: pip install {name}, or give --wheels FOLDER") from None


def _editable(distribution: metadata.Distribution) -> Path | None:
    """The source folder of a distribution that is installed from it."""
    text = distribution.read_text("direct_url.json")
    about = json.loads(text) if text else {}
    if about.get("dir_info", {}).get("editable"):
        return Path(unquote(urlsplit(about["url"]).path))
    return None


def _build(source: Path, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise WheelError(f"{source}: its wheel cannot be built: {done.stderr.strip().splitlines()[-1:]}")


def _pack(distribution: metadata.Distribution, folder: Path) -> None:
    """A wheel of what is installed: its files, with a RECORD of its own."""
    info, tags = _info(distribution)
    name = distribution.metadata["Name"].replace("-", "_").replace(".", "_")
    target = folder / f"{name}-{distribution.version}-{tags}.whl"
    if target.exists():
        return
    record: list[str] = []
    part = target.with_suffix(".part")
    with zipfile.ZipFile(part, "w") as wheel:
        for path, data in _files(distribution, info):
            # With a ZipInfo, the archive's own level does not count.
            wheel.writestr(zipfile.ZipInfo(path, _EPOCH), data, zipfile.ZIP_DEFLATED, compresslevel=1)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{path},sha256={digest},{len(data)}")
        record.append(f"{info}/RECORD,,")
        wheel.writestr(zipfile.ZipInfo(f"{info}/RECORD", _EPOCH), "\n".join(record) + "\n")
    part.replace(target)


def _info(distribution: metadata.Distribution) -> tuple[str, str]:
    """The name of its dist-info folder, and the tags for its file name."""
    text = distribution.read_text("WHEEL") or ""
    tags = re.findall(r"^Tag: (\S+)$", text, re.MULTILINE)
    info = next((file.parts[0] for file in distribution.files or () if file.parts[0].endswith(".dist-info")), None)
    if not tags or info is None:
        raise WheelError(f"{distribution.metadata['Name']} was not installed from a wheel: give --wheels FOLDER")
    parts = [tag.split("-") for tag in tags]
    joined = (".".join(dict.fromkeys(part[index] for part in parts)) for index in range(3))
    return info, "-".join(joined)


def _files(distribution: metadata.Distribution, info: str) -> Iterable[tuple[str, bytes]]:
    """What a wheel holds: no scripts, no caches, no notes of the installer."""
    dropped = {f"{info}/RECORD", f"{info}/INSTALLER", f"{info}/REQUESTED", f"{info}/direct_url.json"}
    for file in distribution.files or ():
        path = file.as_posix()
        if ".." in file.parts or file.is_absolute() or file.suffix == ".pyc" or path in dropped:
            continue
        yield path, Path(str(file.locate())).read_bytes()
