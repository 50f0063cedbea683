"""Loads scripts/*.lua: joins their snippets, puts key names in and knows their SHA-1.

A script begins with `#!lua flags=...`. `-- include: x` pastes scripts/lib/x.lua; `K.name` becomes the prefix and that
key of keys.NAMES. ARGV[1] is now_ms ("" takes the server's TIME), ARGV[2] the prefix; a script's own arguments
follow.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from types import MappingProxyType

from fleet_server.store.keys import IDEMPOTENCY_TTL_MS, NAMES, STAGED_TTL_MS

_INCLUDE = re.compile(r"^-- include: ([a-z_]+)$", re.MULTILINE)
_KEY = re.compile(r"\bK\.([a-z_]+)\b")
_CONSTANT = re.compile(r"\bC\.([A-Z_]+)\b")
_CONSTANTS = {"IDEMPOTENCY_TTL_MS": IDEMPOTENCY_TTL_MS, "STAGED_TTL_MS": STAGED_TTL_MS}


@dataclass(frozen=True, slots=True)
class Script:
    """One atomic step."""

    name: str
    source: str
    sha: str


def _join(source: str, read: Mapping[str, str], seen: set[str]) -> str:
    def paste(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        return _join(read[name], read, seen)

    return _INCLUDE.sub(paste, source)


def build(name: str, source: str, lib: Mapping[str, str]) -> Script:
    """The script that the server is given. Raises KeyError for an unknown snippet, key or constant."""
    text = _join(source, lib, set())
    text = _KEY.sub(lambda match: f"P..'{NAMES[match.group(1)]}'", text)
    text = _CONSTANT.sub(lambda match: str(_CONSTANTS[match.group(1)]), text)
    text = "\n".join(line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("--"))
    return Script(name, text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


def read_sources() -> tuple[dict[str, str], dict[str, str]]:
    """The texts of scripts/*.lua and of scripts/lib/*.lua, by name."""
    folder = resources.files("fleet_server.store").joinpath("scripts")

    def texts(place: Traversable) -> dict[str, str]:
        files = sorted(
            (entry for entry in place.iterdir() if entry.name.endswith(".lua")), key=lambda entry: entry.name
        )
        return {entry.name.removesuffix(".lua"): entry.read_text() for entry in files}

    return texts(folder), texts(folder.joinpath("lib"))


@cache
def load_scripts() -> Mapping[str, Script]:
    """All scripts by name."""
    sources, lib = read_sources()
    return MappingProxyType({name: build(name, source, lib) for name, source in sources.items()})
