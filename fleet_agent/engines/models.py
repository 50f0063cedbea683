"""The model folder: which checkpoints and LoRAs are here, read from file headers without loading them.

`<folder>/checkpoints` and `<folder>/loras` hold `.safetensors` files, at any depth; a checkpoint may also be a folder
in diffusers' layout (model_layout.py). Hashing is apart (`hash_missing`, for a thread), and hashes are kept in
`.hashes.json` by path, size and mtime.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fleet_agent.engines import model_layout
from fleet_agent.engines.base import ModelFile, ModelKind

FOLDERS: Mapping[str, ModelKind] = {"checkpoints": "checkpoint", "loras": "lora"}
MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors format itself sets
_CHUNK = 1 << 20

# The first prefix that a tensor's name starts with tells the family, where the header does not say it.
_BY_TENSOR: tuple[tuple[str, str], ...] = (
    ("conditioner.embedders.1.", "sdxl"),
    ("lora_te2_", "sdxl"),
    ("model.diffusion_model.joint_blocks.", "sd3"),
    ("model.diffusion_model.double_blocks.", "flux"),
    ("double_blocks.", "flux"),
    ("cond_stage_model.model.", "sd2"),
    ("cond_stage_model.transformer.", "sd1"),
)
_BY_BASE: tuple[tuple[str, str], ...] = (("sdxl", "sdxl"), ("sd_v1", "sd1"), ("sd_v2", "sd2"), ("flux", "flux"))


class BadModelFile(ValueError):  # noqa: N818 - reads as what it is
    """A file that is not well-formed safetensors; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a scan found: files sorted by kind and name, and what was left out, by path."""

    files: tuple[ModelFile, ...]
    problems: Mapping[str, str]


def read_header(path: Path) -> dict[str, object]:
    """Return the JSON header of a safetensors file. Raises BadModelFile or OSError; reads no tensor."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BadModelFile("shorter than a safetensors header")
        length: int = struct.unpack("<Q", prefix)[0]
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise BadModelFile(f"claims a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise BadModelFile("header is not a JSON object")
    end = 8 + length + max(map(_tensor_end, header.items()), default=0)
    if end > size:
        raise BadModelFile(f"tensors end at byte {end} of a file of {size}: the file is cut short")
    return header


def _tensor_end(item: tuple[str, object]) -> int:
    name, entry = item
    if name == "__metadata__":
        return 0
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int and o >= 0 for o in offsets)):
        raise BadModelFile(f"tensor {name!r} has no data_offsets")
    return int(offsets[1])


def metadata_of(header: Mapping[str, object]) -> dict[str, str]:
    """Return the header's `__metadata__`, its string values only."""
    raw = header.get("__metadata__")
    return {k: v for k, v in raw.items() if isinstance(v, str)} if isinstance(raw, dict) else {}


def architecture_of(header: Mapping[str, object]) -> str | None:
    """Return the model family named by the header, or told by its tensors' names; None when unknown."""
    meta = metadata_of(header)
    named = meta.get("architecture") or meta.get("modelspec.architecture") or meta.get("ss_base_model_version")
    if named:
        return next((family for prefix, family in _BY_BASE if prefix in named.lower()), named[:64])
    return next((family for prefix, family in _BY_TENSOR if any(n.startswith(prefix) for n in header)), None)


def trigger_words_of(header: Mapping[str, object]) -> tuple[str, ...]:
    """Return the trigger words of a LoRA: a JSON list or a comma-separated text in its metadata."""
    meta = metadata_of(header)
    text = meta.get("trigger_words") or meta.get("modelspec.trigger_phrase") or ""
    words: Iterable[object] = text.split(",")
    if text.startswith("["):
        with contextlib.suppress(ValueError):
            words = json.loads(text)
    return tuple(word.strip() for word in words if isinstance(word, str) and word.strip())[:32]


class ModelFolder:
    """The models below one folder. Its methods may be called from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._cache_path = folder / ".hashes.json"
        self._lock = threading.Lock()
        self._hashes: dict[str, str] = self._load_cache()

    def scan(self) -> Scan:
        """Return what is there now. `sha256` is None for a file that `hash_missing` has not read yet."""
        files: list[ModelFile] = []
        problems: dict[str, str] = {}
        for kind, root, path in self._walk():
            try:
                family, words = _described(path)
                key, size = self._key(path)
            except (OSError, ValueError) as error:
                problems[path.relative_to(self.folder).as_posix()] = str(error)
                continue
            with self._lock:
                sha256 = self._hashes.get(key)
            files.append(ModelFile(path.relative_to(root).as_posix(), path, kind, size, sha256, family, words))
        return Scan(tuple(sorted(files, key=lambda f: (f.kind, f.name))), problems)

    def know(self, path: Path, sha256: str) -> None:
        """A file was hashed while it came: it need not be read again. Raises OSError where it is gone."""
        key, _ = self._key(path)
        with self._lock:
            self._hashes[key] = sha256
        self._save_cache()

    def hash_missing(self, stop: Callable[[], bool] = lambda: False) -> tuple[ModelFile, ...]:
        """Hash every file whose hash is unknown, and return those hashed. Blocks: call it in a thread.

        `stop` is asked once a megabyte; a file that vanishes or changes meanwhile is left for the next time.
        """
        done: list[ModelFile] = []
        for file in self.scan().files:
            if file.sha256 is not None or file.path is None:
                continue
            try:
                key, _ = self._key(file.path)
                sha256 = model_layout.hash_of(file.path, stop) if file.path.is_dir() else _hash(file.path, stop)
                unchanged = self._key(file.path)[0] == key
            except OSError:
                continue
            if sha256 is None:
                break
            if unchanged:
                with self._lock:
                    self._hashes[key] = sha256
                done.append(replace(file, sha256=sha256))
        if done:
            self._save_cache()
        return tuple(done)

    def _walk(self) -> Iterator[tuple[ModelKind, Path, Path]]:
        for sub, kind in FOLDERS.items():
            root = self.folder / sub
            indexed = {index.parent for index in root.rglob(model_layout.INDEX)} - {root}
            folders = {folder for folder in indexed if model_layout.is_model(folder)}
            for path in sorted([*root.rglob("*.safetensors"), *folders]):
                hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
                inside = not folders.isdisjoint(path.parents)
                if not hidden and not inside and (path in folders or path.is_file()):
                    yield kind, root, path

    def _key(self, path: Path) -> tuple[str, int]:
        if path.is_dir():
            size, changed = model_layout.state_of(path)
        else:
            size, changed = path.stat().st_size, path.stat().st_mtime_ns
        return f"{path.relative_to(self.folder).as_posix()}|{size}|{changed}", size

    def _load_cache(self) -> dict[str, str]:
        try:
            raw = json.loads(self._cache_path.read_bytes())
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in raw.items() if isinstance(v, str)} if isinstance(raw, dict) else {}

    def _save_cache(self) -> None:
        live = {self._key(path)[0] for _, _, path in self._walk()}
        with self._lock:
            self._hashes = {key: value for key, value in self._hashes.items() if key in live}
            text = json.dumps(self._hashes, indent=1, sort_keys=True)
        temporary = self._cache_path.with_suffix(".tmp")
        # A read-only model folder is usual (a mount shared by many nodes): hashes then live in memory alone.
        with contextlib.suppress(OSError):
            temporary.write_text(text)
            temporary.replace(self._cache_path)


def _described(path: Path) -> tuple[str | None, tuple[str, ...]]:
    """Family and trigger words of a checkpoint or LoRA."""
    if path.is_dir():
        return model_layout.architecture_of(path), ()
    header = read_header(path)
    return architecture_of(header), trigger_words_of(header)


def _hash(path: Path, stop: Callable[[], bool]) -> str | None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            if stop():
                return None
            digest.update(chunk)
    return digest.hexdigest()
