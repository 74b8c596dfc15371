"""What a stage says when something that it needs is away or full."""

from __future__ import annotations

import errno
import socket

import boto3
import pytest
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import ClientError

from mlpipe.errors import ServiceUnavailableError, UserError
from mlpipe.services import services_named


def server_error(status: int) -> ClientError:
    answer = {"Error": {"Code": "InternalError"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "PutObject")  # type: ignore[arg-type]


def said(error: Exception) -> str:
    with pytest.raises(ServiceUnavailableError) as caught, services_named():
        raise error
    assert caught.value.__cause__ is error
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_full_disk_of_this_machine_is_named() -> None:
    message = said(OSError(errno.ENOSPC, "No space left on device", "/cache/train_images.npy"))
    assert message.startswith("no space is left for /cache/train_images.npy")
    assert "make room, then clear this task" in message


def test_a_store_that_fails_is_named_without_its_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:secret@store:8333")
    uploaded = S3UploadFailedError("failed")
    uploaded.__cause__ = server_error(500)
    for error in (server_error(500), uploaded):
        assert said(error).startswith("the object store at http://store:8333 fails; is its disk full?")


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    client = boto3.session.Session(aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1").client(
        "s3", endpoint_url=url, config=Config(retries={"max_attempts": 0})
    )
    with pytest.raises(ServiceUnavailableError, match=f"the object store at {url} does not answer"), services_named():
        client.list_buckets()


@pytest.mark.parametrize(
    "error", [UserError("models: no"), FileNotFoundError(errno.ENOENT, "no file", "x"), server_error(403)]
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, services_named():
        raise error
    assert caught.value is error
