"""What vendors raise, as what a caller would do about it."""

import aiohttp
import pytest
from botocore import exceptions as boto

from app.core.base.errors import BopError, CorruptBlob, OutcomeUnknown, RemoteUnavailable
from app.core.stores.remote.protocol import (
    BlobMissing,
    RemoteMisconfigured,
    RemoteThrottled,
    UploadCorrupted,
)
from app.core.stores.remote.s3_errors import (
    ConditionFailed,
    crc64_of,
    map_error,
    size_behind_416,
)


def answered(status: int, code: str, **error: str) -> boto.ClientError:
    return boto.ClientError(
        {
            "Error": {"Code": code, "Message": "words", **error},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}},
        },
        "PutObject",
    )


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "NoSuchKey", BlobMissing), (404, "404", BlobMissing),
        (404, "NoSuchBucket", RemoteMisconfigured), (404, "NoSuchUpload", RemoteUnavailable),
        (412, "PreconditionFailed", ConditionFailed), (412, "412", ConditionFailed),
        (409, "ConditionalRequestConflict", RemoteUnavailable),
        (409, "OperationAborted", RemoteUnavailable),
        (429, "TooManyRequests", RemoteThrottled), (429, "429", RemoteThrottled),
        (503, "SlowDown", RemoteThrottled), (503, "ServiceUnavailable", RemoteThrottled),
        (503, "503", RemoteThrottled),
        (400, "BadDigest", UploadCorrupted), (400, "XAmzContentChecksumMismatch", UploadCorrupted),
        (400, "RequestTimeout", RemoteUnavailable), (400, "IncompleteBody", RemoteUnavailable),
        (400, "ExpiredToken", RemoteUnavailable),
        (400, "InvalidArgument", RemoteMisconfigured),
        (403, "AccessDenied", RemoteMisconfigured), (403, "403", RemoteMisconfigured),
        (403, "SignatureDoesNotMatch", RemoteMisconfigured),
        (403, "RequestTimeTooSkewed", RemoteMisconfigured),
        (301, "PermanentRedirect", RemoteMisconfigured),
        (501, "NotImplemented", RemoteMisconfigured),
        (500, "InternalError", OutcomeUnknown), (502, "502", OutcomeUnknown),
        (504, "504", OutcomeUnknown),
    ],
)  # fmt: skip
def test_answers(status: int, code: str, expected: type[BopError]) -> None:
    mapped = map_error(answered(status, code), op="put_blob", effect="write", key="k")
    assert type(mapped) is expected


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_read_that_failed_is_no_riddle(status: int) -> None:
    mapped = map_error(answered(status, "x"), op="get_blob", effect="read", key="k")
    assert type(mapped) is RemoteUnavailable


def test_refusals_name_the_permission() -> None:
    for op, permission in (("put_blob", "s3:PutObject"), ("list_blobs", "s3:ListBucket")):
        mapped = map_error(answered(403, "AccessDenied"), op=op, effect="write", key="k")
        assert permission in mapped.detail


def refused() -> boto.EndpointConnectionError:
    key = aiohttp.client_reqrep.ConnectionKey("h", 1, False, True, None, None, None)
    inner = aiohttp.ClientConnectorError(key, ConnectionRefusedError(111, "refused"))
    return boto.EndpointConnectionError(endpoint_url="http://h", error=inner)


@pytest.mark.parametrize(
    ("error", "on_write"),
    [
        (boto.EndpointConnectionError(
            endpoint_url="http://h", error=aiohttp.ClientOSError(104, "reset")), OutcomeUnknown),
        (boto.ConnectionClosedError(endpoint_url="http://h"), OutcomeUnknown),
        (boto.ReadTimeoutError(endpoint_url="http://h"), OutcomeUnknown),
        (boto.HTTPClientError(error=ValueError("x")), OutcomeUnknown),
        (boto.ResponseStreamingError(error=ValueError("x")), OutcomeUnknown),
        (aiohttp.ClientPayloadError("cut"), OutcomeUnknown),
        (TimeoutError(), OutcomeUnknown),
        (ConnectionResetError(104, "reset"), OutcomeUnknown),
        (boto.ConnectTimeoutError(endpoint_url="http://h"), RemoteUnavailable),
        (refused(), RemoteUnavailable),
        (boto.NoCredentialsError(), RemoteMisconfigured),
        (boto.SSLError(endpoint_url="https://h", error="self-signed"), RemoteMisconfigured),
        (boto.FlexibleChecksumError(error_msg="x"), CorruptBlob),
    ],
)  # fmt: skip
def test_broken_requests(error: Exception, on_write: type[BopError]) -> None:
    assert type(map_error(error, op="put_blob", effect="write", key="k")) is on_write
    on_read = RemoteUnavailable if on_write is OutcomeUnknown else on_write
    assert type(map_error(error, op="get_blob", effect="read", key="k")) is on_read


def test_domain_errors_pass() -> None:
    error = CorruptBlob("x")
    assert map_error(error, op="get_blob", effect="read", key="k") is error


def test_the_size_behind_an_unsatisfiable_range() -> None:
    assert size_behind_416(answered(416, "InvalidRange", ActualObjectSize="10")) == 10
    error = answered(416, "InvalidRange")
    assert size_behind_416(error) is None
    error.response["ResponseMetadata"]["HTTPHeaders"]["content-range"] = "bytes */77"
    assert size_behind_416(error) == 77
    assert size_behind_416(ValueError()) is None


def test_only_checksums_of_the_whole_object_count() -> None:
    assert crc64_of({"ChecksumCRC64NVME": "rosUhgp5mIg="}) == 0xAE8B14860A799888
    assert crc64_of({"ChecksumCRC64NVME": "rosUhgp5mIg=", "ChecksumType": "COMPOSITE"}) is None
    assert crc64_of({"ChecksumCRC64NVME": "garbage"}) is None
    assert crc64_of({}) is None
