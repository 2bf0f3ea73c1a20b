"""What botocore, aiobotocore and aiohttp raise, as domain errors. The only place that knows them.

The question that decides is always the same: may the request have taken effect? For a write, a
broken connection, a timeout after the connection stood, or a 5xx other than a refusal says "maybe"
(`OutcomeUnknown`, I15); a refusal says no.
"""

import asyncio
import socket
from collections.abc import Mapping
from typing import Any, Literal

import aiohttp
from botocore import exceptions as boto

from app.core.base.errors import (
    BopError,
    CorruptBlob,
    OutcomeUnknown,
    PreconditionFailed,
    RemoteUnavailable,
)
from app.core.formats.crc64 import decode_crc64
from app.core.stores.remote.protocol import (
    BlobMissing,
    RemoteMisconfigured,
    RemoteThrottled,
    UploadCorrupted,
)

Effect = Literal["read", "write"]

VENDOR_ERRORS = (
    boto.BotoCoreError,
    boto.ClientError,
    aiohttp.ClientError,
    asyncio.TimeoutError,
    ConnectionError,
)

_THROTTLED = frozenset(
    {"SlowDown", "TooManyRequests", "Throttling", "ThrottlingException", "RequestLimitExceeded",
     "ServiceUnavailable", "429", "503"}
)  # fmt: skip
_DAMAGED = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"})
_AGAIN = frozenset(
    {"RequestTimeout", "IncompleteBody", "ConditionalRequestConflict", "OperationAborted",
     "ExpiredToken", "RequestExpired", "NoSuchUpload", "408", "409"}
)  # fmt: skip
_PERMISSIONS: Mapping[str, str] = {
    "put_blob": "s3:PutObject",
    "put_if_absent": "s3:PutObject",
    "put_if_match": "s3:PutObject",
    "head_blob": "s3:GetObject (and s3:ListBucket, without which a missing object looks forbidden)",
    "get_blob": "s3:GetObject",
    "iter_blob": "s3:GetObject",
    "delete_blobs": "s3:DeleteObject",
    "list_blobs": "s3:ListBucket",
}


class ConditionFailed(PreconditionFailed):
    """412: the object is not (or no longer) what the request's condition says."""


def status_of(error: BaseException) -> int:
    """The HTTP status of an answered request; 0 for none."""
    if isinstance(error, boto.ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def code_of(error: BaseException) -> str:
    """S3's own error code; the status in digits where the answer had no body."""
    if isinstance(error, boto.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def is_missing(error: BaseException) -> bool:
    return code_of(error) in {"NoSuchKey", "404", "NotFound"}


def size_behind_416(error: BaseException) -> int | None:
    """The object's length, where an answer to an unsatisfiable range says it."""
    if not isinstance(error, boto.ClientError):
        return None
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    told = str(headers.get("content-range", "")).rpartition("/")[2]
    told = told or str(error.response.get("Error", {}).get("ActualObjectSize", ""))
    return int(told) if told.isdecimal() else None


def crc64_of(answer: Mapping[str, Any]) -> int | None:
    """The CRC-64/NVME that an answer names; None if it names none, or one of parts."""
    text = answer.get("ChecksumCRC64NVME")
    if text is None or answer.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    try:
        return decode_crc64(str(text))
    except ValueError:
        return None


def map_error(error: BaseException, *, op: str, effect: Effect, key: str) -> BopError:
    """The domain error; the caller raises it `from error`."""
    if isinstance(error, BopError):
        return error
    fields: dict[str, Any] = {"op": op, "key": key}
    match error:
        case boto.ClientError():
            return _answered(error, op=op, effect=effect, fields=fields)
        case boto.FlexibleChecksumError():
            return CorruptBlob("The object's bytes do not match the store's checksum.", key=key)
        case boto.NoCredentialsError() | boto.PartialCredentialsError():
            return RemoteMisconfigured(
                "The SDK's own chain found no credentials when the service started.", **fields
            )
        case boto.NoRegionError() | boto.InvalidRegionError():
            return RemoteMisconfigured("No usable region: set BOP_S3_REGION.", **fields)
        case boto.SSLError():
            return RemoteMisconfigured(
                f"TLS with the endpoint fails ({_cause(error)}); BOP_S3_CA_FILE names a CA of "
                "your own.", **fields
            )  # fmt: skip
        case boto.ConnectTimeoutError() | boto.ProxyConnectionError():
            return RemoteUnavailable(f"No connection to the endpoint: {_cause(error)}.", **fields)
        case boto.EndpointConnectionError() if isinstance(
            error.kwargs.get("error"), (aiohttp.ClientConnectorError, socket.gaierror)
        ):
            return RemoteUnavailable(f"No connection to the endpoint: {_cause(error)}.", **fields)
        case boto.CredentialRetrievalError() | boto.MetadataRetrievalError():
            return RemoteUnavailable(f"Credentials cannot be had: {_cause(error)}.", **fields)
        case _:
            text = f"The request broke off: {_cause(error)}."
            return (OutcomeUnknown if effect == "write" else RemoteUnavailable)(text, **fields)


def _answered(
    error: boto.ClientError, *, op: str, effect: Effect, fields: dict[str, Any]
) -> BopError:
    code, status = code_of(error), status_of(error)
    message = str(error.response.get("Error", {}).get("Message", ""))[:200]
    fields |= {"status": status, "vendor_code": code}
    if status == 412 or code == "PreconditionFailed":
        return ConditionFailed(**fields)
    if code in _THROTTLED or status in {429, 503}:
        return RemoteThrottled("The remote store asks for fewer requests.", **fields)
    if code in _DAMAGED:
        return UploadCorrupted("The bytes that arrived do not match their checksum.", **fields)
    if code in _AGAIN:
        return RemoteUnavailable(f"The store wants it tried again ({code}).", **fields)
    if is_missing(error):
        return BlobMissing(key=fields["key"])
    if status == 501 or 300 <= status < 500:
        return RemoteMisconfigured(_refusal(code, status, op=op, message=message), **fields)
    text = f"The store failed ({code or status})."
    return (OutcomeUnknown if effect == "write" else RemoteUnavailable)(text, **fields)


def _refusal(code: str, status: int, *, op: str, message: str) -> str:
    """What someone has to change."""
    if code == "NoSuchBucket":
        return "The bucket does not exist: correct BOP_REMOTE_URL."
    if code == "RequestTimeTooSkewed":
        return "This machine's clock is wrong; the store refuses it."
    if status in {401, 403}:
        lacks = _PERMISSIONS.get(op, "a permission")
        return f"Refused ({code}): the credentials lack {lacks}, or are wrong. {message}".strip()
    if status < 400:
        return (
            "The bucket lives in another region or under another endpoint: set BOP_S3_REGION or "
            "BOP_S3_ENDPOINT_URL."
        )
    return f"Refused ({code}): {message}"


def _cause(error: BaseException) -> str:
    inner = getattr(error, "kwargs", {}).get("error") or error
    return f"{type(inner).__name__} {inner}".strip()[:200]
