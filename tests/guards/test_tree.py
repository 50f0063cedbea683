"""What must hold for the files of the project as they lie there."""

from __future__ import annotations

import importlib
import re
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from fleet_server.store.lua import load_scripts
from tests.guards.tree import ROOT, project_files

MOST_LINES = 400
# Files that may be longer, and how long; a number here may fall but not rise, and goes when 400 will do.
LONGER: dict[str, int] = {}

# Written in halves, so that this file may be read by its own guard.
_HOSTS = (
    "pypi" + r"\.org",
    "pythonhosted" + r"\.org",
    "registry\\." + "npmjs",
    r"deb\." + "debian",
    "proxy\\." + "golang",
)
_PATHS = ("/wor" + r"k/(?:main|shared)", "/roo" + r"t/\.", "/hom" + r"e/[a-z]+/", "/Use" + r"rs/[a-z]+/")
FORBIDDEN = re.compile("|".join((*_HOSTS, *_PATHS)).encode())
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImplemented" + r"Error)\b")
_IMPURE = re.compile(r"\.(?:now|utcnow|today|monotonic|urandom)\(")


@cache
def _sources(suffix: str) -> tuple[Path, ...]:
    """Our own files of that suffix; generated ones and lists of packages are not ours."""
    generated = ("clients/python/fleet/", "clients/python/buf/")
    return tuple(p for p in project_files() if p.suffix == suffix and not p.as_posix().startswith(generated))


def test_no_file_names_a_package_index_or_a_place_on_someones_machine() -> None:
    found = [
        f"{path}: {match.group().decode()}"
        for path in project_files()
        if (match := FORBIDDEN.search((ROOT / path).read_bytes()))
    ]

    assert found == []


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_lock_holds_names_versions_and_hashes_alone(lock: str) -> None:
    lines = (ROOT / lock).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith(" ")]

    assert not [line for line in lines if "://" in line or line.startswith("-")]
    assert pins
    assert all(re.match(r"[a-z0-9._-]+==\S+ (; .+ )?\\$", line) for line in pins)
    assert all(following.startswith("    --hash=sha256:") for pin, following in pairwise(lines) if pin in pins)


def test_locks_agree_and_hold_every_dependency() -> None:
    def pins(lock: str) -> set[str]:
        return set(re.findall(r"^[a-z0-9._-]+==\S+", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE))

    def names(wanted: list[str]) -> set[str]:
        return {re.split(r"[<>=;\s\[]", each, maxsplit=1)[0].lower() for each in wanted}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = project["dependency-groups"]
    runtime, dev = pins("requirements.lock"), pins("requirements-dev.lock")

    assert runtime <= dev
    assert names(project["project"]["dependencies"] + groups["build"]) <= {pin.split("==")[0] for pin in runtime}
    assert names(groups["dev"]) <= {pin.split("==")[0] for pin in dev}
    # Each machine needs a build of its own of it: see the extra `diffusers`.
    assert "torch" not in {pin.split("==")[0] for pin in dev}


def test_no_source_file_is_longer_than_agreed() -> None:
    lengths = {
        path.as_posix(): len((ROOT / path).read_text(encoding="utf-8").splitlines())
        for suffix in (".py", ".lua", ".js", ".mjs", ".ts", ".go")
        for path in _sources(suffix)
    }
    too_long = {name: lines for name, lines in lengths.items() if lines > LONGER.get(name, MOST_LINES)}
    needless = [name for name in LONGER if lengths.get(name, 0) <= MOST_LINES]

    assert too_long == {}
    assert needless == [], "these fit the common limit now: take them off the list"


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{path}:{number}: {line.strip()}"
        for suffix in (".py", ".proto", ".lua", ".js", ".mjs", ".ts", ".go")
        for path in _sources(suffix)
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1)
        if UNFINISHED.search(line)
    ]

    assert found == []


def test_the_domain_asks_no_clock_and_no_dice() -> None:
    """What an import rule cannot see: `now` is an argument everywhere in the domain."""
    found = [
        f"{path}: {match.group()}"
        for path in _sources(".py")
        if path.is_relative_to("fleet_server/domain")
        and (match := _IMPURE.search((ROOT / path).read_text(encoding="utf-8")))
    ]

    assert found == []


def test_every_script_is_loaded_and_called_by_the_store() -> None:
    scripts = ROOT / "fleet_server/store/scripts"
    public = {path.stem for path in scripts.glob("*.lua")}
    snippets = {path.stem for path in (scripts / "lib").glob("*.lua")}
    store = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "fleet_server/store").rglob("*.py"))
    lua = "\n".join(path.read_text(encoding="utf-8") for path in scripts.rglob("*.lua"))

    assert set(load_scripts()) == public
    assert {name for name in public if f'"{name}"' not in store} == set()
    assert {name for name in snippets if f"-- include: {name}\n" not in lua} == set()


def test_entry_points_lead_somewhere() -> None:
    """Each command and engine that pyproject.toml declares can be loaded and called."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = dict(project["scripts"])
    for group in project["entry-points"].values():
        declared.update(group)

    for name, target in declared.items():
        module, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute)), name
