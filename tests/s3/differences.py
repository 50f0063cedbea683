"""Where the two servers of the suite answer differently, and why. Tests ask here; nothing else may differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """What each server does: HTTP statuses or words that the tests know."""

    embedded: Any
    rgw: Any
    reason: str

    def of(self, server: str) -> Any:
        """What that server does."""
        return getattr(self, server)


DIFFERENCES = {
    "missing public object, anonymous": Difference(
        404, 403, "S3 hides from callers without s3:ListBucket whether an object is missing; ours tells what is missing"
    ),
    "anonymous GET of /": Difference(403, 200, "the gateway answers anybody with an empty list of buckets"),
    "tagging of an object": Difference(501, 200, "the gateway keeps tags; ours refuses what it does not do"),
    "acl of an object": Difference(501, 200, "the gateway keeps ACLs; ours refuses what it does not do"),
    "presigned by signature version 2": Difference(400, 200, "ours takes signatures of version 4 alone"),
    "policy of a private bucket": Difference(
        501, 204, "the gateway keeps any policy; ours has the two that the fleet needs"
    ),
    "etag of a copy": Difference(
        "whole", "as it was", "the gateway keeps the ETag of parts; ours writes the copy as one"
    ),
}
