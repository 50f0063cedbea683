"""The file of API keys: what it may say, what is refused by file and line, and that changes are taken up."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.keyfile import KeyFile, KeyFileError
from fleet_server.rpc.auth import ApiKey, KeyRing
from tests.waiting import wait_until

ANN, BOB, OLD = "a" * 32, "b" * 32, "o" * 32


def written(path: Path, *lines: str, mode: int = 0o600) -> Path:
    """The file with these lines, put in place at once as an editor does."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text("".join(f"{line}\n" for line in lines))
    fresh.chmod(mode)
    fresh.replace(path)
    return path


def loaded(path: Path, *others: ApiKey, published: frozenset[str] = frozenset()) -> KeyRing:
    ring = KeyRing(others, clock=lambda: 0.0)
    KeyFile(path, others, ring.replace, published=published).load()
    return ring


def test_an_owner_is_the_name_of_a_key(tmp_path: Path) -> None:
    ring = loaded(written(tmp_path / "keys", "# people", "", f"ann:{ANN}:admin", f"  bob:{BOB}  ", f"bob:{OLD}"))
    assert ring.required
    assert [ring.owner(key, "ipv4:1") for key in (ANN, BOB, OLD)] == ["ann", "bob", "bob"]
    assert ring.is_admin("ann") and not ring.is_admin("bob")
    with pytest.raises(FleetError) as caught:
        ring.owner("c" * 32, "ipv4:1")
    assert caught.value.reason == "API_KEY_INVALID"


def test_without_keys_everybody_may_everything() -> None:
    assert KeyRing((), clock=lambda: 0.0).is_admin("")


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        ([f"ann:{ANN}", "bob"], 2, "must be name:key or name:key:admin"),
        ([f"ann:{ANN}", "bob:short"], 2, "16 to 256 visible"),
        ([f"ann:{ANN}:root"], 1, "can only be admin"),
        ([f"ann:{ANN}:"], 1, "can only be admin"),
        ([f"ann:{ANN}:admin:x"], 1, "can only be admin"),
        ([f"a b:{ANN}"], 1, "a name is 1 to 63"),
        ([f":{ANN}"], 1, "a name is 1 to 63"),
        ([f"ann:{'a' * 15} {'a' * 15}"], 1, "visible ASCII"),
        (["#", f"ann:{ANN}", f"bob:{ANN}"], 3, "stands in line 2 too"),
        ([f"ann:{ANN}", f"ann:{BOB}", f"ann:{OLD}"], 3, "has two keys already"),
        ([f"ann:{ANN}:admin", f"ann:{BOB}"], 2, "admin in one line alone"),
        ([f"fleet-agent:{ANN}"], 1, "taken by this server"),
        (["ann:fleet-commander-2024"], 1, "published example"),
    ],
)
def test_a_bad_line_is_named_and_no_key_is_shown(tmp_path: Path, lines: list[str], line: int, words: str) -> None:
    path = written(tmp_path / "keys", *lines)
    with pytest.raises(KeyFileError, match=re.escape(f"{path}:{line}: ")) as caught:
        loaded(path, published=frozenset({"fleet-commander-2024"}))
    assert words in str(caught.value)
    assert not any(key in str(caught.value) for key in (ANN, BOB, OLD, "fleet-commander-2024"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "is no file"),
        (os.mkfifo, "is no file"),
        (written, "there is no key in it"),
        (lambda path: written(path, f"ann:{ANN}", mode=0o604), "chmod 600"),
        (lambda path: written(path, f"ann:{ANN}", mode=0o620), "chmod 600"),
        (lambda path: written(path, "x" * (1 << 20)), "larger than"),
        (lambda path: (path.write_bytes(b"\xff"), path.chmod(0o600)), "no UTF-8"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(tmp_path: Path, make: object, words: str) -> None:
    path = tmp_path / "keys"
    make(path)  # type: ignore[operator]
    with pytest.raises(KeyFileError, match=words) as caught:
        loaded(path)
    assert str(path) in str(caught.value)


def test_the_readers_of_a_group_are_the_owners_business(tmp_path: Path) -> None:
    assert loaded(written(tmp_path / "keys", f"ann:{ANN}", mode=0o640)).required


def test_the_one_key_and_the_file_may_not_clash(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", f"ann:{ANN}", f"default:{BOB}")
    with pytest.raises(KeyFileError, match="default is the one of FLEET_API_KEY"):
        loaded(path, ApiKey.of("default", OLD))
    with pytest.raises(KeyFileError, match="one key has one name"):
        loaded(written(path, f"ann:{ANN}"), ApiKey.of("default", ANN))
    ring = loaded(path, ApiKey.of("default", OLD))
    assert (ring.owner(OLD, "ipv4:1"), ring.owner(ANN, "ipv4:1")) == ("default", "ann")


async def test_changes_are_taken_up_and_a_spoiled_file_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", f"ann:{ANN}")
    heard: list[Sequence[ApiKey]] = []
    file = KeyFile(path, (), heard.append, poll_seconds=0.01)
    file.load()
    running = asyncio.create_task(file.run())
    try:
        written(path, f"bob:{BOB}:admin", f"ann:{ANN}")
        await wait_until(lambda: len(heard) == 2)
        assert [(key.name, key.admin) for key in heard[-1]] == [("bob", True), ("ann", False)]
        written(path, "nonsense")
        await asyncio.sleep(0.05)
        path.unlink()
        await asyncio.sleep(0.05)
        assert len(heard) == 2
        written(path, f"bob:{OLD}")
        await wait_until(lambda: len(heard) == 3)
        assert heard[-1] == [ApiKey.of("bob", OLD, admin=False)]
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_signal_makes_it_read_again_at_once_whatever_the_clock_of_the_disk_says(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", f"ann:{ANN}")
    heard: list[Sequence[ApiKey]] = []
    file = KeyFile(path, (), heard.append, poll_seconds=3600)
    file.load()
    before = path.stat()
    path.write_text(f"bob:{BOB}\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    running = asyncio.create_task(file.run())
    try:
        file.reload()
        await wait_until(lambda: len(heard) == 2)
        assert [key.name for key in heard[-1]] == ["bob"]
    finally:
        running.cancel()
        await asyncio.wait([running])
