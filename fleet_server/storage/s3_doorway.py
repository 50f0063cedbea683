"""Whether an S3 server is there and ready for us: the look at it, the four buckets and their policies. Blocking."""

from __future__ import annotations

from minio import Minio
from minio.error import S3Error

from fleet_server.storage.buckets import BUCKETS, OUTPUTS, PUBLIC, policy_for

_OWN = frozenset({"BucketAlreadyOwnedByYou", "BucketAlreadyExists"})
_NO_POLICY = "NoSuchBucketPolicy"
_FORBIDDEN = frozenset({"AccessDenied", "NotImplemented", "MethodNotAllowed"})


def look(minio: Minio) -> bool:
    """Asks for one bucket with our keys; whether it is there. Raises what the SDK raises."""
    try:
        next(iter(minio.list_objects(OUTPUTS, prefix="\x7f")), None)
    except S3Error as error:
        if error.code == "NoSuchBucket":
            return False
        raise
    return True


def ensure(minio: Minio, region: str) -> list[str]:
    """Makes what is missing of the four buckets and gives all of them their policies; what was amiss, in words.

    Repeating it changes nothing. A user without the right to set policies is told, not refused.
    """
    notes: list[str] = []
    for bucket in BUCKETS:
        if not minio.bucket_exists(bucket):
            try:
                minio.make_bucket(bucket, location=region or None)
            except S3Error as error:
                if error.code not in _OWN:
                    raise
        notes += _police(minio, bucket)
    return notes


def _police(minio: Minio, bucket: str) -> list[str]:
    try:
        current = _policy(minio, bucket)
        wanted, removed = policy_for(bucket, current)
        if wanted == current:
            return []
        if wanted is None:
            minio.delete_bucket_policy(bucket)
        else:
            minio.set_bucket_policy(bucket, wanted)
    except S3Error as error:
        if error.code not in _FORBIDDEN:
            raise
        aim = "public-read for objects" if bucket in PUBLIC else "private"
        return [f"{bucket}: its policy cannot be read or set with our keys ({error.code}); it should be {aim}"]
    return [f"{words}: that was taken away" for words in removed]


def _policy(minio: Minio, bucket: str) -> str | None:
    try:
        return minio.get_bucket_policy(bucket)
    except S3Error as error:
        if error.code == _NO_POLICY:
            return None
        raise
