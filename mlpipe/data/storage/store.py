"""Objects by key in one bucket of an S3-compatible store.

Everything that stages exchange lies here: sources, data sets, weights, checkpoints. An object appears whole or not at
all, because S3's PUT is atomic. Address and keys come from boto3's own environment variables.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError
from botocore.loaders import create_loader

from mlpipe.errors import UserError

if TYPE_CHECKING:
    from mlpipe.environment import Environment

logger = logging.getLogger(__name__)

MAX_KEY_BYTES = 1024  # S3's limit
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]")
_MISSING_CODES = {"404", "NoSuchKey", "NotFound"}
_CLIENT_RETRIES = {"mode": "standard", "max_attempts": 14}  # about a minute; the task's own retries follow
# Few large parts: on two cores the server's work per part is what an upload costs.
_TRANSFER = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=32 << 20, max_concurrency=4)

_API_DEFINITIONS = create_loader()
"""Shared by all clients: to read S3's anew takes 50 ms."""

PART_BYTES = 16 << 20
"""Of an upload in parts, unless it would have more than `MAX_PARTS`, S3's limit."""
MAX_PARTS = 10_000
PARTS_ON_THE_WAY = 3


class ObjectStore:
    """A bucket. The network's errors (botocore's) pass through, so that a caller may try again."""

    def __init__(self, bucket: str, client: Any = None) -> None:
        """
        Args:
            bucket: its name; it must exist.
            client: a boto3 S3 client; `None`: one from the environment.
        """
        self.bucket = bucket
        self._client = client if client is not None else s3_client()

    @classmethod
    def from_environment(cls, environment: Environment) -> Self:
        """The bucket that the environment names; it is created when missing."""
        store = cls(environment.s3_bucket)
        store.create_bucket()
        return store

    def create_bucket(self) -> None:
        """Create the bucket unless it is there."""
        with _credentials_needed():
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except ClientError as error:
                if not _is_missing(error):
                    raise
                # Somebody else may create it at the same moment.
                with contextlib.suppress(
                    self._client.exceptions.BucketAlreadyOwnedByYou, self._client.exceptions.BucketAlreadyExists
                ):
                    self._client.create_bucket(Bucket=self.bucket)

    def uri(self, key: str) -> str:
        """`s3://bucket/key`."""
        return f"s3://{self.bucket}/{_checked(key)}"

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        return self.head(key) is not None

    def head(self, key: str) -> dict[str, Any] | None:
        """An object's `bytes`, its `etag`, and the `sha256` that was stored with it or `None`; `None`: no such object.

        The entity tag is the store's own: it changes with the content.
        """
        with _credentials_needed():
            try:
                answer = self._client.head_object(Bucket=self.bucket, Key=_checked(key))
            except ClientError as error:
                if _is_missing(error):
                    return None
                raise
        return {
            "bytes": answer["ContentLength"],
            "etag": answer["ETag"],
            "sha256": answer.get("Metadata", {}).get("sha256"),
        }

    @contextmanager
    def upload(self, key: str, num_bytes: int) -> Iterator[Upload]:
        """Write an object of `num_bytes` from front to back; it appears, or is replaced, by `Upload.close` alone.

        Without `close`, or when the block raises, nothing is left behind.
        """
        with _credentials_needed():
            upload = Upload(self._client, self.bucket, _checked(key), num_bytes)
            try:
                yield upload
            finally:
                upload.abort()

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Upload a file, replacing the object of that key.

        Args:
            sha256: of the file, hexadecimal, kept with the object.
        """
        metadata = {"Metadata": {"sha256": sha256}} if sha256 else {}
        with _credentials_needed():
            self._client.upload_file(str(path), self.bucket, _checked(key), ExtraArgs=metadata, Config=_TRANSFER)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write an object.

        Args:
            if_absent: leave an object that is there alone; of several writers the first wins.

        Returns:
            Whether it was written.
        """
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with _credentials_needed():
            try:
                self._client.put_object(Bucket=self.bucket, Key=_checked(key), Body=data, **condition)
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code")
                if if_absent and code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
                    return False
                raise
        return True

    def get_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Download an object. `path` appears when all of it is there.

        Args:
            sha256: what the object must hash to.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: the object's bytes are not those of `sha256`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with _credentials_needed(), _missing_is_not_found(self.uri(key)):
                self._client.download_file(self.bucket, _checked(key), str(partial), Config=_TRANSFER)
            if sha256 is not None and (found := file_sha256(partial)) != sha256:
                raise OSError(f"{self.uri(key)} has sha256 {found} instead of {sha256}: it is damaged")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def get_bytes(self, key: str) -> bytes:
        """An object's content.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with _credentials_needed(), _missing_is_not_found(self.uri(key)):
            return self._client.get_object(Bucket=self.bucket, Key=_checked(key))["Body"].read()

    def delete(self, key: str) -> None:
        """Remove an object; none of that key is no error."""
        with _credentials_needed():
            self._client.delete_object(Bucket=self.bucket, Key=_checked(key))

    def list(self, prefix: str) -> list[str]:
        """Keys under `prefix/`, sorted."""
        pages = self._client.get_paginator("list_objects_v2")
        with _credentials_needed():
            return sorted(
                item["Key"]
                for page in pages.paginate(Bucket=self.bucket, Prefix=_checked(prefix.rstrip("/")) + "/")
                for item in page.get("Contents", [])
            )


class Upload:
    """An object that is sent in parts while it is being made; a few parts are in memory at any time."""

    def __init__(self, client: Any, bucket: str, key: str, num_bytes: int) -> None:
        self._client = client
        self._target = {"Bucket": bucket, "Key": key}
        self._bytes_left = num_bytes
        self._part_bytes = max(PART_BYTES, -(-num_bytes // MAX_PARTS))
        self._part = bytearray()
        self._id: str | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._parts: list[Future[str]] = []

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes; waits while too many parts are on their way."""
        if len(content) > self._bytes_left:
            raise ValueError(f"{self._target['Key']}: {len(content)} bytes, but only {self._bytes_left} are left")
        self._bytes_left -= len(content)
        while len(content):
            room = self._part_bytes - len(self._part)
            self._part += content[:room]
            content = content[room:]
            if len(self._part) == self._part_bytes:
                self._send_part()
        if self._part and not self._bytes_left and self._pool is not None:
            self._send_part()

    def _send_part(self) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(PARTS_ON_THE_WAY, thread_name_prefix="upload")
            self._id = self._client.create_multipart_upload(**self._target)["UploadId"]
        if len(self._parts) >= PARTS_ON_THE_WAY:
            self._parts[-PARTS_ON_THE_WAY].result()
        self._parts.append(self._pool.submit(self._put_part, len(self._parts) + 1, self._part))
        self._part = bytearray()

    def _put_part(self, number: int, body: bytearray) -> str:
        return self._client.upload_part(**self._target, UploadId=self._id, PartNumber=number, Body=body)["ETag"]

    def close(self) -> str:
        """Make the object appear; its entity tag."""
        if self._bytes_left:
            raise ValueError(f"{self._target['Key']}: {self._bytes_left} bytes are missing")
        if self._pool is None:
            return self._client.put_object(**self._target, Body=self._part)["ETag"]
        parts = [{"PartNumber": number, "ETag": part.result()} for number, part in enumerate(self._parts, start=1)]
        answer = self._client.complete_multipart_upload(
            **self._target, UploadId=self._id, MultipartUpload={"Parts": parts}
        )
        self._id = None
        return answer["ETag"]

    def abort(self) -> None:
        """Let go of what was sent, unless the upload was closed."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._id is not None:
            self._client.abort_multipart_upload(**self._target, UploadId=self._id)
            self._id = None


def s3_client() -> Any:
    """A boto3 S3 client of the environment as it is now; boto3's default session would keep the first keys it saw."""
    botocore_session = botocore.session.get_session()
    botocore_session.register_component("data_loader", _API_DEFINITIONS)
    session = boto3.session.Session(botocore_session=botocore_session)
    config = Config(
        retries=_CLIENT_RETRIES,
        connect_timeout=10,
        read_timeout=120,
        # Headers are signed, and contents have a CRC-32 on the way and a SHA-256 that their reader checks.
        s3={"payload_signing_enabled": False},
    )
    client = session.client("s3", config=config)
    client.meta.events.register("before-sign.s3.UploadPart", _name_type)
    return client


def _name_type(request: Any, **_: Any) -> None:
    """Say S3's default type. SeaweedFS tries to compress parts of no type, also pixels: a tenth of its work."""
    request.headers["Content-Type"] = "binary/octet-stream"


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(key: str) -> str:
    """The key, if it is one that stays under its own prefix."""
    parts = key.split("/")
    if not key or len(key.encode()) > MAX_KEY_BYTES or _UNSAFE.search(key) or {"", ".", ".."} & set(parts):
        raise ValueError(
            f"key: {key[:200]!r} is not allowed; give non-empty parts joined by '/', none of them '.' or '..'"
        )
    return key


def _is_missing(error: ClientError) -> bool:
    return error.response.get("Error", {}).get("Code") in _MISSING_CODES | {"NoSuchBucket"}


@contextmanager
def _missing_is_not_found(uri: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in _MISSING_CODES:
            raise FileNotFoundError(f"{uri} does not exist") from error
        raise


@contextmanager
def _credentials_needed() -> Iterator[None]:
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(
            "AWS_ACCESS_KEY_ID: no keys of the object store are set; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "(mlpipe up does) where this task runs"
        ) from error
