"""Each part of `make check` passes on a copy of the project and fails on one that is broken in the way it guards."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.guards.tree import PATIENCE_SECONDS, ROOT, copy_project, make, mend

pytestmark = pytest.mark.timeout(PATIENCE_SECONDS)

ERRORS = "fleet_server/domain/errors.py"
TYPES = "proto/fleet/v1/types.proto"


@dataclass(frozen=True)
class Guard:
    """One way to break the project: what is done to a copy, who must notice, and in which words."""

    name: str
    target: str
    wreck: Callable[[Path], None]
    says: str
    variables: dict[str, str] = field(default_factory=dict)


def _append(path: str, text: str) -> Callable[[Path], None]:
    def wreck(tree: Path) -> None:
        with (tree / path).open("a", encoding="utf-8") as file:
            file.write(text)

    return wreck


def _import(path: str, module: str) -> Callable[[Path], None]:
    """Adds an import to a module; the module is made where a room has none of that name."""
    return _append(path, f"\nimport {module}\n")


def _replace(path: str, pattern: str, by: str) -> Callable[[Path], None]:
    def wreck(tree: Path) -> None:
        text, count = re.subn(pattern, by, (tree / path).read_text(encoding="utf-8"), count=1, flags=re.MULTILINE)
        assert count == 1, f"{path} holds nothing like {pattern}: this guard breaks nothing any more"
        (tree / path).write_text(text, encoding="utf-8")

    return wreck


def _remove_rpc(path: str, name: str) -> Callable[[Path], None]:
    """Removes an RPC, its options and all."""

    def wreck(tree: Path) -> None:
        text = (tree / path).read_text(encoding="utf-8")
        start = text.index(f"rpc {name}(")
        depth, end = 0, text.index("{", start)
        while True:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
            if depth == 0:
                break
        (tree / path).write_text(text[:start] + text[end:], encoding="utf-8")

    return wreck


IMPORTS = [
    ("domain reads a clock", "fleet_server/domain/errors.py", "time", "The domain is pure"),
    ("domain knows protobuf", "fleet_server/domain/errors.py", "google.protobuf.message", "The domain is pure"),
    ("domain knows the store", "fleet_server/domain/errors.py", "fleet_server.store.keys", "The rooms of the server"),
    ("store knows the RPCs", "fleet_server/store/keys.py", "fleet_server.rpc.invoke", "The rooms of the server"),
    ("codec knows the product", "fleet_server/protojson/codec.py", "fleet.v1.types_pb2", "The JSON codec"),
    ("bridge knows the product", "fleet_server/bridge/errors.py", "fleet.v1.types_pb2", "The bridge is blind"),
    ("bridge knows jobs", "fleet_server/bridge/errors.py", "fleet_server.domain.job", "The bridge is blind"),
    ("bridge knows the RPCs", "fleet_server/bridge/errors.py", "fleet_server.rpc.invoke", "The bridge is blind"),
    ("agent knows the server", "fleet_agent/__init__.py", "fleet_server.domain.errors", "meet in the stubs alone"),
    ("client knows the server", "clients/python/fleet_client/__init__.py", "fleet_server", "meet in the stubs alone"),
    ("server knows the agent", "fleet_server/domain/errors.py", "fleet_agent", "meet in the stubs alone"),
]

GUARDS = [
    Guard("unused import", "check-lint", _append(ERRORS, "\nimport os\n"), "F401"),
    Guard("blocking call", "check-lint", _append(ERRORS, "\nasync def nap() -> None:\n    open('x')\n"), "ASYNC230"),
    Guard("format", "check-format", _append(ERRORS, "\nx   =  1\n"), "Would reformat|would be reformatted"),
    Guard(
        "type",
        "check-types",
        _append(ERRORS, '\n\ndef wrong() -> int:\n    return "no"\n'),
        r"\[return-value\]",
        {"TYPES": ERRORS},
    ),
    Guard(
        "missing annotation",
        "check-types",
        _append(ERRORS, "\n\ndef bare(x):\n    return x\n"),
        r"\[no-untyped-def\]",
        {"TYPES": ERRORS},
    ),
    *(
        Guard(name, "check-imports", _import(path, module), rf"{re.escape(contract)}[\s\S]*?BROKEN")
        for name, path, module, contract in IMPORTS
    ),
    Guard(
        "edited stub",
        "check-drift",
        _append("clients/python/fleet/v1/types_pb2.pyi", "\n# by hand\n"),
        r"differs: fleet/v1/types_pb2\.pyi",
    ),
    Guard(
        "stub of no proto",
        "check-drift",
        _append("clients/python/fleet/v1/ghost_pb2.py", "\n"),
        r"not generated from any proto: fleet/v1/ghost_pb2\.py",
    ),
    Guard(
        "proto changed, stubs not",
        "check-drift",
        _append(TYPES, "\n// A late thought.\nmessage Late {}\n"),
        r"differs: fleet/v1/descriptors\.binpb",
    ),
    Guard(
        "field name",
        "check-proto",
        _append(TYPES, "\n// Wrong.\nmessage Wrong {\n  string BadName = 1;\n}\n"),
        'Field name "BadName"',
    ),
    Guard(
        "enum without an unspecified value",
        "check-proto",
        _append(TYPES, "\n// Wrong.\nenum Wrong {\n  WRONG_RED = 0;\n}\n"),
        "_UNSPECIFIED",
    ),
    Guard(
        "renumbered field",
        "check-breaking",
        _replace(TYPES, r"^(  string \w+) = 1(?=[; ])", r"\1 = 901"),
        r'field "1"',
    ),
    Guard(
        "field of another type",
        "check-breaking",
        _replace(TYPES, r"^  string (\w+ = 1)(?=[; ])", r"  bytes \1"),
        r"changed type from",
    ),
    Guard(
        "removed rpc",
        "check-breaking",
        _remove_rpc("proto/fleet/v1/queue.proto", "GetJob"),
        'RPC "GetJob"',
    ),
]

WHOLE = sorted({(guard.target, *(guard.variables.values())) for guard in GUARDS})


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project that stays as it is."""
    return copy_project(tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="module")
def worn(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("worn"), pristine)


@pytest.fixture
def tree(pristine: Path, worn: Path) -> Iterator[Path]:
    """A copy of the project, to be broken; mended for the next test. What the tools remember of it stays."""
    yield worn
    mend(worn, pristine)


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: f"{guard.target}: {guard.name}")
def test_broken_copy_is_refused(guard: Guard, tree: Path) -> None:
    guard.wreck(tree)

    result = make(tree, guard.target, **guard.variables)

    assert result.returncode != 0, result.stdout
    assert re.search(guard.says, result.stdout), result.stdout


@pytest.mark.parametrize("target", WHOLE, ids=lambda target: target[0])
def test_unbroken_copy_passes(target: tuple[str, ...], tree: Path) -> None:
    result = make(tree, target[0], **({"TYPES": target[1]} if len(target) > 1 else {}))

    assert result.returncode == 0, result.stdout


def test_every_part_of_check_has_a_guard() -> None:
    """A check that is added to the Makefile runs in `make check`, and is seen to bite here."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    parts = set(re.findall(r"^(check-[a-z]+):", makefile, re.MULTILINE))
    listed = re.search(r"^CHECKS := (.*)$", makefile, re.MULTILINE)

    assert listed is not None
    assert set(listed.group(1).split()) == parts == {guard.target for guard in GUARDS}
