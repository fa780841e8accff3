"""What an S3 server and its client library mean by an error, in this project's words."""

from __future__ import annotations

from minio.error import InvalidResponseError, S3Error, ServerError
from urllib3.exceptions import HTTPError, SSLError

from infra.objects import ObjectExists
from schemas.errors import InvalidJob, PipelineError, Transient

_NO_ROOM = ("XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded")
_PASSING = (
    *("InternalError", "ServiceUnavailable", "SlowDown", "SlowDownRead", "SlowDownWrite"),
    *("RequestTimeout", "OperationAborted", "ConditionalRequestConflict"),
)
_PASSING_STATUS = (408, 429)
_IN_THE_WAY = ("XMinioParentIsObject", "XMinioObjectExistsAsDirectory", "ExistingObjectIsDirectory")

CREDENTIALS = (
    "Set HEADRACE_S3__ACCESS_KEY and HEADRACE_S3__SECRET_KEY to credentials of this server"
)
_REGION = "Set HEADRACE_S3__REGION to the bucket's region"
_REFUSED = {
    "InvalidAccessKeyId": CREDENTIALS,
    "SignatureDoesNotMatch": CREDENTIALS,
    "AccessDenied": f"{CREDENTIALS} that may read, write, list and delete in this bucket",
    "RequestTimeTooSkewed": "Synchronise the clocks of this machine and the server",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
}


class UploadGone(Transient):
    """The upload in parts is not there: never begun, given up, or complete and the answer lost."""


def translated(error: Exception, key: str, where: str) -> Exception:
    """error: a MinioException, an HTTPError of urllib3, or one of reading an answer's content."""
    if isinstance(error, S3Error):
        return _answered(error.response.status, error.code or "", error.message or "", key, where)
    if isinstance(error, InvalidResponseError):
        return _answered(error._code, "", str(error), key, where)
    if isinstance(error, ServerError):
        return _answered(error.status_code, "", str(error), key, where)
    if isinstance(error, SSLError) and "EOF" not in str(error):
        return refused(where, f"no TLS with it: {error}; see its certificate and ?secure=")
    if isinstance(error, HTTPError):
        return _unavailable(where, str(error))
    return refused(where, f"expected S3's XML, came other content: {error}; is it an S3 server?")


def refused(where: str, why: str) -> PipelineError:
    return PipelineError("storage_refused", f"Object store, {where}: {why}")


def bucket_missing(where: str) -> PipelineError:
    return PipelineError(
        "bucket_missing",
        f"Object store: there is no {where}; make it with `headrace objects apply`, or correct HEADRACE_OBJECTS_URL.",
    )


def _answered(status: int, code: str, message: str, key: str, where: str) -> Exception:
    """What an answer means that is not the wanted one."""
    said = f"{code or status}: {message}"
    if code == "PreconditionFailed" or status == 412:
        return ObjectExists(key)
    if code == "NoSuchBucket":
        return bucket_missing(where)
    if code == "NoSuchUpload":
        return UploadGone("storage_unavailable", f"Object {key}: its upload in parts is gone.")
    if code == "NoSuchKey":
        return InvalidJob("object_missing", f"Object {key}: there is none; put it first.")
    if code in _IN_THE_WAY:
        return InvalidJob(
            "object_key_invalid",
            f"Object key {key}: it is a folder, or lies under an object; choose another.",
        )
    if code in _REFUSED:
        return PipelineError("storage_access", f"Object store, {where}: {said} {_REFUSED[code]}.")
    if code in _NO_ROOM or status == 507:
        return Transient("storage_full", f"Object {key}: no room in {where}: {said}; free some.")
    if code in _PASSING or status in _PASSING_STATUS or status >= 500:
        return _unavailable(where, said)
    return refused(where, said)


def _unavailable(where: str, why: str) -> Transient:
    return Transient("storage_unavailable", f"Object store, {where}: {why}")
