"""Files by address: a path, `file://`, `http(s)://`, `s3://`, or what `mlpipe run` uploaded (`mlflow-artifacts://`).

What the user can mend is a `UserError` that says how; what may heal is a `ConnectionError`, after a few tries.
No message shows user names, passwords or the query of an address, which may be a signature.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

import requests
import urllib3.exceptions
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from tenacity import Retrying, before_sleep_log, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from mlpipe.addresses import redact_uri
from mlpipe.data.storage import allowed
from mlpipe.data.storage.store import s3_client
from mlpipe.errors import UserError

logger = logging.getLogger(__name__)

MAX_BYTES = 50 * 10**9
"""Largest file that is fetched, bytes, unless the caller says otherwise."""
PROGRESS_SECONDS = 10.0
"""Least time between two progress lines."""
TIMEOUT = (10.0, 60.0)
"""Of an HTTP connection, and of silence within an answer, seconds."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_CHECKSUM = re.compile(r"sha256=([0-9a-fA-F]{64})")
_PIECE = 1 << 20
_BUSY = {408, 425, 429}
_RETRIES: dict[str, Any] = {
    "stop": stop_after_attempt(4),
    "wait": wait_exponential_jitter(multiplier=0.5, max=8),
}


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What has been fetched."""

    sha256: str
    """Hexadecimal."""
    num_bytes: int


class _UnreachableError(ConnectionError):
    """Nobody answers at that address: likely a mistake in it, unless a further try succeeds."""


def local_path(uri: str) -> Path | None:
    """The file that a path or a `file://` address names; `None` for other schemes."""
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return Path(os.path.expanduser(uri))  # noqa: PTH111 - leaves an unknown user's ~ as it is; Path's raises
    if scheme[1].lower() != "file":
        return None
    return Path(unquote(urlsplit(uri).path))


def expected_sha256(uri: str, *, field: str) -> str | None:
    """The checksum that a remote address demands in its fragment, `#sha256=<64 hex digits>`; `None` if none.

    Raises:
        UserError: a fragment of another form.
    """
    if not _SCHEME.match(uri) or "#" not in uri:
        return None
    fragment = uri.partition("#")[2]
    match = _CHECKSUM.fullmatch(fragment)
    if match is None:
        raise UserError(f"{field}: what follows '#' in {redact_uri(uri)} is no checksum; give #sha256=<64 hex digits>")
    return match[1].lower()


def check_local(path: Path, *, field: str) -> None:
    """
    Raises:
        UserError: `path` is not a readable file with something in it, or workers may not read it.
    """
    allowed.check_file(path if path.is_absolute() else path.absolute(), field=field)
    check_readable(path, field=field)


def check_readable(path: Path, *, field: str) -> None:
    """
    Raises:
        UserError: `path` is not a readable file with something in it.
    """
    shown = path if path.is_absolute() else path.absolute()
    try:
        if path.is_dir():
            raise UserError(f"{field}: {shown} is a folder; give a file (pack a folder: zip -r images.zip {path.name})")
        if not path.exists():
            raise UserError(
                f"{field}: {shown} does not exist where this task runs; check the path, "
                "or use s3:// or https:// so that every worker can reach it"
            )
        if not path.is_file():
            raise UserError(f"{field}: {shown} is not a regular file; give one")
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{field}: {shown} is empty (0 bytes); was it copied completely?")
    except PermissionError as error:
        raise UserError(f"{field}: {shown} may not be read by this process; change its permissions") from error
    except (ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}: {str(shown)[:200]!r} is not a usable path ({error})") from error


def fetch_uri(uri: str, path: Path, *, field: str, max_bytes: int = MAX_BYTES) -> Fetched:
    """Copy the file at `uri` to `path`, which appears when all of it is there.

    A remote address may end in `#sha256=<hex>`, which is then checked.

    Args:
        uri: a path, `file://`, `http(s)://` or `s3://`.
        field: the parameter that the address came from; errors begin with it.
        max_bytes: larger files are refused.

    Raises:
        UserError: the address or what is there cannot be used; says what to do.
        ConnectionError: the other side failed in a way that may heal.
    """
    demanded = expected_sha256(uri, field=field)
    address = uri.partition("#")[0] if _SCHEME.match(uri) else uri
    partial = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetched = _fetch(address, partial, field, max_bytes)
        if demanded is not None and fetched.sha256 != demanded:
            raise UserError(
                f"{field}: {redact_uri(uri)} has sha256 {fetched.sha256} instead of {demanded}; "
                "it is another file, or the checksum is another one's"
            )
        if not fetched.num_bytes:
            raise UserError(f"{field}: {redact_uri(uri)} is empty (0 bytes)")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return fetched


def version_of(uri: str, *, field: str) -> str | None:
    """What the server says tells this version of the file from others (its ETag); `None` if it says nothing.

    Raises:
        UserError: as `fetch_uri` does, for `s3://`.
    """
    address = uri.partition("#")[0]
    if address.startswith("s3://"):
        with _s3_errors(address, field):
            head = s3_client().head_object(**_bucket_and_key(address, field))
            return f"{head['ETag']} {head['ContentLength']}"
    try:
        with allowed.web_session(field) as session:
            answer = session.head(address, timeout=TIMEOUT, allow_redirects=True)
    except (requests.RequestException, ValueError):
        return None  # fetching will say what is wrong
    etag = answer.headers.get("ETag", "")
    return f"{etag} {answer.headers.get('Content-Length')}" if answer.ok and etag and etag[:2] != "W/" else None


def is_s3_folder(uri: str) -> bool:
    """Whether the address is that of all objects below a prefix, `s3://bucket/prefix/`."""
    return uri.startswith("s3://") and uri.endswith("/")


def list_s3_folder(uri: str, *, field: str) -> list[tuple[str, int, str]]:
    """Address, size and entity tag of each object below `s3://bucket/prefix/`, in the order of their names.

    Raises:
        UserError: there are none, or they may not be listed.
        ConnectionError: the object store failed in a way that may heal.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    allowed.check_bucket(bucket, field=field)
    with _s3_errors(uri, field):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [item for page in pages for item in page.get("Contents", []) if not item["Key"].endswith("/")]
    if not found:
        raise UserError(f"{field}: {redact_uri(uri)} has no objects; check the address")
    return sorted((f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"]) for item in found)


def open_s3(address: str, *, field: str, client: Any) -> IO[bytes]:
    """An object's content, to be read and closed.

    Args:
        client: of `s3_client`.

    Raises:
        UserError, ConnectionError: as `fetch_uri`.
    """
    with _s3_errors(address, field):
        body: IO[bytes] = client.get_object(**_bucket_and_key(address, field))["Body"]
        return body


def _fetch(address: str, partial: Path, field: str, max_bytes: int) -> Fetched:
    local = local_path(address)
    if local is not None:
        _check_file_host(address, field)
        check_local(local, field=field)
        _check_size(local.stat().st_size, max_bytes, address, field)
        with local.open("rb") as file:
            return _write(iter(lambda: file.read(_PIECE), b""), partial, address, field, max_bytes, None)
    scheme = address.partition("://")[0].lower()
    if scheme == "s3":
        return _fetch_s3(address, partial, field, max_bytes)
    if scheme == "mlflow-artifacts":
        return _fetch_upload(address, partial, field, max_bytes)
    if scheme not in ("http", "https"):
        raise UserError(
            f"{field}: {scheme}:// in {redact_uri(address)} is not supported; "
            "give a path or a file://, http://, https:// or s3:// address"
        )
    retrying = Retrying(
        retry=retry_if_exception_type(ConnectionError),
        before_sleep=before_sleep_log(logger, logging.WARNING),
        reraise=True,
        **_RETRIES,
    )
    try:
        return retrying(_fetch_http, address, partial, field, max_bytes)
    except _UnreachableError as error:
        raise UserError(f"{field}: {error}; check the address, and that this machine may connect to it") from error


def _fetch_upload(address: str, partial: Path, field: str, max_bytes: int) -> Fetched:
    from mlpipe.tracking.uploads import read_upload  # loads MLflow, of which other addresses have no need

    return _write(read_upload(address, field=field), partial, address, field, max_bytes, None)


def _check_file_host(address: str, field: str) -> None:
    if _SCHEME.match(address) and urlsplit(address).netloc not in ("", "localhost"):
        raise UserError(f"{field}: {redact_uri(address)} names another host; write file:///absolute/path")


def _check_size(num_bytes: int, max_bytes: int, address: str, field: str) -> None:
    if num_bytes > max_bytes:
        raise UserError(
            f"{field}: {redact_uri(address)} has {num_bytes / 1e9:.3g} GB; at most {max_bytes / 1e9:.3g} GB are fetched"
        )


def _write(
    pieces: Iterable[bytes], partial: Path, address: str, field: str, max_bytes: int, total: int | None
) -> Fetched:
    """Write and hash what comes in, without ever holding more than a piece."""
    hasher = hashlib.sha256()
    done = 0
    reported = time.monotonic()
    with partial.open("wb") as file:
        for piece in pieces:
            done += len(piece)
            _check_size(done, max_bytes, address, field)
            file.write(piece)
            hasher.update(piece)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                of_total = f" of {total / 1e6:,.0f}" if total else ""
                logger.info("%s: %s%s MB", redact_uri(address), f"{done / 1e6:,.0f}", of_total)
    return Fetched(sha256=hasher.hexdigest(), num_bytes=done)


def _fetch_http(address: str, partial: Path, field: str, max_bytes: int) -> Fetched:
    with _http_errors(address, field):
        # identity: Content-Length then counts the file's own bytes
        plain = {"Accept-Encoding": "identity"}
        with (
            allowed.web_session(field) as session,
            session.get(address, stream=True, timeout=TIMEOUT, headers=plain) as answer,
        ):
            _check_status(answer.status_code, address, field)
            length = answer.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            _check_size(total or 0, max_bytes, address, field)
            pieces = answer.raw.stream(_PIECE, decode_content=False)
            fetched = _write(pieces, partial, address, field, max_bytes, total)
        if total is not None and fetched.num_bytes != total:
            raise ConnectionError(f"{redact_uri(address)} broke off after {fetched.num_bytes} of {total} bytes")
        return fetched


def _check_status(status: int, address: str, field: str) -> None:
    shown = redact_uri(address)
    if status in _BUSY or status >= 500:
        raise ConnectionError(f"{shown} answers with status {status}")
    if status in (401, 403, 407):
        raise UserError(
            f"{field}: {shown} refuses access (status {status}); give an address that needs no login, or a signed one"
        )
    if status in (404, 410):
        raise UserError(f"{field}: {shown} does not exist (status {status}); check the address")
    if status != 200:
        raise UserError(f"{field}: {shown} answers with status {status} instead of a file; check the address")


@contextmanager
def _http_errors(address: str, field: str) -> Iterator[None]:
    """Sort what requests and urllib3 raise. Their own messages hold the whole address, so they are not shown."""
    shown = redact_uri(address)
    try:
        yield
    except requests.exceptions.SSLError as error:
        raise UserError(f"{field}: {shown} has no certificate that this machine trusts; check the address") from error
    except (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects, UnicodeError) as error:
        raise UserError(f"{field}: {shown} is not a usable address ({type(error).__name__}); check it") from error
    except requests.ConnectionError as error:
        reason = getattr(error.args[0], "reason", None) if error.args else None
        if isinstance(reason, urllib3.exceptions.NameResolutionError):
            raise _UnreachableError(f"the host of {shown} is not known (name resolution failed)") from None
        if isinstance(reason, urllib3.exceptions.NewConnectionError):
            raise _UnreachableError(f"{shown} cannot be reached ({_last_words(reason)})") from None
        raise ConnectionError(f"{shown}: the connection failed ({type(error).__name__})") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise ConnectionError(f"{shown}: the transfer failed ({type(error).__name__})") from None


def _last_words(error: Exception) -> str:
    return str(error).rsplit(": ", 1)[-1][:100]


def _bucket_and_key(address: str, field: str) -> dict[str, str]:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not bucket or not key or key.endswith("/"):
        raise UserError(f"{field}: {redact_uri(address)} names no file; give s3://bucket/key")
    if {".", ".."} & set(key.split("/")):  # which the way there may resolve, into another bucket
        raise UserError(f"{field}: {redact_uri(address)} has '.' or '..' in its key; give the key without")
    allowed.check_bucket(bucket, field=field)
    return {"Bucket": bucket, "Key": key}


def _fetch_s3(address: str, partial: Path, field: str, max_bytes: int) -> Fetched:
    with _s3_errors(address, field):
        where = _bucket_and_key(address, field)
        answer = s3_client().get_object(**where)
        total = answer["ContentLength"]
        _check_size(total, max_bytes, address, field)
        # botocore's stream raises when it ends before ContentLength
        return _write(answer["Body"].iter_chunks(_PIECE), partial, address, field, max_bytes, total)


@contextmanager
def _s3_errors(address: str, field: str) -> Iterator[None]:
    shown = redact_uri(address)
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(
            f"{field}: {shown} needs keys and none are set; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "where this task runs"
        ) from error
    except ParamValidationError as error:
        raise UserError(f"{field}: {shown} is not a valid bucket and key; give s3://bucket/key") from error
    except ClientError as error:
        raise _sorted_client_error(error, shown, field) from error
    except (BotoCoreError, urllib3.exceptions.HTTPError) as error:
        raise ConnectionError(f"{shown}: the transfer failed ({type(error).__name__})") from error


def _sorted_client_error(error: ClientError, shown: str, field: str) -> Exception:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return UserError(f"{field}: the bucket of {shown} does not exist; check the address")
    if code in ("NoSuchKey", "NotFound", "404"):
        return UserError(
            f"{field}: {shown} does not exist; check the address (aws s3 ls shows what is there; "
            "that of a folder ends in /)"
        )
    if status in (401, 403):
        return UserError(f"{field}: the keys that are set may not read {shown} ({code}); check them and the address")
    if status in _BUSY or status >= 500:
        return ConnectionError(f"{shown}: the object store answers with status {status} ({code})")
    return UserError(f"{field}: {shown} cannot be read ({code}); check the address")
