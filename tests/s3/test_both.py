"""What the fleet needs of an S3 server, shown on two: the embedded one and Ceph's RADOS gateway.

Where they differ the tests ask tests/s3/differences.py, which gives the reason.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from minio import Minio
from minio.commonconfig import Tags
from minio.error import S3Error

from fleet_server.domain.errors import FleetError
from fleet_server.storage.buckets import BUCKETS, LORAS, MODELS, OUTPUTS, WORKSPACE
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import NoObjectError, S3Config
from tests.s3.conftest import LIMITS, Server
from tests.s3.differences import DIFFERENCES

MIB = 1 << 20


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def raw(server: Server, method: str, target: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A call without a signature, its target sent as it stands."""
    connection = http.client.HTTPConnection(urlsplit(server.endpoint).netloc, timeout=50)
    try:
        connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(b"stolen" if method in ("PUT", "POST") else None)
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def minio(server: Server, secret: str | None = None) -> Minio:
    config = server.config
    return Minio(
        urlsplit(config.endpoint).netloc,
        access_key=config.access_key,
        secret_key=secret or config.secret_key,
        region="us-east-1",
        secure=False,
    )


def put(server: Server, bucket: str, key: str, data: bytes, content_type: str = "image/png") -> None:
    minio(server).put_object(bucket, key, io.BytesIO(data), len(data), content_type=content_type)


# The reference.


def test_the_boto3_example_of_the_reference_runs_verbatim(server: Server, tmp_path: Path) -> None:
    text = (Path(__file__).parent / "boto3_example.py.txt").read_text()
    (tmp_path / "local.png").write_bytes(b"what was here")
    put(server, OUTPUTS, "image.png", b"what was there")
    environment = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true"}
    program = text.replace("http://192.168.1.214:9010", server.endpoint)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "image.png" in done.stdout.split()
    assert minio(server).get_object(OUTPUTS, "remote.png").read() == b"what was here"
    assert (tmp_path / "local.png").read_bytes() == b"what was there"


def test_the_four_buckets_are_there_and_outputs_are_read_by_their_direct_url(server: Server) -> None:
    assert {bucket.name for bucket in minio(server).list_buckets()} >= set(BUCKETS)
    put(server, OUTPUTS, "comfyui/direct.png", b"0123456789")
    status, headers, body = raw(server, "GET", "/fleet-outputs/comfyui/direct.png")
    assert (status, headers["content-type"], body) == (200, "image/png", b"0123456789")
    status, headers, body = raw(server, "HEAD", "/fleet-outputs/comfyui/direct.png")
    assert (status, headers["content-length"], body) == (200, "10", b"")
    etag = headers["etag"]
    assert etag == f'"{hashlib.md5(b"0123456789").hexdigest()}"'
    for wanted, got, said in (
        ("2-4", b"234", "2-4"),
        ("7-", b"789", "7-9"),
        ("-3", b"789", "7-9"),
        ("5-99", b"56789", "5-9"),
    ):
        status, headers, body = raw(server, "GET", "/fleet-outputs/comfyui/direct.png", Range=f"bytes={wanted}")
        assert (status, body, headers["content-range"]) == (206, got, f"bytes {said}/10")
    assert raw(server, "GET", "/fleet-outputs/comfyui/direct.png", Range="bytes=10-")[0] == 416
    assert raw(server, "GET", "/fleet-outputs/comfyui/direct.png", If_None_Match=etag)[::2] == (304, b"")
    assert raw(server, "GET", "/fleet-outputs/comfyui/direct.png", If_Match='"other"')[0] == 412


# Attacks, each beside what is allowed.


def test_nobody_lists_without_keys_and_the_owner_does(server: Server) -> None:
    put(server, OUTPUTS, "listed.png", b"x")
    for bucket in BUCKETS:
        for query in ("", "/", "?list-type=2", "?list-type=2&prefix=l", "?uploads", "?policy", "?location", "?acl"):
            status, _, body = raw(server, "GET", f"/{bucket}{query}")
            assert status == 403 and b"listed" not in body, query
    status, _, body = raw(server, "GET", "/")
    assert status == server.differs("anonymous GET of /") and b"fleet-" not in body
    assert "listed.png" in [one.object_name for one in minio(server).list_objects(OUTPUTS)]


def test_nobody_reads_private_buckets_without_keys_and_the_owner_does(server: Server) -> None:
    for bucket in (MODELS, LORAS, WORKSPACE):
        put(server, bucket, "secret.bin", b"private")
        for method in ("GET", "HEAD"):
            status, _, body = raw(server, method, f"/{bucket}/secret.bin")
            assert status == 403 and b"private" not in body
        assert minio(server).get_object(bucket, "secret.bin").read() == b"private"


@pytest.mark.parametrize("method", ["PUT", "POST", "DELETE"])
def test_nobody_writes_without_keys_and_the_owner_does(server: Server, method: str) -> None:
    put(server, OUTPUTS, "kept.png", b"kept")
    for target in (
        "/fleet-outputs/kept.png",
        "/fleet-outputs/new.png",
        "/fleet-outputs",
        "/fleet-outputs?delete",
        "/evil",
    ):
        status, _, _ = raw(server, method, target, Content_Length="6" if method != "DELETE" else "0")
        # A bucket that is not there may be called missing.
        assert status in (400, 403, 405, 411, 412) or (target == "/evil" and status == 404), target
    assert minio(server).get_object(OUTPUTS, "kept.png").read() == b"kept"
    assert "new.png" not in [one.object_name for one in minio(server).list_objects(OUTPUTS)]
    put(server, OUTPUTS, "kept.png", b"changed by its owner")
    assert raw(server, "GET", "/fleet-outputs/kept.png")[2] == b"changed by its owner"


@pytest.mark.parametrize(
    "target",
    [
        "/fleet-outputs/../fleet-models/hidden.bin",
        "/fleet-outputs/%2e%2e/fleet-models/hidden.bin",
        "/fleet-outputs/..%2ffleet-models%2fhidden.bin",
        "/fleet-outputs//../fleet-models/hidden.bin",
        "//fleet-models/hidden.bin",
        "/fleet-outputs/%2Fetc%2Fpasswd",
        "/fleet-outputs/../../../../etc/passwd",
        "/fleet-outputs/..%5c..%5cetc%5cpasswd",
        "/fleet-outputs/hidden.bin%00.png",
        "/fleet-outputs/" + "a" * 2000,
    ],
)
def test_no_path_leads_out_of_the_public_bucket(server: Server, target: str) -> None:
    put(server, MODELS, "hidden.bin", b"weights")
    put(server, OUTPUTS, "a..b/..c.png", b"allowed twin")
    status, _, body = raw(server, "GET", target)
    assert status in (400, 403, 404) and b"weights" not in body and b"root:" not in body
    assert raw(server, "GET", "/fleet-outputs/a..b/..c.png")[2] == b"allowed twin"


def test_a_missing_public_object(server: Server) -> None:
    status, _, _ = raw(server, "GET", "/fleet-outputs/never-there.png")
    assert status == server.differs("missing public object, anonymous")


def test_wrong_keys_and_changed_links_are_refused_and_right_ones_are_not(server: Server) -> None:
    put(server, MODELS, "linked.bin", b"linked")
    with pytest.raises(S3Error, match="SignatureDoesNotMatch"):
        minio(server, secret="wrong-secret").get_object(MODELS, "linked.bin")
    link = minio(server).presigned_get_object(MODELS, "linked.bin", expires=timedelta(minutes=5))
    target = link.removeprefix(server.endpoint)
    assert raw(server, "GET", target)[::2] == (200, b"linked")
    for changed in (
        target.replace("linked.bin", "secret.bin"),
        target.replace("Expires=300", "Expires=3000"),
        target[:-1],
    ):
        assert raw(server, "GET", changed)[0] in (400, 403)
    assert raw(server, "PUT", target, Content_Length="6")[0] == 403
    upload = minio(server).presigned_put_object(MODELS, "sent.bin", expires=timedelta(minutes=5))
    assert raw(server, "PUT", upload.removeprefix(server.endpoint), Content_Length="6")[0] == 200
    assert minio(server).get_object(MODELS, "sent.bin").read() == b"stolen"


def test_a_link_of_version_2(server: Server) -> None:
    put(server, MODELS, "old.bin", b"old")
    import boto3  # type: ignore[import-untyped]

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.config.access_key,
        aws_secret_access_key=server.config.secret_key,
        region_name="us-east-1",
    )
    link = client.generate_presigned_url("get_object", {"Bucket": MODELS, "Key": "old.bin"})
    assert raw(server, "GET", link.removeprefix(server.endpoint))[0] == server.differs(
        "presigned by signature version 2"
    )
    client.close()


def test_tags_and_acls_never_touch_the_bytes(server: Server) -> None:
    put(server, OUTPUTS, "tagged.png", b"the picture itself")
    tags = Tags.new_object_tags()
    tags["a"] = "b"
    expected = server.differs("tagging of an object")
    try:
        minio(server).set_object_tags(OUTPUTS, "tagged.png", tags)
        assert expected == 200
    except S3Error as error:
        assert (error.code, expected) == ("NotImplemented", 501)
    acl = minio(server).get_presigned_url("GET", OUTPUTS, "tagged.png", extra_query_params={"acl": ""})
    assert raw(server, "GET", acl.removeprefix(server.endpoint))[0] == server.differs("acl of an object")
    assert raw(server, "GET", "/fleet-outputs/tagged.png")[2] == b"the picture itself"


async def test_policies_are_put_right_at_start(server: Server) -> None:
    """Somebody made outputs listable and models public: that goes; a named user's statement stays."""
    policy = """{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"AWS": ["*"]},
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": ["arn:aws:s3:::%(b)s", "arn:aws:s3:::%(b)s/*"]}]}"""
    put(server, MODELS, "open.bin", b"open")
    for bucket in (MODELS, OUTPUTS):
        try:
            minio(server).set_bucket_policy(bucket, policy % {"b": bucket})
            assert server.differs("policy of a private bucket") == 204
            assert raw(server, "GET", f"/{bucket}?list-type=2")[0] == 200
        except S3Error as error:
            assert (error.code, server.differs("policy of a private bucket")) == ("NotImplemented", 501)
    store = S3Store(server.config, LIMITS)
    await store.open()
    await store.wait_well()
    for bucket in (MODELS, OUTPUTS):
        assert raw(server, "GET", f"/{bucket}?list-type=2")[0] == 403
    assert raw(server, "GET", "/fleet-models/open.bin")[0] == 403
    put(server, OUTPUTS, "open.png", b"open")
    assert raw(server, "GET", "/fleet-outputs/open.png")[0] == 200
    assert bool(store.notices()) == (server.name == "rgw")
    await store.aclose()
    again = S3Store(server.config, LIMITS)
    await again.open()
    await again.wait_well()
    assert again.notices() == []
    await again.aclose()


# The store.


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 5 * MIB + 1, 12 * MIB])
async def test_what_is_put_is_proven_and_comes_back(store: S3Store, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    stored = await store.put(
        WORKSPACE, f"round/{size}", path, content_type="video/mp4", sha256=sha(data), metadata={"seed": "42"}
    )
    assert (stored.size_bytes, stored.sha256, stored.sha256_verified) == (size, sha(data), True)
    seen = await store.stat(WORKSPACE, f"round/{size}")
    assert seen is not None
    assert (seen.size_bytes, seen.etag, seen.content_type) == (size, stored.etag, "video/mp4")
    assert seen.metadata["seed"] == "42"
    assert ("-" in stored.etag) == (size > LIMITS.part_bytes)
    read = b"".join([chunk async for chunk in store.stream(WORKSPACE, f"round/{size}")])
    assert read == data
    assert await store.verify(WORKSPACE, f"round/{size}", size=size, sha256=sha(data), path=path)
    assert await store.verify(WORKSPACE, f"round/{size}", size=size, sha256=sha(data))


async def test_a_corrupted_object_is_not_taken_for_the_file(store: S3Store, tmp_path: Path) -> None:
    """Other bytes of the same length, with metadata that claim the old hash, are found out."""
    data = os.urandom(2 * MIB)
    path = tmp_path / "file"
    path.write_bytes(data)
    assert (await store.put(OUTPUTS, "rotten.png", path, sha256=sha(data))).sha256_verified
    changed = bytearray(data)
    changed[MIB] ^= 1
    await store.put(OUTPUTS, "rotten.png", bytes(changed), metadata={"sha256": sha(data)})
    known = {"size": len(data), "sha256": sha(data)}
    assert not await store.verify(OUTPUTS, "rotten.png", path=path, **known)  # type: ignore[arg-type]
    assert not await store.verify(OUTPUTS, "rotten.png", **known)  # type: ignore[arg-type]
    assert await store.verify(OUTPUTS, "rotten.png", size=len(data), sha256=sha(bytes(changed)))
    assert not await store.verify(OUTPUTS, "missing.png", path=path, **known)  # type: ignore[arg-type]
    await store.put(OUTPUTS, "rotten.png", data)
    path.write_bytes(changed)
    assert not await store.verify(OUTPUTS, "rotten.png", path=path, **known)  # type: ignore[arg-type]


async def test_a_file_with_another_hash_than_recorded_is_not_called_verified(store: S3Store) -> None:
    stored = await store.put(OUTPUTS, "other.png", b"other bytes", sha256=sha(b"the bytes"))
    assert not stored.sha256_verified
    assert "hash" in stored.detail


async def test_ranges(store: S3Store) -> None:
    data = os.urandom(3 * MIB)
    await store.put(OUTPUTS, "ranges.bin", data)
    for start, end in ((0, None), (0, 1), (5, 5), (100, 2 * MIB), (3 * MIB - 1, None), (MIB, 99 * MIB)):
        read = b"".join([chunk async for chunk in store.stream(OUTPUTS, "ranges.bin", start, end)])
        assert read == data[start:end]
    with pytest.raises(FleetError, match="InvalidRange"):
        _ = [chunk async for chunk in store.stream(OUTPUTS, "ranges.bin", 3 * MIB)]
    assert await store.read(OUTPUTS, "ranges.bin", limit=3 * MIB) == data
    with pytest.raises(FleetError, match="more than"):
        await store.read(OUTPUTS, "ranges.bin", limit=3 * MIB - 1)


async def test_what_is_not_there(store: S3Store) -> None:
    assert await store.stat(OUTPUTS, "no.png") is None
    with pytest.raises(NoObjectError):
        await store.read(OUTPUTS, "no.png", limit=10)
    with pytest.raises(NoObjectError):
        await store.copy((OUTPUTS, "no.png"), (OUTPUTS, "new.png"))
    await store.delete(OUTPUTS, "no.png")
    for key in ("", "../x", "a//b", "/a", "a\nb", "k" * 1025, "\udcff"):
        assert await store.stat(OUTPUTS, key) is None
        with pytest.raises(FleetError, match="key"):
            await store.put(OUTPUTS, key, b"x")
    assert store.status == (True, None)


async def test_lists_are_in_the_order_of_bytes_and_pages_miss_nothing(store: S3Store) -> None:
    keys = [f"list/{name}" for name in ("a", "a-1", "a.png", "a/b", "a/c/d", "a0", "b", "é", "\U0001f600")]
    for key in reversed(keys):
        await store.put(WORKSPACE, key, key.encode())
    assert [one.key for one in await store.list(WORKSPACE, "list/")] == keys
    assert [one.key for one in await store.list(WORKSPACE, "list/a/")] == ["list/a/b", "list/a/c/d"]
    seen: list[str] = []
    while page := await store.list(WORKSPACE, "list/", seen[-1] if seen else "", 2):
        assert len(page) <= 2
        seen += [one.key for one in page]
    assert seen == keys
    first = (await store.list(WORKSPACE, "list/a", limit=1))[0]
    assert (first.size_bytes, first.etag) == (6, hashlib.md5(b"list/a").hexdigest())
    assert first.modified_ms > 1_500_000_000_000
    folders = {one.object_name for one in store._minio.list_objects(WORKSPACE, prefix="list/")}
    assert folders == {key for key in keys if "/" not in key[5:]} | {"list/a/"}


async def test_a_copy_and_the_end_of_its_source(store: S3Store, server: Server) -> None:
    data = os.urandom(6 * MIB)
    stored = await store.put(WORKSPACE, "source", data, content_type="image/webp", metadata={"seed": "7"})
    await store.copy((WORKSPACE, "source"), (LORAS, "to/target"))
    await store.delete(WORKSPACE, "source")
    assert await store.stat(WORKSPACE, "source") is None
    seen = await store.stat(LORAS, "to/target")
    assert seen is not None
    assert (seen.content_type, seen.metadata["seed"], seen.size_bytes) == ("image/webp", "7", len(data))
    whole = {"whole": hashlib.md5(data).hexdigest(), "as it was": stored.etag}
    assert seen.etag == whole[server.differs("etag of a copy")]
    assert await store.verify(LORAS, "to/target", size=len(data), sha256=sha(data))


@pytest.mark.parametrize(
    "key", ["a b+c&d=e.png", "percent%20%2F.png", "ünï/çödé \U0001f600.png", "q?x=1#y.png", "~!*'().png"]
)
async def test_names_of_all_kinds_have_a_url_that_works(store: S3Store, server: Server, key: str) -> None:
    await store.put(OUTPUTS, key, key.encode(), content_type="text/plain")
    url = store.url(OUTPUTS, key)
    assert url == f"{server.endpoint}/fleet-outputs/{quote(key)}"
    assert raw(server, "GET", url.removeprefix(server.endpoint))[::2] == (200, key.encode())
    assert await store.read(OUTPUTS, key, limit=1000) == key.encode()
    assert key in [one.key for one in await store.list(OUTPUTS, key[:3])]


async def test_wrong_keys_say_which(server: Server) -> None:
    config = server.config
    for access, secret, told in (
        ("minioadmin", "wrong", "secret key is wrong"),
        ("nobody", "wrong", "access key is unknown"),
    ):
        store = S3Store(S3Config(config.endpoint, access, secret), LIMITS)
        await store.open()
        await store.settled(10)
        well, detail = store.status
        assert not well and detail is not None and told in detail
        assert "FLEET_S3_SECRET_KEY" in detail and secret not in detail.split()
        with pytest.raises(FleetError, match=told):
            await store.stat(OUTPUTS, "x")
        await store.aclose()


def test_each_listed_difference_is_asked_for() -> None:
    text = Path(__file__).read_text()
    assert [what for what in DIFFERENCES if f'"{what}"' not in text] == []
