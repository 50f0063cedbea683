"""The embedded S3 itself: what it refuses, what survives crashes, full disks and changed files, and who keeps it."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import http.client
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from minio import Minio
from minio.error import MinioException, S3Error
from urllib3.exceptions import HTTPError

from fleet_server.embedded.s3 import EmbeddedS3
from fleet_server.embedded.s3_shelf import Shelf
from fleet_server.http import bind
from fleet_server.storage.buckets import MODELS, OUTPUTS
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import S3Config
from tests.s3.conftest import LIMITS
from tests.s3.embedded import ACCESS, SECRET, EmbeddedProcess
from tests.waiting import has_ended, wait_until

DATA = b"the picture itself"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedProcess]:
    with EmbeddedProcess(tmp_path_factory.mktemp("s3") / "s3") as process:
        client = sdk(process)
        for bucket in (OUTPUTS, MODELS):
            client.make_bucket(bucket)
        yield process


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EmbeddedProcess]:
    """One for this test alone."""
    with EmbeddedProcess(tmp_path / "s3") as process:
        sdk(process).make_bucket(OUTPUTS)
        yield process


def sdk(process: EmbeddedProcess) -> Minio:
    netloc = urlsplit(process.endpoint).netloc
    return Minio(netloc, access_key=ACCESS, secret_key=SECRET, region="us-east-1", secure=False)


def put(process: EmbeddedProcess, key: str, data: bytes = DATA, bucket: str = OUTPUTS) -> None:
    sdk(process).put_object(bucket, key, io.BytesIO(data), len(data))


def get(process: EmbeddedProcess, key: str, bucket: str = OUTPUTS) -> bytes:
    response = sdk(process).get_object(bucket, key)
    try:
        return response.read()
    finally:
        response.close()


def signed(process: EmbeddedProcess, method: str, key: str, query: dict[str, Any], **headers: str) -> tuple[int, str]:
    """A signed call with any parameters and headers; status and error code."""
    link = sdk(process).get_presigned_url(method, OUTPUTS, key, extra_query_params=query)
    connection = http.client.HTTPConnection(urlsplit(link).netloc, timeout=50)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        body = b"<Tagging/>" if method in ("PUT", "POST") else None
        connection.request(method, link.removeprefix(process.endpoint), body, names)
        reply = connection.getresponse()
        text = reply.read().decode()
    finally:
        connection.close()
    found = re.search("<Code>(.*)</Code>", text)
    return reply.status, found[1] if found else ""


SUBRESOURCES = (
    "tagging acl retention legal-hold torrent versionId restore attributes select policy cors website unknown"
)


@pytest.mark.parametrize("name", SUBRESOURCES.split())
@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE"])
def test_what_is_not_known_is_refused_and_touches_nothing(running: EmbeddedProcess, method: str, name: str) -> None:
    put(running, "kept.png")
    assert signed(running, method, "kept.png", {name: "1"}) == (501, "NotImplemented")
    assert get(running, "kept.png") == DATA
    assert signed(running, "GET", "kept.png", {"response-content-type": "text/x"})[0] == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-amz-tagging", "a=b"),
        ("x-amz-acl", "public-read"),
        ("x-amz-server-side-encryption", "AES256"),
        ("x-amz-object-lock-mode", "COMPLIANCE"),
        ("x-amz-storage-class", "GLACIER"),
        ("x-amz-website-redirect-location", "/x"),
        ("x-amz-write-offset-bytes", "4"),
        ("x-amz-checksum-crc32c", "AAAAAA=="),
        ("x-amz-content-sha256", "STREAMING-UNSIGNED-PAYLOAD-TRAILER"),
        ("if-match", '"other"'),
    ],
)
def test_headers_that_would_change_the_meaning_are_refused(running: EmbeddedProcess, name: str, value: str) -> None:
    put(running, "headed.png")
    assert signed(running, "PUT", "headed.png", {}, **{name: value})[0] == 501
    assert get(running, "headed.png") == DATA
    assert signed(running, "PUT", "twin.png", {}, x_amz_acl="private", x_amz_meta_a="b")[0] == 200


@pytest.mark.parametrize(
    "query", ["versioning", "tagging", "cors", "lifecycle", "acl", "encryption", "object-lock", "new"]
)
def test_buckets_have_no_more_than_is_known(running: EmbeddedProcess, query: str) -> None:
    link = sdk(running).get_presigned_url("GET", OUTPUTS, "x").replace("/x?", "?")
    for method in ("GET", "PUT", "DELETE"):
        link = sdk(running).get_presigned_url(method, OUTPUTS, "x", extra_query_params={query: ""})
        assert urlsplit(link).path == "/fleet-outputs/x"
    with pytest.raises(S3Error, match="NotImplemented"):
        sdk(running)._execute("PUT", OUTPUTS, body=b"<x/>", query_params={query: ""})
    with pytest.raises(S3Error, match="NotImplemented"):
        sdk(running)._execute("GET", OUTPUTS, query_params={query: ""})
    assert sdk(running).bucket_exists(OUTPUTS)


def test_a_body_that_is_not_what_was_signed_is_not_stored(running: EmbeddedProcess) -> None:
    put(running, "signed.png")
    client = sdk(running)
    real = client._http.urlopen

    def tampered(method: str, url: str, body: bytes | None = None, **rest: Any) -> Any:
        return real(method, url, body=b"X" + body[1:] if body else body, **rest)

    client._http.urlopen = tampered  # type: ignore[assignment]
    with pytest.raises(S3Error, match="XAmzContentSHA256Mismatch"):
        client.put_object(OUTPUTS, "signed.png", io.BytesIO(b"other"), 5)
    assert get(running, "signed.png") == DATA
    for name in ("Content-MD5", "x-amz-checksum-sha256", "x-amz-checksum-crc32", "x-amz-checksum-sha1"):
        assert signed(running, "PUT", "signed.png", {}, **{name: "AAAA"}) == (400, "BadDigest")
    assert get(running, "signed.png") == DATA


def test_names_that_files_could_not_have_are_fine(running: EmbeddedProcess) -> None:
    """A name that is a folder to another, longer than a file's name may be, or our own bookkeeping's."""
    for key in ("p", "p/q", "p/q/r", "x" * 1024, "objects.sqlite", "blobs/aa/b", "a.json", "a.json/b", ".tmp.1"):
        put(running, key, key.encode())
    for key in ("p", "p/q", "p/q/r", "x" * 1024, "objects.sqlite", "blobs/aa/b", "a.json", "a.json/b", ".tmp.1"):
        assert get(running, key) == key.encode()


def test_a_put_may_ask_that_nothing_is_replaced(running: EmbeddedProcess) -> None:
    assert signed(running, "PUT", "first.png", {}, If_None_Match="*")[0] == 200
    assert signed(running, "PUT", "first.png", {}, If_None_Match="*") == (412, "PreconditionFailed")
    assert get(running, "first.png") == b"<Tagging/>"


async def test_a_file_changed_on_the_disk_is_not_verified(own: EmbeddedProcess, tmp_path: Path) -> None:
    """Rotten bytes on the server's disk: its checksum is of what is there, so no local file is deleted for them."""
    store = S3Store(S3Config(own.endpoint, ACCESS, SECRET), LIMITS)
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100_000))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (await store.put(OUTPUTS, "rot.png", path, sha256=sha256)).sha256_verified
    (blob,) = (tmp_path / "s3" / "blobs").glob("*/*")
    with blob.open("r+b") as file:
        file.seek(5000)
        file.write(b"rot")
    assert not await store.verify(OUTPUTS, "rot.png", size=100_000, sha256=sha256, path=path)
    assert not await store.verify(OUTPUTS, "rot.png", size=100_000, sha256=sha256)
    blob.write_bytes(path.read_bytes()[:50_000])
    assert not await store.verify(OUTPUTS, "rot.png", size=100_000, sha256=sha256, path=path)
    blob.write_bytes(path.read_bytes())
    assert await store.verify(OUTPUTS, "rot.png", size=100_000, sha256=sha256, path=path)
    await store.aclose()


def test_what_was_acknowledged_survives_kill_9_and_nothing_half_stays(own: EmbeddedProcess, tmp_path: Path) -> None:
    """SIGKILL in the middle of puts and overwrites, three times: each object is one of those acknowledged or tried."""
    tried: dict[str, set[bytes]] = {}
    kept: dict[str, bytes] = {}
    stopped = False

    def writer(number: int) -> None:
        client = sdk(own)
        for count in range(10_000):
            if stopped:
                return
            key, data = f"{number}/{count % 5}", os.urandom(30_000)
            tried.setdefault(key, set()).add(data)
            try:
                client.put_object(OUTPUTS, key, io.BytesIO(data), len(data))
            except (MinioException, HTTPError, OSError):
                kept.pop(key, None)
                continue
            kept[key] = data

    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(writer, number) for number in range(4)]
        for _ in range(3):
            before = sum(map(len, tried.values()))
            while sum(map(len, tried.values())) < before + 40:
                assert not any(one.done() for one in done)
                os.sched_yield()
            own.stop()
            own.start()
        stopped = True
        for one in done:
            one.result()
    own.stop()
    own.start()
    for key, data in kept.items():
        assert get(own, key) == data, key
    for key, candidates in tried.items():
        seen = next((one for one in sdk(own).list_objects(OUTPUTS, prefix=key)), None)
        if seen is not None:
            assert get(own, key) in candidates
    objects = len(list(sdk(own).list_objects(OUTPUTS, recursive=True)))
    assert len(list((tmp_path / "s3" / "blobs").glob("*/*"))) == objects


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    with EmbeddedProcess(tmp_path / "s3", floor_bytes=free.f_bavail * free.f_frsize * 2) as process:
        sdk(process).make_bucket(OUTPUTS)
        with pytest.raises(S3Error, match="XMinioStorageFull"):
            put(process, "full.png")
        assert list(sdk(process).list_objects(OUTPUTS)) == []
        assert list((tmp_path / "s3" / "blobs").glob("*/*")) == []


def test_parts(running: EmbeddedProcess) -> None:
    client = sdk(running)
    upload_id = client._create_multipart_upload(
        OUTPUTS, "parts.bin", {"Content-Type": "video/mp4", "x-amz-meta-a": "b"}
    )
    first, second = os.urandom(5 << 20), os.urandom(100)
    etags = [
        client._upload_part(OUTPUTS, "parts.bin", data, None, upload_id, n) for n, data in ((1, first), (2, second))
    ]
    assert [one.upload_id for one in client._list_multipart_uploads(OUTPUTS).uploads] == [upload_id]
    assert [part.etag for part in client._list_parts(OUTPUTS, "parts.bin", upload_id).parts] == etags
    from minio.datatypes import Part

    for wrong, code in (
        ([Part(1, etags[0]), Part(2, "0" * 32)], "InvalidPart"),
        ([Part(1, etags[0]), Part(3, etags[1])], "InvalidPart"),
        ([Part(2, etags[1]), Part(1, etags[0])], "InvalidPartOrder"),
    ):
        with pytest.raises(S3Error, match=code):
            client._complete_multipart_upload(OUTPUTS, "parts.bin", upload_id, wrong)
    with pytest.raises(S3Error, match="NoSuchUpload"):
        client._upload_part(OUTPUTS, "another.bin", second, None, upload_id, 1)
    client._complete_multipart_upload(OUTPUTS, "parts.bin", upload_id, [Part(1, etags[0]), Part(2, etags[1])])
    assert get(running, "parts.bin") == first + second
    seen = client.stat_object(OUTPUTS, "parts.bin")
    assert (seen.content_type, dict(seen.metadata or {})["x-amz-meta-a"]) == ("video/mp4", "b")
    again = client._create_multipart_upload(OUTPUTS, "parts.bin", {})
    client._abort_multipart_upload(OUTPUTS, "parts.bin", again)
    assert client._list_multipart_uploads(OUTPUTS).uploads == []
    assert get(running, "parts.bin") == first + second


def test_ten_thousand_objects_are_listed_in_order_in_ten_requests(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.add_bucket(OUTPUTS, 1)
    row = (OUTPUTS, "", 1, "e" * 32, 1, 1, "{}")
    with shelf._change() as db:
        names = [f"{hashlib.sha256(str(n).encode()).hexdigest()[:20]}.png" for n in range(10_000)]
        db.executemany(
            "INSERT INTO objects VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [(row[0], name, *row[1:]) for name in names]
        )
    seen: list[str] = []
    while page := shelf.keys(OUTPUTS, "", seen[-1] if seen else "", 1000):
        seen += [item.key for item in page]
    assert seen == sorted(names)
    shelf.close()


# The child process.


@pytest.fixture
async def child(tmp_path: Path) -> AsyncIterator[EmbeddedS3]:
    one = EmbeddedS3(tmp_path / "s3", bind("127.0.0.1", 0, "s3-port"), access_key=ACCESS, secret_key=SECRET)
    await one.start()
    yield one
    await one.stop()


async def test_a_killed_child_is_back_on_its_port_with_its_objects(child: EmbeddedS3) -> None:
    store = S3Store(S3Config(f"http://127.0.0.1:{child.port}", ACCESS, SECRET), LIMITS)
    await store.open()
    async with asyncio.timeout(50):
        await store.wait_well()
    await store.put(OUTPUTS, "a.png", DATA)
    pid = child.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: child.restarts == 1)
    assert await store.read(OUTPUTS, "a.png", limit=100) == DATA
    command = await asyncio.to_thread(psutil.Process(child.pid).cmdline)
    assert SECRET not in " ".join(command)
    await store.aclose()


OWNER = """
import asyncio, fcntl, os, sys
from pathlib import Path
from fleet_server.embedded.s3 import EmbeddedS3
from fleet_server.http import bind
async def main():
    folder = Path(sys.argv[1])
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    sockets = bind("127.0.0.1", 0, "s3-port")
    server = EmbeddedS3(folder / "s3", sockets, access_key="abc", secret_key="def", lock_fds=[lock])
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_it_holds_the_lock_and_ends_with_its_owner(tmp_path: Path) -> None:
    owner = await asyncio.to_thread(
        subprocess.Popen, [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    try:
        pid = int(await asyncio.to_thread(owner.stdout.readline))
        assert await asyncio.to_thread(_held, tmp_path / "lock")
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    await wait_until(lambda: not _held(tmp_path / "lock"))
    # Its files are closed a moment before it has ended.
    await wait_until(lambda: has_ended(pid))


def _held(path: Path) -> bool:
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
