"""What a stage says when something that it needs is away or full."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import mlflow
from boto3.exceptions import S3UploadFailedError
from botocore.exceptions import ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as S3ConnectionError
from mlflow.exceptions import MlflowException

from mlpipe.addresses import redact_uri
from mlpipe.errors import ServiceUnavailableError
from mlpipe.tracking.runs import is_unreachable

NOTHING_IS_LOST = "what is done so far is kept; {}, then clear this task in Airflow"
START_IT = NOTHING_IS_LOST.format("start it (`mlpipe up`, or see its log)")
MAKE_ROOM = NOTHING_IS_LOST.format("make room")


@contextmanager
def services_named() -> Iterator[None]:
    """Turn what the clients of MLflow and the object store raise, after their own tries, into one line.

    Raises:
        ServiceUnavailableError: says what is away or full, and what to do when that lasts.
    """
    try:
        yield
    except MlflowException as error:
        if not is_unreachable(error):
            raise
        uri = redact_uri(mlflow.get_tracking_uri())
        raise ServiceUnavailableError(f"MLflow at {uri} does not answer; {START_IT}") from error
    except (S3ConnectionError, HTTPClientError) as error:
        raise ServiceUnavailableError(f"the object store at {_store()} does not answer; {START_IT}") from error
    except (ClientError, S3UploadFailedError) as error:
        if not _server_failed(error):
            raise
        raise ServiceUnavailableError(
            f"the object store at {_store()} fails; is its disk full? (`mlpipe logs seaweedfs`); {MAKE_ROOM}"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ServiceUnavailableError(f"no space is left for {error.filename or 'a file'}; {MAKE_ROOM}") from error


def _store() -> str:
    return redact_uri(os.environ.get("AWS_ENDPOINT_URL_S3") or "Amazon")


def _server_failed(error: Exception) -> bool:
    """Whether S3 blames itself, not the caller."""
    if isinstance(error, S3UploadFailedError):
        cause = error.__cause__ or error.__context__
        return isinstance(cause, ClientError) and _server_failed(cause)
    response = error.response if isinstance(error, ClientError) else {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
