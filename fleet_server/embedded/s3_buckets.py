"""Buckets of the embedded S3: lists, policies, and what else is done with a bucket itself."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable

from nanio.errors import S3Error  # type: ignore[import-untyped]
from nanio.handlers._body import parse_xml_safely  # type: ignore[import-untyped]

from fleet_server.embedded.s3_answers import Answer, Refusal, contents, iso, name, no_bucket, not_implemented, tag, xml
from fleet_server.embedded.s3_objects import whole
from fleet_server.embedded.s3_request import Call
from fleet_server.embedded.s3_shelf import Item, Shelf
from fleet_server.storage.buckets import policy_for, public_statement

LIST_PARAMETERS = frozenset(
    {
        "continuation-token",
        "delimiter",
        "encoding-type",
        "fetch-owner",
        "list-type",
        "marker",
        "max-keys",
        "prefix",
        "start-after",
    }
)
_PAGE = 1000
_MAX_DELETE = 1000


class Buckets:
    """What can be done with buckets. `public` ones have the one policy that lets anybody read their objects."""

    def __init__(self, shelf: Shelf, *, clock: Callable[[], int], region: str, public: frozenset[str]) -> None:
        self._shelf = shelf
        self._clock = clock
        self._region = region
        self._public = public

    async def all(self) -> Answer:
        """Every bucket."""
        found = await asyncio.to_thread(self._shelf.buckets)
        inner = "".join(
            f"<Bucket>{tag('Name', bucket)}{tag('CreationDate', iso(created))}</Bucket>" for bucket, created in found
        )
        owner = "<Owner><ID>fleet</ID><DisplayName>fleet</DisplayName></Owner>"
        return xml("ListAllMyBucketsResult", f"{owner}<Buckets>{inner}</Buckets>")

    async def itself(self, call: Call) -> Answer:
        """HEAD, PUT and DELETE of a bucket."""
        if call.method == "PUT":
            if not await asyncio.to_thread(self._shelf.add_bucket, call.bucket, self._clock()):
                raise Refusal(409, "BucketAlreadyOwnedByYou", "The bucket is there and yours.")
            return Answer(headers={"Location": f"/{call.bucket}"})
        await self._there(call)
        if call.method == "DELETE":
            if not await asyncio.to_thread(self._shelf.drop_bucket, call.bucket):
                raise Refusal(409, "BucketNotEmpty", "The bucket you tried to delete is not empty.")
            return Answer(204)
        return Answer(headers={"x-amz-bucket-region": self._region})

    async def location(self, call: Call) -> Answer:
        """The bucket's region."""
        await self._there(call)
        return xml("LocationConstraint", "" if self._region == "us-east-1" else self._region)

    async def policy(self, call: Call, body: AsyncIterator[bytes]) -> Answer:
        """The policy in force may be read, and set to what it is; no other can be had."""
        await self._there(call)
        ours = None
        if call.bucket in self._public:
            ours = json.dumps({"Version": "2012-10-17", "Statement": [public_statement(call.bucket)]})
        if call.method == "GET":
            if ours is None:
                raise Refusal(404, "NoSuchBucketPolicy", "The bucket policy does not exist")
            return Answer(body=ours.encode(), headers={"Content-Type": "application/json"})
        if call.method == "DELETE" and ours is None:
            return Answer(204)
        if call.method == "PUT" and ours is not None:
            given = (await whole(call, body)).decode("utf-8", "replace")
            if _statements(given) == 1 and policy_for(call.bucket, given)[0] == given:
                return Answer(204)
        raise not_implemented("any policy but public-read for objects of fleet-outputs")

    async def delete_many(self, call: Call, body: AsyncIterator[bytes]) -> Answer:
        """Removes up to 1,000 objects."""
        await self._there(call)
        try:
            root = parse_xml_safely(await whole(call, body))
            objects = [one for one in root if one.tag.split("}")[-1] == "Object"]
            keys = ["".join(child.text or "" for child in one if child.tag.split("}")[-1] == "Key") for one in objects]
        except S3Error:
            raise Refusal(400, "MalformedXML", "the list of keys cannot be read") from None
        if len(keys) > _MAX_DELETE or not all(keys):
            raise Refusal(400, "MalformedXML", "1 to 1000 keys, none empty")
        if any(child.tag.split("}")[-1] == "VersionId" for one in objects for child in one):
            raise not_implemented("a version of an object")
        for key in keys:
            await asyncio.to_thread(self._shelf.delete, call.bucket, key)
        return xml("DeleteResult", "".join(f"<Deleted>{tag('Key', key)}</Deleted>" for key in keys))

    async def uploads(self, call: Call) -> Answer:
        """Uploads in parts that have not ended."""
        await self._there(call)
        found = await asyncio.to_thread(self._shelf.uploads, call.bucket)
        encode = call.query.get("encoding-type") == "url"
        inner = tag("Bucket", call.bucket) + tag("MaxUploads", _PAGE) + tag("IsTruncated", "false")
        if encode:
            inner += tag("EncodingType", "url")
        for upload in found:
            if upload.key.startswith(call.query.get("prefix", "")):
                inner += (
                    "<Upload>"
                    + tag("Key", name(upload.key, encode=encode))
                    + tag("UploadId", upload.upload_id)
                    + tag("Initiated", iso(upload.created_ms))
                    + "</Upload>"
                )
        return xml("ListMultipartUploadsResult", inner)

    async def list(self, call: Call) -> Answer:
        """Objects and common prefixes, in the order of their bytes, in version 1 or 2 of the call."""
        await self._there(call)
        query = call.query
        second = query.get("list-type") == "2"
        if query.get("list-type", "2") != "2":
            raise Refusal(400, "InvalidArgument", "list-type is 2")
        limit = _limit(query.get("max-keys", str(_PAGE)))
        token = query.get("continuation-token") if second else None
        after = _untoken(token) if token else query.get("start-after" if second else "marker", "")
        page = await asyncio.to_thread(
            _page, self._shelf, call.bucket, query.get("prefix", ""), query.get("delimiter", ""), after, limit
        )
        items, prefixes, last = page
        encode = query.get("encoding-type") == "url"
        inner = tag("Name", call.bucket) + tag("Prefix", name(query.get("prefix", ""), encode=encode))
        inner += tag("MaxKeys", limit) + tag("IsTruncated", "false" if last is None else "true")
        if query.get("delimiter"):
            inner += tag("Delimiter", name(query["delimiter"], encode=encode))
        if encode:
            inner += tag("EncodingType", "url")
        if second:
            inner += tag("KeyCount", len(items) + len(prefixes))
            inner += tag("ContinuationToken", token) if token else ""
            inner += tag("StartAfter", name(after, encode=encode)) if after and not token else ""
            inner += "" if last is None else tag("NextContinuationToken", _token(last))
        else:
            inner += tag("Marker", name(after, encode=encode))
            inner += "" if last is None else tag("NextMarker", name(last, encode=encode))
        inner += contents(items, encode=encode)
        for prefix in prefixes:
            inner += f"<CommonPrefixes>{tag('Prefix', name(prefix, encode=encode))}</CommonPrefixes>"
        return xml("ListBucketResult", inner)

    async def _there(self, call: Call) -> None:
        if not await asyncio.to_thread(self._shelf.has_bucket, call.bucket):
            raise no_bucket()


def _page(
    shelf: Shelf, bucket: str, prefix: str, delimiter: str, after: str, limit: int
) -> tuple[list[Item], list[str], str | None]:
    """Objects, common prefixes, and after what the next page begins (None: there is none)."""
    items: list[Item] = []
    prefixes: list[str] = []
    last: str | None = None
    if limit == 0:
        return items, prefixes, None
    while True:
        found = shelf.keys(bucket, prefix, after, limit + 1)
        for item in found:
            if len(items) + len(prefixes) == limit:
                return items, prefixes, last
            at = item.key.find(delimiter, len(prefix)) if delimiter else -1
            if at < 0:
                items.append(item)
                after = last = item.key
                continue
            common = item.key[: at + len(delimiter)]
            # Everything below comes before this: the highest character there is.
            after = last = common + chr(0x10FFFF)
            prefixes.append(common)
            break
        else:
            if len(found) <= limit:
                return items, prefixes, None


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdecimal():
        raise Refusal(400, "InvalidArgument", "max-keys is a number")
    return min(int(text), _PAGE)


def _statements(document: str) -> int:
    try:
        return len(json.loads(document)["Statement"])
    except (ValueError, KeyError, TypeError):
        raise Refusal(400, "MalformedPolicy", "the policy cannot be read") from None


def _token(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode()


def _untoken(token: str) -> str:
    try:
        return base64.urlsafe_b64decode(token.encode()).decode()
    except ValueError:
        raise Refusal(400, "InvalidArgument", "the continuation token is not one of ours") from None
