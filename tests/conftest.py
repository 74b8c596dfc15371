"""A real S3 server for the tests: SeaweedFS in one process, started once, its data in a temporary folder."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from mlpipe.data.storage.store import ObjectStore
from mlpipe.stack.temporary import running_object_store

pytest_plugins = ["tests.stack_fixtures"]


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running S3 server; boto3's variables name it and its keys while the session lasts."""
    with running_object_store(tmp_path_factory.mktemp("s3")) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables["AWS_ENDPOINT_URL_S3"]


@pytest.fixture
def store(s3_endpoint: str) -> ObjectStore:  # noqa: ARG001
    """An empty bucket of its own."""
    fresh = ObjectStore(f"test-{uuid.uuid4().hex[:12]}")
    fresh.create_bucket()
    return fresh
