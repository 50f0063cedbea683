"""Loads scripts/*.lua: joins their snippets, puts key names in and knows their SHA-1.

A script begins with `#!lua flags=...`. `-- include: x` takes from scripts/lib/x.lua what is used; `K.name` becomes the
prefix and that key of keys.NAMES. ARGV[1] is now_ms ("" takes the server's TIME), ARGV[2] the prefix; a script's own
arguments follow.
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

from fleet_server.store.keys import IDEMPOTENCY_TTL_MS, LIFE_KEPT_MS, NAMES, STAGED_TTL_MS

_INCLUDE = re.compile(r"^-- include: ([a-z_]+)$", re.MULTILINE)
_KEY = re.compile(r"\bK\.([a-z_]+)\b")
_CONSTANT = re.compile(r"\bC\.([A-Z_]+)\b")
_WORD = re.compile(r"\w+")
_DEFINED = re.compile(r"^local (?:function )?(\w+)", re.MULTILINE)
_CONSTANTS = {"IDEMPOTENCY_TTL_MS": IDEMPOTENCY_TTL_MS, "STAGED_TTL_MS": STAGED_TTL_MS, "LIFE_KEPT_MS": LIFE_KEPT_MS}


@dataclass(frozen=True, slots=True)
class Script:
    """One atomic step."""

    name: str
    source: str
    sha: str


@dataclass(frozen=True, slots=True)
class _Paragraph:
    text: str
    defines: frozenset[str]
    words: frozenset[str]


def _snippets(source: str, lib: Mapping[str, str], seen: dict[str, None]) -> None:
    """Collects the names of the snippets that a text includes, each after those it needs itself."""
    for name in _INCLUDE.findall(source):
        if name not in seen:
            _snippets(lib[name], lib, seen)
            seen[name] = None


def _plain(source: str) -> str:
    """Without comments, keys and constants in place."""
    text = _KEY.sub(lambda match: f"P..'{NAMES[match.group(1)]}'", source)
    text = _CONSTANT.sub(lambda match: str(_CONSTANTS[match.group(1)]), text)
    return "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("--"))


@cache
def _paragraphs(snippet: str) -> tuple[_Paragraph, ...]:
    # Most scripts include the same few.
    texts = _plain(snippet).split("\n\n")
    return tuple(_Paragraph(one, frozenset(_DEFINED.findall(one)), frozenset(_WORD.findall(one))) for one in texts)


def build(name: str, source: str, lib: Mapping[str, str]) -> Script:
    """The script that the server is given. Raises KeyError for an unknown snippet, key or constant.

    Of the snippets only what is used comes along, since a server makes each function anew at each call. A snippet's
    paragraphs are what is taken or left; one defines the names that its lines begin with `local`.
    """
    seen: dict[str, None] = {}
    _snippets(source, lib, seen)
    shebang, _, body = _plain(source).partition("\n")
    paragraphs = [one for snippet in seen for one in _paragraphs(lib[snippet])]
    kept: list[str] = []
    words = set(_WORD.findall(body))
    for paragraph in reversed(paragraphs):
        if not words.isdisjoint(paragraph.defines):
            kept.append(paragraph.text)
            words |= paragraph.words
    lines = "\n".join([shebang, *reversed(kept), body]).split("\n")
    text = "\n".join(line for line in lines if line.strip())
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
