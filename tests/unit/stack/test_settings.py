from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlpipe.errors import UserError
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.local import MAX_SOCKET_PATH, StackSettings, no_proxy


def test_ports_come_from_argument_then_environment_then_last_start_then_default(tmp_path, monkeypatch):
    last = StackSettings.load(tmp_path, airflow_port=1001, mlflow_port=1002)
    last.remember()
    monkeypatch.setenv("MLPIPE_MLFLOW_PORT", "2002")

    loaded = StackSettings.load(tmp_path)

    assert loaded.public_ports == {"airflow_port": 1001, "mlflow_port": 2002, "s3_port": 8333}
    assert StackSettings.load(tmp_path, mlflow_port=3002).mlflow_port == 3002


@pytest.mark.parametrize("value", ["http", "0", "65536", "80.5"])
def test_a_bad_port_is_refused_by_its_setting(tmp_path, monkeypatch, value):
    monkeypatch.setenv("MLPIPE_S3_PORT", value)

    with pytest.raises(UserError, match=rf"MLPIPE_S3_PORT: '{value}' .* 1 to 65535"):
        StackSettings.load(tmp_path)


def test_home_is_a_setting_and_loading_creates_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPIPE_HOME", str(tmp_path / "elsewhere"))

    assert StackSettings.load().home == tmp_path / "elsewhere"
    assert not (tmp_path / "elsewhere").exists()


def test_the_state_is_for_its_owner_only(settings):
    settings.create_folders()
    Credentials.load_or_create(settings.credentials_path)

    assert settings.home.stat().st_mode & 0o777 == 0o700
    assert settings.credentials_path.stat().st_mode & 0o777 == 0o600


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match="MLPIPE_HOME: .*file"):
        StackSettings.load(tmp_path / "file" / "state").create_folders()


@pytest.mark.parametrize("name", ["50%", 'a"b', "a\nb", "a\rb", "a #b", "a\t;b"])
def test_a_state_folder_that_the_supervisor_cannot_be_told_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="^MLPIPE_HOME: .* choose a folder without %"):
        StackSettings.load(tmp_path / name).create_folders()

    assert not (tmp_path / name).exists()


def test_the_socket_fits_its_address_however_long_the_state_path_is(tmp_path):
    deep = StackSettings.load(tmp_path / ("long" * 30) / "state")
    other = StackSettings.load(tmp_path / ("long" * 30) / "other")

    assert len(os.fsencode(deep.socket)) <= MAX_SOCKET_PATH
    assert deep.socket != other.socket
    assert StackSettings.load(Path("/s")).socket == Path("/s/run/supervisor.sock")


def test_the_socket_is_the_same_in_every_shell(tmp_path, monkeypatch):
    home = tmp_path / ("long" * 30)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    first = StackSettings.load(home).socket

    monkeypatch.setenv("XDG_RUNTIME_DIR", "/var/tmp")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    assert StackSettings.load(home).socket == first


def test_secrets_are_generated_once_and_differ_between_stacks(tmp_path):
    first = Credentials.load_or_create(tmp_path / "a.json")

    assert Credentials.load_or_create(tmp_path / "a.json") == first
    other = Credentials.load_or_create(tmp_path / "b.json")
    assert not set(vars(first).values()) & set(vars(other).values()) - {"admin"}


def test_secrets_do_not_show_when_printed(tmp_path):
    credentials = Credentials.load_or_create(tmp_path / "a.json")

    assert repr(credentials) == "Credentials(airflow_user='admin')"


@pytest.mark.parametrize("text", ["", "{", "{}", '{"airflow_user": "admin"}'])
def test_damaged_secrets_are_an_error_that_says_what_to_do(tmp_path, text):
    (tmp_path / "a.json").write_text(text)

    with pytest.raises(UserError, match=r"a\.json: damaged.*mlpipe up"):
        Credentials.load_or_create(tmp_path / "a.json")


def test_a_client_is_told_to_start_the_stack_first(settings):
    with pytest.raises(UserError, match="run `mlpipe up`"):
        settings.client_environment()


def test_a_client_finds_every_service(settings):
    settings.create_folders()
    credentials = Credentials.load_or_create(settings.credentials_path)

    variables = settings.client_environment()

    assert variables["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    assert variables["AWS_ENDPOINT_URL_S3"] == "http://127.0.0.1:8333"
    assert variables["AWS_SECRET_ACCESS_KEY"] == credentials.s3_secret_key
    assert variables["MLPIPE_AIRFLOW_URL"] == "http://127.0.0.1:8080"
    assert variables["MLPIPE_AIRFLOW_PASSWORD"] == credentials.airflow_password


def test_this_machine_is_never_reached_through_a_proxy():
    assert no_proxy({"NO_PROXY": "example.org,localhost"}) == "example.org,localhost,127.0.0.1"
    assert no_proxy({}) == "127.0.0.1,localhost"
    assert no_proxy({"NO_PROXY": "a.org", "no_proxy": "b.org"}) == "a.org,b.org,127.0.0.1,localhost"
    assert no_proxy({"no_proxy": "*"}) == "*"
