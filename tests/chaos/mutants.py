"""The server with one guard taken out: each must be given away by some trial."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import fleet_server

PACKAGE = Path(fleet_server.__file__).parent


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `file` of the server's package, `guard` becomes `without`."""

    name: str
    file: str
    guard: str
    without: str


MUTANTS = (
    Mutant(
        "complete-any-token",
        "store/scripts/complete.lua",
        "local current = j.st == 'running' and j.tk == token",
        "local current = j.st == 'running'",
    ),
    Mutant(
        "complete-any-state",
        "store/scripts/complete.lua",
        "local late = j.st == 'queued' and j.lt == token",
        "local late = j.lt == token",
    ),
    Mutant(
        "fail-any-token",
        "store/scripts/fail.lua",
        "if j.st ~= 'running' or j.tk ~= token then",
        "if j.st ~= 'running' then",
    ),
    Mutant(
        "submit-forgets-keys",
        "store/scripts/lib/submitted.lua",
        "local stored = key and redis.call('GET', key)",
        "local stored = nil",
    ),
    Mutant(
        "renew-any-token",
        "store/scripts/renew.lua",
        "if known[1] == 'running' and known[2] == token then",
        "if known[1] == 'running' then",
    ),
    Mutant("retry-any-state", "store/scripts/retry.lua", "if j.st ~= 'failed' then", "if false then"),
)


def mutated(folder: Path, mutant: Mutant) -> Path:
    """A copy of the server's package with the mutant in it; the folder is to be put before all others on the path."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / PACKAGE.name / mutant.file
    text = file.read_text()
    if text.count(mutant.guard) != 1:
        raise AssertionError(f"{mutant.name}: {mutant.file} has its guard {text.count(mutant.guard)} times, not once")
    file.write_text(text.replace(mutant.guard, mutant.without))
    return folder
