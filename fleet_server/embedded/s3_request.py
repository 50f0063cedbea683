"""A call to the embedded S3 as it came: what it asks for, who asks, and a body that is checked while it is read."""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from nanio.auth.chunked import decode_aws_chunked  # type: ignore[import-untyped]
from nanio.auth.sigv4 import (  # type: ignore[import-untyped]
    STREAMING_PAYLOAD,
    VerifiedRequest,
    parse_authorization_header,
    verify_header_auth,
    verify_presigned_url,
)
from nanio.errors import S3Error  # type: ignore[import-untyped]
from nanio.keys import validate_bucket_name, validate_object_key  # type: ignore[import-untyped]

from fleet_server.embedded.s3_answers import Refusal, not_implemented

_KEPT = ("content-type", "content-encoding", "content-disposition", "cache-control", "content-language", "expires")
_META = "x-amz-meta-"
_META_BYTES = 2048
_HARMLESS = frozenset(
    {
        "x-amz-checksum-algorithm",
        "x-amz-checksum-crc32",
        "x-amz-checksum-mode",
        "x-amz-checksum-sha1",
        "x-amz-checksum-sha256",
        "x-amz-checksum-type",
        "x-amz-content-sha256",
        "x-amz-copy-source",
        "x-amz-date",
        "x-amz-decoded-content-length",
        "x-amz-metadata-directive",
        "x-amz-request-payer",
        "x-amz-sdk-checksum-algorithm",
        "x-amz-te",
        "x-amz-user-agent",
    }
)
"""Headers that we do what they say, or that say nothing. All others of `x-amz-` are refused, never overlooked."""
_DEFAULTS = {"x-amz-acl": "private", "x-amz-storage-class": "STANDARD", "x-amz-bucket-object-lock-enabled": "false"}


@dataclass(frozen=True, slots=True)
class Call:
    """Method and target. `query` is decoded; of a name given twice the last counts. Header names are lower-case."""

    method: str
    path: str
    raw_path: str
    raw_query: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    bucket: str
    key: str

    @classmethod
    def of(cls, scope: Mapping[str, Any]) -> Call:
        """Reads an ASGI scope. Raises Refusal for names that cannot be."""
        raw_path = (scope.get("raw_path") or scope["path"].encode()).partition(b"?")[0]
        path = _decoded(raw_path)
        bucket, _, key = path.removeprefix("/").partition("/")
        raw_query = scope["query_string"].decode("latin-1")
        query = {}
        for pair in filter(None, raw_query.split("&")):
            name, _, value = pair.replace("+", "%20").partition("=")
            query[_decoded(name.encode())] = _decoded(value.encode())
        headers: dict[str, str] = {}
        for raw_name, raw_value in scope["headers"]:
            name = raw_name.decode("latin-1").lower()
            if name in headers and name.startswith(("x-amz-", "content-", "host", "authorization")):
                raise Refusal(400, "InvalidRequest", f"the header {name} came twice")
            headers[name] = raw_value.decode("latin-1")
        try:
            if bucket:
                validate_bucket_name(bucket)
            if key:
                validate_object_key(key)
        except S3Error as error:
            raise Refusal(error.http_status, error.code, error.message_text) from None
        return cls(scope["method"], path, raw_path.decode("latin-1"), raw_query, query, headers, bucket, key)

    @property
    def signed(self) -> bool:
        """Whether it claims to be from somebody."""
        return "authorization" in self.headers or bool(
            {"X-Amz-Algorithm", "X-Amz-Signature", "AWSAccessKeyId", "Signature"} & set(self.query)
        )

    def verify(self, keys: Mapping[str, str]) -> VerifiedRequest:
        """Checks the signature (version 4, in the header or the query). Raises Refusal."""
        if "AWSAccessKeyId" in self.query or self.headers.get("authorization", "").startswith("AWS "):
            raise Refusal(
                400,
                "InvalidRequest",
                "signatures of version 2 are not supported: use AWS4-HMAC-SHA256 (boto3: signature_version='s3v4')",
            )
        common = {
            "method": self.method,
            "path": self.raw_path,
            "query": self.raw_query,
            "headers": dict(self.headers),
            "secret_lookup": keys.get,
        }
        try:
            if "authorization" in self.headers:
                return verify_header_auth(**common)
            return verify_presigned_url(**common)
        except S3Error as error:
            raise Refusal(error.http_status, error.code, error.message_text) from None

    def refuse_unknown_headers(self) -> None:
        """Raises a 501 for what would change the meaning of the call and is not done here."""
        for name, value in self.headers.items():
            if not name.startswith("x-amz-") or name in _HARMLESS or name.startswith(_META):
                continue
            if _DEFAULTS.get(name, "").lower() != value.lower() or not value:
                raise not_implemented(f"the header {name}")
        if self.headers.get("x-amz-content-sha256", "").startswith("STREAMING-") and not self.streaming:
            raise not_implemented(f"x-amz-content-sha256: {self.headers['x-amz-content-sha256']}")

    @property
    def streaming(self) -> bool:
        """Whether the body comes in signed chunks."""
        return self.headers.get("x-amz-content-sha256") == str(STREAMING_PAYLOAD)

    def kept_headers(self) -> dict[str, str]:
        """What of the headers belongs to the object."""
        kept = {name.title(): self.headers[name] for name in _KEPT if name in self.headers}
        if self.streaming:
            coding = [word.strip() for word in kept.pop("Content-Encoding", "").split(",")]
            rest = ",".join(word for word in coding if word not in ("", "aws-chunked"))
            kept |= {"Content-Encoding": rest} if rest else {}
        kept.setdefault("Content-Type", "application/octet-stream")
        meta = {name: value for name, value in self.headers.items() if name.startswith(_META)}
        if sum(len(name) + len(value) for name, value in meta.items()) > _META_BYTES:
            raise Refusal(400, "MetadataTooLarge", "Your metadata headers exceed the maximum allowed metadata size.")
        return {**kept, **meta}

    def length(self) -> int | None:
        """How long the body will be, where it says so."""
        given = self.headers.get("x-amz-decoded-content-length") or self.headers.get("content-length")
        return int(given) if given is not None and given.isdecimal() else None


class Sums:
    """What a call says about its body, held against what came."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._expected: list[tuple[str, Any, bytes]] = []
        for name, hasher in (
            ("md5", "content-md5"),
            ("sha1", "x-amz-checksum-sha1"),
            ("sha256", "x-amz-checksum-sha256"),
        ):
            if hasher in headers:
                self._expected.append((hasher, hashlib.new(name, usedforsecurity=False), _base64(headers[hasher])))
        payload = headers.get("x-amz-content-sha256", "")
        if len(payload) == 64:
            self._expected.append(("x-amz-content-sha256", hashlib.sha256(), _hex(payload)))
        self._crc32 = 0
        self._wanted_crc32 = _base64(headers["x-amz-checksum-crc32"]) if "x-amz-checksum-crc32" in headers else None

    def update(self, data: bytes) -> None:
        """The next bytes."""
        for _, hasher, _ in self._expected:
            hasher.update(data)
        if self._wanted_crc32 is not None:
            self._crc32 = zlib.crc32(data, self._crc32)

    def check(self) -> None:
        """Raises BadDigest, or XAmzContentSHA256Mismatch, where the bytes are others than was said."""
        for name, hasher, wanted in self._expected:
            if hasher.digest() != wanted:
                code = "XAmzContentSHA256Mismatch" if name == "x-amz-content-sha256" else "BadDigest"
                raise Refusal(400, code, f"the body is not what {name} says")
        if self._wanted_crc32 is not None and self._crc32.to_bytes(4, "big") != self._wanted_crc32:
            raise Refusal(400, "BadDigest", "the body is not what x-amz-checksum-crc32 says")


async def body_of(call: Call, receive: Any, verified: VerifiedRequest | None) -> AsyncIterator[bytes]:
    """The body as it comes, without the frames of signed chunks. Raises Refusal where the caller goes away."""

    ended = False

    async def source() -> bytes:
        nonlocal ended
        data = b""
        while not data and not ended:
            message = await receive()
            if message["type"] != "http.request":
                raise Refusal(400, "IncompleteBody", "the connection was closed before the whole body had come")
            data = message.get("body") or b""
            ended = not message.get("more_body")
        return data

    if call.streaming and verified is not None:
        parts = parse_authorization_header(call.headers["authorization"])
        decoded = decode_aws_chunked(
            source,
            signing_key=verified.signing_key,
            seed_signature=verified.seed_signature,
            amz_date=call.headers.get("x-amz-date", ""),
            scope=parts.credential_scope,
        )
        try:
            async for chunk in decoded:
                yield chunk
        except S3Error as error:
            raise Refusal(error.http_status, error.code, error.message_text) from None
        return
    while data := await source():
        yield data


def _decoded(raw: bytes) -> str:
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise Refusal(400, "InvalidURI", "names are UTF-8") from None


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise Refusal(400, "InvalidDigest", "a checksum is not base64") from None


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise Refusal(400, "InvalidDigest", "x-amz-content-sha256 is not hex") from None
