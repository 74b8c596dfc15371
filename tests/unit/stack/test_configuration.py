"""What the components are started with."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from supervisor.options import ServerOptions

from mlpipe.stack import commands
from mlpipe.stack.components import NAMES, Component, components, program
from mlpipe.stack.credentials import Credentials
from mlpipe.stack.files import write_private
from mlpipe.stack.local import StackSettings
from mlpipe.stack.service_environment import service_environment
from mlpipe.stack.supervisor import render


@pytest.fixture
def environment(settings) -> dict[str, str]:
    settings.create_folders()
    return service_environment(settings, Credentials())


def test_every_airflow_option_exists_in_the_installed_version(environment):
    spec = importlib.util.find_spec("airflow")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    template = Path(spec.submodule_search_locations[0]) / "config_templates" / "config.yml"
    known = yaml.safe_load(template.read_text())

    ours = [tuple(name.lower().split("__")[1:]) for name in environment if name.startswith("AIRFLOW__")]
    shared = configparser.ConfigParser()
    shared.read(environment["AIRFLOW_CONFIG"])
    ours += [(section, option) for section in shared.sections() for option in shared[section]]
    # This project's own, and one that Celery takes.
    ours = [each for each in ours if each[0] not in ("gpu_executor", "celery_broker_transport_options")]

    assert len(ours) > 25
    assert len(ours) == len(set(map(tuple, ours))), "an option is set twice"
    unknown = [f"{section}.{option}" for section, option in ours if option not in known[section]["options"]]
    assert unknown == []


def test_every_seaweedfs_option_exists_in_the_installed_version(settings):
    usage = subprocess.run([program("weed"), "mini", "-h"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^  -(\S+)", usage.stdout + usage.stderr, re.MULTILINE))
    storage = components(settings)[0]

    ours = {argument[1:].partition("=")[0] for argument in storage.command[2:]}

    assert ours <= known


def test_the_callers_own_settings_of_other_systems_do_not_leak_in(settings, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "production")
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "postgresql://elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:7890")  # Airflow's HTTP client fails at the sight of it
    monkeypatch.setenv("AIRFLOW__GPU_EXECUTOR__THREADS_PER_SLOT", "2")
    settings.create_folders()

    environment = service_environment(settings, Credentials())

    assert "AWS_PROFILE" not in environment
    assert "PYTHONPATH" not in environment
    assert "elsewhere" not in environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"]
    assert environment["HTTPS_PROXY"] == "http://proxy:3128"
    assert "all_proxy" not in environment
    assert environment["AIRFLOW__GPU_EXECUTOR__THREADS_PER_SLOT"] == "2"


def test_airflow_follows_its_port(tmp_path):
    settings = StackSettings.load(tmp_path, airflow_port=1234)
    settings.create_folders()

    environment = service_environment(settings, Credentials())

    assert environment["AIRFLOW__API__PORT"] == "1234"
    assert environment["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == "http://127.0.0.1:1234/execution/"
    assert environment["AIRFLOW__API__BASE_URL"] == "http://127.0.0.1:1234"


def test_the_supervisor_restarts_everything_and_stops_whole_groups(settings):
    parser = configparser.RawConfigParser()
    parser.read_string(render(settings, components(settings)))

    programs = {name.partition(":")[2]: parser[name] for name in parser.sections() if name.startswith("program:")}

    assert list(programs) == list(NAMES)
    for section in programs.values():
        assert section["autorestart"] == section["stopasgroup"] == section["killasgroup"] == "true"
    assert parser["unix_http_server"]["chmod"] == "0700"


def test_the_scheduler_alone_imports_what_tasks_share(settings):
    parser = configparser.RawConfigParser()
    parser.read_string(render(settings, components(settings)))

    own = {name: parser[f"program:{name}"]["environment"] for name in NAMES}

    assert own.pop("scheduler").startswith('AIRFLOW__GPU_EXECUTOR__PRELOAD="mlflow,')
    assert not [name for name, variables in own.items() if "PRELOAD" in variables]


def test_no_secret_is_in_a_command_or_in_the_supervisors_file(settings, monkeypatch):
    settings.create_folders()
    credentials = Credentials.load_or_create(settings.credentials_path)  # where the components would find them
    for name, value in service_environment(settings, credentials).items():
        monkeypatch.setenv(name, value)
    text = render(settings, components(settings))

    assert not [name for name, value in vars(credentials).items() if value in text and name != "airflow_user"]


@pytest.mark.parametrize("name", ["a b", "a#b;c", "it's", "größe,=[$]\\"])
def test_the_supervisor_reads_paths_as_they_are(tmp_path, name):
    settings = StackSettings.load(tmp_path / name).with_storage_ports()
    settings.create_folders()
    command = ("/installed/50%/weed", f"-dir={settings.data}")
    write_private(
        settings.run / "supervisord.conf",
        render(settings, [Component(name="one", command=command, log=settings.logs / "one.log")]),
    )

    read = ServerOptions()
    read.realize(["--configuration", str(settings.run / "supervisord.conf")])

    (process,) = read.process_group_configs[0].process_configs
    assert read.pidfile == str(settings.run / "supervisord.pid")
    assert (process.directory, process.stdout_logfile) == (str(settings.home), str(settings.logs / "one.log"))
    assert shlex.split(process.command)[-2:] == list(command)


def test_the_command_line_has_a_label_for_each_component():
    assert set(commands.LABELS) == {*NAMES, "DAG"}


def test_the_command_line_loads_no_large_library():
    script = (
        "import sys, mlpipe.cli; "
        "print([name for name in ('airflow', 'mlflow', 'torch', 'numpy', 'boto3') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"
