from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator

import pytest

from mlpipe.errors import UserError
from mlpipe.stack.local import StackSettings
from mlpipe.stack.ports import all_free, check_ports_free, free_block


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which this process listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_names_the_setting_the_holder_and_the_way_out(taken):
    with pytest.raises(UserError) as caught:
        check_ports_free({"MLPIPE_MLFLOW_PORT": taken})

    message = str(caught.value)
    assert f"MLPIPE_MLFLOW_PORT: port {taken} is taken by process {os.getpid()} (" in message
    assert "`mlpipe up --mlflow-port PORT`" in message


def test_a_port_taken_on_all_addresses_counts_as_well():
    with socket.create_server(("", 0)) as server, pytest.raises(UserError, match="is taken by"):
        check_ports_free({"MLPIPE_S3_PORT": server.getsockname()[1]})


def test_one_port_for_two_services_is_refused():
    with pytest.raises(UserError, match="MLPIPE_S3_PORT: 9 is also MLPIPE_MLFLOW_PORT"):
        check_ports_free({"MLPIPE_MLFLOW_PORT": 9, "MLPIPE_S3_PORT": 9})


def test_inner_ports_are_kept_while_free_and_replaced_when_taken(tmp_path):
    settings = StackSettings.load(tmp_path).with_storage_ports()

    assert settings.with_storage_ports().storage_ports == settings.storage_ports
    with socket.create_server(("127.0.0.1", settings.storage_ports[4])):
        assert all_free(settings.with_storage_ports().storage_ports)
        assert not all_free(settings.storage_ports)


def test_inner_ports_avoid_those_that_were_chosen(monkeypatch):
    free = free_block(8)
    anywhere, places = random.randrange, iter([free[0]])
    monkeypatch.setattr("random.randrange", lambda *bounds: next(places, None) or anywhere(*bounds))

    assert free[3] not in free_block(8, avoid={free[3]})
