"""Credentials in the addresses that a user gives are used, and shown nowhere."""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from contextlib import closing
from typing import Any

import mlflow
import pytest
import safetensors.torch

from mlpipe.stages.messages import to_json
from tests.unit.bad_input import archives, weights
from tests.unit.bad_input.conftest import Pipeline
from tests.unit.data.conftest import pack_zip, web_server

SECRETS = ("us3r", "passw0rd", "s1gnature")


def address(server: str, name: str, content: bytes) -> str:
    """Where a web server has the content, with all that may be secret in an address."""
    with_login = server.replace("//", "//us3r:passw0rd@")
    return f"{with_login}/{name}?X-Amz-Signature=s1gnature#sha256={hashlib.sha256(content).hexdigest()}"


def test_credentials_of_addresses_are_not_written_down(
    pipeline: Pipeline, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    packed = pack_zip(tmp_path / "a.zip", archives.GOOD).read_bytes()
    cat_or_dog = {name: value[:2] if value.shape[:1] == (10,) else value for name, value in weights.state().items()}
    start = safetensors.torch.save(cat_or_dog)
    with (
        caplog.at_level(logging.DEBUG, logger="mlpipe"),
        web_server((200, {}, packed)) as (images_server, _),
        web_server((200, {}, start)) as (weights_server, asked),
    ):
        first, second = (address(weights_server, f"{n}.safetensors", start) for n in (1, 2))
        form = {
            "dataset": "images",
            "data_uri": address(images_server, "a.zip", packed),
            "models": f"custom_cnn={first},custom_cnn={second}",
            "image_size": 16,
            "epochs": 1,
        }
        data = pipeline.prepare(form)
        trained = pipeline.train(form, data)
        assert any("s1gnature" in request for request in asked)

    database = mlflow.get_tracking_uri().removeprefix("sqlite:///")
    with closing(sqlite3.connect(database)) as connection:
        written = "\n".join(connection.iterdump())
    assert trained.model.run_id in written
    told = json.dumps([to_json(data), to_json(trained)]) + caplog.text
    objects = "\n".join(key for prefix in ("sources", "datasets", "weights") for key in pipeline.store.list(prefix))
    for secret in SECRETS:
        assert secret not in written, [line for line in written.splitlines() if secret in line]
        assert secret not in told
        assert secret not in objects
