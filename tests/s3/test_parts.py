"""What needs no server: ETags of parts, policies, names of objects."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import pytest

from fleet_server.storage.buckets import MODELS, OUTPUTS, policy_for, public_statement
from fleet_server.storage.s3 import is_object_key
from fleet_server.storage.s3_digest import Digest

NAMED = {"Effect": "Allow", "Principal": {"AWS": ["arn:aws:iam:::user/ann"]}, "Action": "s3:*", "Resource": "*"}
DENY = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject", "Resource": "*"}
INSIDE = {
    "Effect": "Allow",
    "Principal": "*",
    "Action": "s3:GetObject",
    "Resource": "*",
    "Condition": {"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}},
}
OPEN = [
    {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*"},
    {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "s3:*", "Resource": "*"},
    {"Effect": "Allow", "NotPrincipal": {"AWS": "x"}, "Action": "s3:GetObject", "Resource": "*"},
]


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 21, 35])
@pytest.mark.parametrize("step", [1, 7, 10, 100])
def test_an_etag_is_of_one_put_or_of_its_parts(size: int, step: int) -> None:
    data = os.urandom(size)
    digest = Digest(10)
    for at in range(0, size, step):
        digest.update(data[at : at + step])
    whole = hashlib.md5(data).hexdigest()
    parts = [hashlib.md5(data[at : at + 10]).digest() for at in range(0, size, 10)]
    assert digest.etag() == (whole if size <= 10 else f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}")
    assert (digest.size, digest.sha256) == (size, hashlib.sha256(data).hexdigest())


def policy(*statements: dict[str, Any]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def statements(document: str | None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [] if document is None else json.loads(document)["Statement"]
    return found


def test_the_public_bucket_gets_its_statement_once() -> None:
    made, words = policy_for(OUTPUTS, None)
    assert (statements(made), words) == ([public_statement(OUTPUTS)], [])
    assert policy_for(OUTPUTS, made) == (made, [])
    assert policy_for(MODELS, None) == (None, [])


@pytest.mark.parametrize("opened", OPEN)
def test_what_is_open_to_all_goes_and_all_else_stays(opened: dict[str, Any]) -> None:
    for bucket, own in ((OUTPUTS, [public_statement(OUTPUTS)]), (MODELS, [])):
        made, words = policy_for(bucket, policy(NAMED, opened, DENY, INSIDE))
        assert statements(made) == [NAMED, DENY, INSIDE, *own]
        assert len(words) == 1 and words[0].startswith(bucket)
        again, words = policy_for(bucket, made)
        assert (statements(again), words) == (statements(made), [])
    assert policy_for(MODELS, policy(opened))[0] is None


def test_a_server_may_write_our_statement_its_own_way() -> None:
    theirs = {**public_statement(OUTPUTS), "Sid": "", "Principal": "*", "Action": "s3:GetObject"}
    theirs["Resource"] = theirs["Resource"][0]
    assert policy_for(OUTPUTS, policy(theirs)) == (policy(theirs), [])


@pytest.mark.parametrize("document", ["", "[]", "{}", '{"Statement": 1}', '{"Statement": ["x"]}', "not json"])
def test_a_policy_that_cannot_be_read_is_replaced(document: str) -> None:
    assert statements(policy_for(OUTPUTS, document)[0]) == [public_statement(OUTPUTS)]


def test_names_of_objects() -> None:
    assert all(map(is_object_key, ("a", "a/b", "a..b", "..c", "ü", "a b", "x" * 1024)))
    bad = ("", "/", "a/", "/a", "a//b", ".", "..", "../a", "a/..", "a/./b", "a\n", "a\0", "x" * 1025, "\udc80")
    assert not any(map(is_object_key, bad))
