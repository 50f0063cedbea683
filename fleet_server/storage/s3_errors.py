"""What went wrong with an S3 server, in words that say what to do."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator
from xml.etree.ElementTree import ParseError

from minio.error import InvalidResponseError, S3Error, ServerError
from urllib3 import exceptions

MISSING = frozenset({"NoSuchKey", "NoSuchObject", "NoSuchVersion"})
_KEYS = "correct FLEET_S3_ACCESS_KEY and FLEET_S3_SECRET_KEY"
_CODES = {
    "InvalidAccessKeyId": f"the access key is unknown there: {_KEYS}",
    "SignatureDoesNotMatch": f"the secret key is wrong: {_KEYS}",
    "AccessDenied": f"access is denied: {_KEYS}, or give that user read and write on the four fleet buckets",
    "AllAccessDisabled": "all access to it is disabled there",
    "NoSuchBucket": "a bucket of the fleet is missing there; it is made again in a moment",
    "RequestTimeTooSkewed": "this machine's clock and the server's differ too much: set them by NTP",
    "AuthorizationHeaderMalformed": "it refuses the signature: correct FLEET_S3_REGION",
    "AuthorizationQueryParametersError": "it refuses the signature: correct FLEET_S3_REGION",
    "PermanentRedirect": "the bucket is in another region: correct FLEET_S3_REGION or FLEET_S3_ENDPOINT",
    "XMinioStorageFull": "its disk is full",
    "QuotaExceeded": "its quota is used up",
    "EntityTooLarge": "it takes no object of that size",
    "SlowDown": "it asks to slow down",
    "SlowDownRead": "it asks to slow down",
    "SlowDownWrite": "it asks to slow down",
    "NotImplemented": "it does not know that call",
}
FAILURES = (
    S3Error,
    InvalidResponseError,
    ServerError,
    exceptions.HTTPError,
    ParseError,
    ConnectionError,
    ssl.SSLError,
    ValueError,
)
"""All that a call of the SDK raises because of the server or the way to it; other OSErrors are of local files."""


def words(error: BaseException) -> str:
    """The reason for whatever a call raised."""
    if isinstance(error, S3Error):
        code = error.code or "an error without a code"
        return _CODES.get(code) or f"{code}: {(error.message or '').strip() or 'it gives no reason'}"
    if isinstance(error, ServerError):
        if error.status_code == 507:
            return "its disk is full"
        return f"it failed with HTTP {error.status_code}"
    if isinstance(error, InvalidResponseError | ParseError | ValueError):
        return "what answers there is no S3 server: correct FLEET_S3_ENDPOINT (the API's port, not the console's)"
    return next(filter(None, map(_network, _chain(error))), f"{type(error).__name__}: {error}")


def _network(error: BaseException) -> str | None:
    """The network's reason, None for an error that only wraps one."""
    if isinstance(error, exceptions.NameResolutionError | socket.gaierror):
        return "no such host: correct FLEET_S3_ENDPOINT"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}): set SSL_CERT_FILE to its CA"
    if isinstance(error, ssl.SSLError):
        return "it speaks no TLS there: correct FLEET_S3_ENDPOINT (http or https)"
    if isinstance(error, exceptions.ConnectTimeoutError) and not isinstance(error, exceptions.NewConnectionError):
        return "no answer to a connection in time"
    if isinstance(error, exceptions.ReadTimeoutError | TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError | exceptions.IncompleteRead):
        return "the connection was cut"
    if isinstance(error, OSError) and error.errno is not None:
        return errno.errorcode.get(error.errno, "") + f" ({error.strerror})"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it wraps: urllib3 puts reasons into `reason`, arguments and causes."""
    waiting: list[BaseException] = [error]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = [getattr(one, "reason", None), *one.args, one.__cause__, one.__context__]
        waiting += [found for found in inner if isinstance(found, BaseException)]
